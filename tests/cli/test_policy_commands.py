"""``pmem plan``, ``apply``, ``undo`` and ``diff`` on images, and the unit that applies at boot."""

import json
import os
import pty
import shutil
import subprocess

import pytest
from cli_run import PATIENCE_SECONDS, PMEM, ROOT, call, complaint, done_well, environment, pmem

import pmemkit

MIB = 1 << 20
POLICY = """
[[rule]]
name = "logs"
match = { name = "region0" }
[[rule.share]]
size = "50%"
personality = "storage"
mode = "sector"
name = "log"
[[rule.share]]
size = "rest"
personality = "dax"
mode = "fsdax"
"""


@pytest.fixture
def machine(tmp_path):
    """Two dimms of 64 MiB whose label areas are blank."""
    path = tmp_path / "vm.toml"
    images = [tmp_path / "a.img", tmp_path / "b.img"]
    done_well("init-machine", path, *images, "--create", "--size", "64M")
    return path


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    path.chmod(0o644)
    return path


def modes(machine):
    found = done_well("list", machine, "-RN").json()["regions"]
    return [[n["mode"] for n in each.get("namespaces", [])] for each in found]


BEFORE = [["raw"], ["raw"]]
AFTER = [["sector", "fsdax"], ["raw"]]


def ext4_on(machine, dev, need, tmp_path):
    """A real file system on a namespace."""
    image = tmp_path / "ext4.img"
    with image.open("wb") as file:
        file.truncate(24 * MIB)
    words = [need("mkfs.ext4"), "-q", "-F", "-b", "4096", "-L", "precious", image]
    subprocess.run(words, check=True, capture_output=True)
    data = image.read_bytes()
    with pmemkit.open(f"{machine}:{dev}") as region, region.device() as device:
        for offset in range(0, len(data), MIB):
            if any(data[offset : offset + MIB]):
                device.write(offset, data[offset : offset + MIB])
        device.flush()
    return data


def first_bytes(machine, dev, length):
    with pmemkit.open(f"{machine}:{dev}", read_only=True) as region, region.device() as device:
        return b"".join(device.read(offset, MIB) for offset in range(0, length, MIB))


# --- plan and diff --------------------------------------------------------------------------------


def test_plan_changes_nothing(machine, policy, tmp_path):
    before = (tmp_path / "a.img").read_bytes()
    done = done_well("plan", "--machine", machine, policy)
    assert "create-namespace" in done.stdout
    assert "init-labels" in done.stdout
    plan = done_well("plan", "-m", machine, policy, "--json").json()
    assert [step["verb"] for step in plan["steps"]][-2:] == ["create-namespace"] * 2
    assert (tmp_path / "a.img").read_bytes() == before
    assert not (tmp_path / "vm.toml.journal").exists()


def test_exit_codes_of_plan_and_diff(machine, policy):
    assert call("plan", "-m", machine, policy).returncode == 0
    assert call("plan", "-m", machine, policy, "--exit-code").returncode == 1
    drift = call("diff", "-m", machine, policy)
    assert drift.returncode == 1
    assert "region0: " in drift.stdout
    found = json.loads(call("diff", "-m", machine, policy, "--json").stdout)
    assert {each["region"] for each in found} == {"region0"}
    done_well("apply", "-m", machine, policy, "--yes")
    assert call("plan", "-m", machine, policy, "--exit-code").returncode == 0
    same = call("diff", "-m", machine, policy)
    assert (same.returncode, same.stdout) == (0, "")
    assert call("diff", "-m", machine, policy, "--json").json() == []
    done_well("destroy-namespace", machine, "namespace0.1")
    assert call("diff", "-m", machine, policy).returncode == 1


def test_bare_images(tmp_path, policy):
    images = [tmp_path / name for name in ("a.img", "b.img")]
    for image in images:
        done_well("create-image", image, "--size", "64M", "--label-size", "128K")
    words = [word for image in images for word in ("-m", image)]
    done_well("apply", *words, policy, "--yes")
    assert modes(images[0]) == [["sector", "fsdax"]]
    assert (tmp_path / "a.img.journal").is_dir()
    done_well("undo", *words, "--yes")
    assert modes(images[0]) == [[]]


# --- apply and undo -------------------------------------------------------------------------------


def test_forth_again_and_back(machine, policy, tmp_path):
    before = (tmp_path / "a.img").read_bytes()
    done = done_well("apply", "--machine", machine, policy, "--yes")
    assert "create-namespace region0 sector (log): done" in done.stderr
    assert "pmem undo takes them back (run 1)" in done.stderr
    assert modes(machine) == AFTER
    again = done_well("apply", "--machine", machine, policy, "--yes")
    assert "nothing is to be done" in again.stderr
    undone = done_well("undo", "--machine", machine, "--yes")
    assert "of run 1 taken back" in undone.stderr
    assert modes(machine) == BEFORE
    assert (tmp_path / "a.img").read_bytes() == before
    nothing = done_well("undo", "--machine", machine, "--yes")
    assert "nothing was taken back" in nothing.stderr


def test_json(machine, policy):
    done = call("apply", "-m", machine, policy, "--yes", "--json").json()
    assert (done["run"], done["converged"], done["error"]) == (1, True, None)
    assert {each["made"]["dev"] for each in done["done"] if each["made"]} == {
        "namespace0.0",
        "namespace0.1",
    }
    (listed,) = call("undo", "-m", machine, "--list", "--json").json()
    assert (listed["run"], listed["ended"]) == (1, "converged")
    assert {each["state"] for each in listed["steps"]} == {"done"}
    undone = call("undo", "-m", machine, "--yes", "--json").json()
    assert (undone["left"], len(undone["undone"])) == (0, len(done["done"]))


def test_dry_run(machine, policy, tmp_path):
    done = done_well("apply", "-m", machine, policy, "--dry-run")
    assert done.stdout == done_well("plan", "-m", machine, policy).stdout
    assert modes(machine) == BEFORE
    assert not (tmp_path / "vm.toml.journal").exists()


def test_nobody_can_be_asked(machine, policy):
    done = pmem("apply", "-m", machine, policy, stdin="y\n")
    complaint(done, 2, "nobody can be asked", "--yes")
    assert modes(machine) == BEFORE
    done_well("apply", "-m", machine, policy, "--yes")
    complaint(pmem("undo", "-m", machine, stdin="y\n"), 2, "nobody can be asked")
    assert modes(machine) == AFTER


def read_until(terminal, mark):
    """What is printed up to a mark; up to the end without one."""
    shown = b""
    while mark is None or mark not in shown:
        try:
            more = os.read(terminal, 4096)
        except OSError:
            more = b""
        if not more:
            assert mark is None, shown.decode()
            break
        shown += more
    return shown


def on_a_terminal(answer, *words):
    """Runs a command on a terminal of its own and types an answer."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(PMEM[0], [*PMEM, *map(str, words)], environment())
    shown = read_until(terminal, b"[y/N]")
    os.write(terminal, answer)
    shown += read_until(terminal, None)
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown.decode()


def test_asked_on_a_terminal(machine, policy):
    code, shown = on_a_terminal(b"n\n", "apply", "-m", machine, policy)
    assert code == 1
    assert "create-namespace" in shown
    assert modes(machine) == BEFORE
    code, shown = on_a_terminal(b"y\n", "apply", "-m", machine, policy)
    assert code == 0, shown
    assert "done" in shown
    assert modes(machine) == AFTER
    code, shown = on_a_terminal(b"\n", "undo", "-m", machine)
    assert (code, modes(machine)) == (1, AFTER)
    code, shown = on_a_terminal(b"yes\n", "undo", "-m", machine)
    assert (code, modes(machine)) == (0, BEFORE)


def test_lost_data_are_spelt_out_and_come_back(machine, policy, need, tmp_path):
    done_well("create-namespace", machine, "-r", "0", "-m", "raw", "-n", "old")
    data = ext4_on(machine, "namespace0.0", need, tmp_path)
    refused = call("apply", "-m", machine, policy, "--yes")
    assert refused.returncode == 1
    assert "region0: refused" in refused.stderr
    assert "ext4" in refused.stderr
    assert modes(machine) == [["raw"], ["raw"]]
    policy.write_text("[guards]\nkeep_signatures = false\n" + POLICY)
    code, shown = on_a_terminal(b"y\n", "apply", "-m", machine, policy)
    assert code == 0
    asked = shown.index("[y/N]")
    assert "data are lost: " in shown[:asked]
    assert "ext4" in shown[:asked]
    assert modes(machine) == AFTER
    done_well("undo", "-m", machine, "--yes")
    assert first_bytes(machine, "namespace0.0", len(data)) == data


def test_written_since(machine, policy):
    done_well("apply", "-m", machine, policy, "--yes")
    with pmemkit.open(f"{machine}:namespace0.0") as region, region.device() as device:
        device.write(0, b"x" * 4096)
        device.flush()
    done = call("undo", "-m", machine, "--yes")
    assert done.returncode == 12
    assert "namespace0.0" in done.stderr
    assert "--force" in done.stderr
    assert call("undo", "-m", machine, "--yes", "--json", "--force").json()["left"] == 0
    assert modes(machine) == BEFORE


def test_a_plan_made_earlier(machine, policy, tmp_path):
    plan = tmp_path / "plan.json"
    done_well("plan", "-m", machine, policy, "--out", plan)
    done_well("create-namespace", machine, "-r", "0", "-m", "raw", "-s", "16M")
    done = call("apply", "-m", machine, policy, "--plan", plan, "--yes")
    complaint(done, 2, "since the plan was made", "nothing was changed")
    assert modes(machine) == [["raw"], ["raw"]]
    done_well("plan", "-m", machine, policy, "--out", plan)
    done_well("apply", "-m", machine, policy, "--plan", plan, "--yes")
    assert modes(machine) == AFTER


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"pmemkit_plan": 1}', "x" * 100, "[" * 9999])
def test_what_is_no_plan(machine, policy, tmp_path, text):
    plan = tmp_path / "plan.json"
    plan.write_text(text)
    done = call("apply", "-m", machine, policy, "--plan", plan, "--yes")
    complaint(done, 2, plan, "is no")


def test_a_plan_for_another_policy(machine, policy, tmp_path):
    plan = tmp_path / "plan.json"
    done_well("plan", "-m", machine, policy, "--out", plan)
    policy.write_text(POLICY.replace("50%", "25%"))
    done = call("apply", "-m", machine, policy, "--plan", plan, "--yes")
    complaint(done, 2, plan, "another policy")


def test_a_region_that_is_gone(machine, policy, tmp_path):
    """The dimm was taken out of the machine after the plan was made."""
    policy.write_text(POLICY.replace("region0", "region1"))
    plan = tmp_path / "plan.json"
    done_well("plan", "-m", machine, policy, "--out", plan)
    text = machine.read_text()
    machine.write_text(text[: text.rindex("[[dimm]]")])
    done = call("apply", "-m", machine, policy, "--plan", plan, "--yes")
    complaint(done, 2, "region1 went away", "nothing was changed")


def test_two_at_once(machine, policy):
    """The first one waits for an answer; the second one is told who has the machine."""
    child, terminal = pty.fork()
    if child == 0:
        words = [*PMEM, "apply", "-m", str(machine), str(policy)]
        os.execve(PMEM[0], words, environment())
    read_until(terminal, b"[y/N]")
    for words in (["apply", policy], ["undo"]):
        done = call(words[0], "-m", machine, *words[1:], "--yes")
        complaint(done, 9, f"process {child}", "pmem apply -m")
    os.write(terminal, b"y\n")
    read_until(terminal, None)
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert modes(machine) == AFTER


def test_an_image_that_is_served(machine, policy, tmp_path):
    """Nothing half-done: the step is refused before it begins."""
    done_well("create-namespace", machine, "-r", "1", "-m", "raw")
    policy.write_text(POLICY.replace("region0", "region[01]"))
    with pmemkit.open(f"{machine}:namespace1.0"):
        done = call("apply", "-m", machine, policy, "--yes")
        assert done.returncode == 9
        assert "has it open" in done.stderr
        assert modes(machine) == [["sector", "fsdax"], ["raw"]]
    done_well("apply", "-m", machine, policy, "--yes")
    assert modes(machine) == [["sector", "fsdax"], ["sector", "fsdax"]]


def test_a_policy_that_others_can_write(machine, policy):
    if os.geteuid() != 0:
        pytest.skip("only root minds who wrote a policy")
    policy.chmod(0o666)
    for command in ("plan", "diff", "apply"):
        done = call(command, "-m", machine, policy)
        complaint(done, 2, policy, "writ")
    assert modes(machine) == BEFORE


def test_runs_are_listed(machine, policy):
    assert done_well("undo", "-m", machine, "--list").stdout == ""
    done_well("apply", "-m", machine, policy, "--yes")
    done_well("undo", "-m", machine, "--steps", "1", "--yes")
    listed = done_well("undo", "-m", machine, "--list").stdout
    assert "undone in part" in listed
    assert "pmem apply -m" in listed
    assert listed.count("undone  ") >= 1
    complaint(call("undo", "-m", machine, "--run", "7", "--yes"), 2, "no run 7")
    assert "usage" in call("undo", "-m", machine, "--steps", "0").stderr


def test_a_damaged_journal(machine, policy, tmp_path):
    done_well("apply", "-m", machine, policy, "--yes")
    (file,) = (tmp_path / "vm.toml.journal").glob("*.jsonl")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    complaint(call("undo", "-m", machine, "--yes"), 12, file, "line")


def test_a_journal_elsewhere(machine, policy, tmp_path):
    words = ["-m", machine, "--yes", "--journal", tmp_path / "elsewhere"]
    done_well("apply", policy, *words)
    assert not (tmp_path / "vm.toml.journal").exists()
    done_well("undo", *words)
    assert modes(machine) == BEFORE


# --- at boot --------------------------------------------------------------------------------------

PACKAGING = ROOT / "packaging" / "systemd"


def test_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing (Debian package systemd)")
    text = (PACKAGING / "pmemkit-policy.service").read_text()
    command = "/usr/bin/pmem apply --yes /etc/pmemkit/policy.toml"
    assert f"ExecStart={command}\n" in text
    unit = tmp_path / "pmemkit-policy.service"
    unit.write_text(text.replace(command, "/bin/true"))
    words = ["systemd-analyze", "verify", unit]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "pmemkit-policy" in line]
    assert ours == []


@pytest.fixture
def generator(tmp_path):
    """Runs the generator for a made-up machine; gives what it linked, and what it said."""
    policy, unit, words = (tmp_path / name for name in ("policy.toml", "unit", "cmdline"))
    unit.write_text("")
    words.write_text("root=/dev/vda quiet\n")
    target = tmp_path / "normal"
    target.mkdir()

    def run(shell="sh", **more):
        variables = {
            "PMEMKIT_POLICY": str(policy),
            "PMEMKIT_UNIT": str(unit),
            "PMEMKIT_CMDLINE": str(words),
            "PMEMKIT_OWNER": str(os.geteuid()),
        }
        done = subprocess.run(
            [shell, PACKAGING / "pmemkit-generator", target, target, target],
            env={**os.environ, **variables, **more},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_symlink())
        return found, done.stderr

    return run


LINK = ["sysinit.target.wants/pmemkit-policy.service"]


def test_the_generator_starts_the_unit_where_there_is_a_policy(generator, tmp_path):
    assert generator() == ([], "")
    policy = tmp_path / "policy.toml"
    policy.write_text("")
    policy.chmod(0o644)
    assert generator() == (LINK, "")
    assert generator() == (LINK, "")
    link = tmp_path / "normal" / LINK[0]
    assert link.resolve() == tmp_path / "unit"


def test_the_generator_minds_who_can_write_the_policy(generator, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text("")
    policy.chmod(0o646)
    found, said = generator()
    assert (found, "others may write" in said) == ([], True)
    policy.chmod(0o644)
    found, said = generator(PMEMKIT_OWNER="4242")
    assert (found, "somebody else" in said) == ([], True)
    policy.unlink()
    policy.symlink_to(tmp_path / "unit")
    found, said = generator()
    assert (found, "not a plain file" in said) == ([], True)


def test_the_kernel_command_line_says_no(generator, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text("")
    policy.chmod(0o600)
    (tmp_path / "cmdline").write_text("quiet pmemkit.policy=0\n")
    found, said = generator()
    assert (found, "pmemkit.policy=0" in said) == ([], True)


def test_the_generator_is_plain_shell():
    text = PACKAGING / "pmemkit-generator"
    assert os.access(text, os.X_OK)
    for shell in ("sh", "dash", "bash"):
        if shutil.which(shell) is not None:
            subprocess.run([shell, "-n", text], check=True)
    if shutil.which("shellcheck") is not None:
        subprocess.run(["shellcheck", text], check=True)
