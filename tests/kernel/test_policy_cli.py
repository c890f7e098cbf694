"""``pmem plan``, ``apply`` and ``undo`` on machines with NVDIMMs, over reboots."""

import pytest
from policy_boots import LABEL_SIZE, MIB, boot, undone, verbs
from tools.guest import Dimm, Guest

SIZE = 512 * MIB

# --- two NVDIMMs by their nature -----------------------------------------------------------------

MACHINE = '[[dimm]]\nhandle = 2\nnature = "memory"\n'
NATURES = """
[[rule]]
name = "files"
match = { nature = "storage" }
want = { personality = "storage", name = "data", filesystem = "ext4", mount = "/mnt/data" }

[[rule]]
name = "memory"
match = { nature = "memory" }
want = { personality = "memory" }
"""
FIRST = """
sh("list", "pmem list -BDRN")
pmem("explain", "explain", "--json")
Path(P).chmod(0o666)
pmem("written by others", "apply", "--yes", P)
Path(P).chmod(0o644)
pmem("plan", "plan", "--json", P)
lock = Path("/var/lib/pmemkit/policy/lock")
first = begin("apply", "--yes", "--json", P)
wait_for(lambda: lock.exists() and lock.read_text())
pmem("second", "apply", "--yes", P)
end("apply", first)
pmem("again", "apply", "--yes", P)
pmem("diff", "diff", P)
sh("kernel", "cat /sys/devices/system/memory/auto_online_blocks")
sh("nodes", "numactl -H")
sh("used", '''
    free() { awk '/MemFree/ { print $4 }' /sys/devices/system/node/node2/meminfo; }
    before=$(free)
    numactl --membind=2 dd if=/dev/zero of=/run/held bs=1M count=16 2> /dev/null
    echo $((before - $(free)))
    rm /run/held
    grep /mnt/data /proc/mounts
    echo precious > /mnt/data/file''')
"""
SECOND = """
from policy_driver import hold
pmem("plan", "plan", "--json", P)
sh("real", f"pmem apply --yes {P}")
pmem("again", "apply", "--yes", P)
sh("file", "cat /mnt/data/file")
holder = hold(1, "pipe")
pmem("held", "undo", "--yes", "--offline-timeout", "3")
sh("pid", f"echo {holder.pid}; cat /sys/devices/system/node/node1/memory*/state")
holder.kill()
holder.wait()
pmem("freed", "undo", "--yes")
pmem("files", "undo", "--yes")
sh("wipe", "mount -t ext4 /dev/pmem*s /mnt && rm /mnt/file && umount /mnt")
pmem("start", "undo", "--yes")
pmem("runs", "undo", "--list", "--json")
sh("kernel", "cat /sys/devices/system/memory/auto_online_blocks")
"""
ONLINE = "memhp_default_state=online"
"""As on Debian's newer kernels, where it is the default."""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    found = []
    for slot, name in enumerate(("storage", "memory")):
        with (directory / name).open("wb") as image:
            image.truncate(SIZE + LABEL_SIZE)
        found.append(Dimm(directory / name, label_size_bytes=LABEL_SIZE, node=slot + 1, slot=slot))
    return found


@pytest.fixture(scope="module")
def first(guest: Guest, python_layers: None, two):
    return boot(guest, two, FIRST, policy=NATURES, machine=MACHINE, kernel_arguments=ONLINE)


@pytest.fixture(scope="module")
def second(guest: Guest, first, two):
    """The kernel numbers dimms, regions and nodes the other way round now."""
    return boot(
        guest,
        two[::-1],
        SECOND,
        policy=NATURES,
        machine=MACHINE,
        journal=first.journal,
        kernel_arguments=ONLINE,
    )


def test_nature_decides_what_becomes_of_two_nvdimms(first):
    assert [each["size"] for each in first["list"].ok().json()[0]["regions"]] == [SIZE, SIZE]
    verdicts = first["explain"].ok().json()
    natures = {each["nature"]: each["because"] for each in verdicts}
    assert natures["memory"] == "/etc/pmemkit/machine.toml:1 says nature memory"
    assert natures["storage"] == "firmware (NFIT) says a persistent range"
    plan = first["plan"].ok().json()
    storage, memory = (
        "init-labels create-namespace mkfs mount",
        "reconfigure-namespace reconfigure-device",
    )
    assert sorted(verbs(plan)) == sorted(f"{storage} {memory}".split())
    assert [each["page_map"]["place"] for each in plan["steps"] if "page_map" in each] == ["mem"]
    done = first["apply"].ok().json()
    assert done["converged"] and verbs({"steps": done["done"]}) == verbs(plan)
    assert first["again"].ok().errors == "pmem: nothing is to be done\n"
    assert first["diff"].ok().errors == "no drift\n"


def test_memory_is_memory_of_its_own_node_and_storage_is_mounted(first):
    assert "node 2 size: 384 MB" in first["nodes"].ok().out
    used, mounted = first["used"].ok().out.splitlines()
    assert int(used) >= 16 << 10
    assert mounted.startswith("/dev/pmem") and " ext4 rw" in mounted
    assert first["kernel"].out == "online\n"


def test_a_policy_that_others_can_write_is_refused(first):
    refused = first["written by others"].ok(2)
    assert "others than root can write it" in refused.errors
    assert "chmod go-w" in refused.errors


def test_the_second_of_two_applies_hears_of_the_first(first):
    refused = first["second"].ok(9)
    assert "pmem apply --yes --json /etc/pmemkit/policy.toml" in refused.errors


def test_a_reboot_keeps_what_is_persistent_and_apply_does_the_rest(second):
    plan = second["plan"].ok().json()
    assert sorted(verbs(plan)) == ["mount", "reconfigure-device"]
    assert "2 steps done" in second["real"].ok().errors
    assert second["again"].ok().errors == "pmem: nothing is to be done\n"
    assert second["file"].ok().out == "precious\n"


def test_memory_that_is_held_keeps_undo_from_going_on_and_nothing_is_half_done(second):
    held = second["held"].ok(9)
    pid, *states = second["pid"].ok().out.split()
    assert f"process python3 ({pid})" in held.errors
    assert "all blocks are as they were" in held.errors
    assert states == ["online"] * 3
    # The time that was set, and what it takes to begin and to go back.
    assert held.seconds < 60
    assert any("is device DAX again" in each for each in undone(second["freed"].ok()))


def test_undo_goes_back_to_the_start_over_a_reboot_that_renumbered(second):
    refused = second["files"].ok(12)
    assert "there are files in the file system" in refused.errors
    told = undone(second["start"].ok())
    assert [each.split()[1] for each in told] == ["mkfs", "create-namespace", "init-labels"]
    states = {step["state"] for run in second["runs"].ok().json() for step in run["steps"]}
    assert states == {"undone"}
    assert second["kernel"].out == "online\n"


# --- one NVDIMM with labels and namespaces -------------------------------------------------------

SHARES = """
[guards]
{guards}

[[rule]]
name = "two parts"
match = {{ type = "pmem" }}

[[rule.share]]
name = "tables"
size = "60%"
mode = "fsdax"
filesystem = "ext4"
mount = "/mnt/tables"

[[rule.share]]
name = "log"
size = "rest"
mode = "sector"
"""
BESIDE = """
[[rule]]
name = "what is there stays"
match = { type = "pmem" }

[[rule.share]]
name = "old"
size = "64M"
mode = "fsdax"
filesystem = "ext4"
mount = "/mnt/old"

[[rule.share]]
name = "log"
size = "rest"
mode = "sector"
"""
EXISTING = """
sh("prepare", '''
    ndctl disable-region all
    ndctl init-labels -f all
    ndctl enable-region all
    ndctl create-namespace -r region0 -m fsdax -s 64M -n old
    mkfs.ext4 -q /dev/pmem0
    mount -t ext4 /dev/pmem0 /mnt
    echo precious > /mnt/file
    umount /mnt
    ndctl create-namespace -r region0 -m devdax -s 32M -n unused -a 4K''')
pmem("guarded", "plan", "--json", "--exit-code", P)
beside = "/etc/pmemkit/beside.toml"
Path(beside).write_text(BESIDE)
pmem("beside", "plan", "--json", beside)
pmem("apply beside", "apply", "--yes", beside)
sh("old", "cat /mnt/old/file")
pmem("undo beside", "undo", "--yes")
sh("list", "ndctl list -N")
Path(P).write_text(Path(P).read_text().replace("true", "false"))
pmem("plan", "plan", "--json", P)
""".replace("BESIDE", repr(BESIDE))
WITHOUT_GUARD = """
pmem("apply", "apply", "--yes", P)
pmem("again", "apply", "--yes", P)
sh("mounted", "grep /mnt/tables /proc/mounts")
pmem("undo", "undo", "--yes")
pmem("forced", "undo", "--yes", "--force")
sh("end", "ndctl list -N")
"""
KEPT = "keep_signatures = true"


@pytest.fixture(scope="module")
def existing(guest: Guest, python_layers: None, tmp_path_factory, scale):
    image = tmp_path_factory.mktemp("one") / "image"
    with image.open("wb") as file:
        file.truncate(192 * MIB + LABEL_SIZE)
    dimms = [Dimm(image, label_size_bytes=LABEL_SIZE)]
    script = scale(EXISTING, EXISTING + WITHOUT_GUARD)
    return boot(guest, dimms, script, policy=SHARES.format(guards=KEPT))


def test_a_guard_keeps_a_namespace_with_a_file_system(existing):
    existing["prepare"].ok()
    plan = existing["guarded"].ok(1).json()
    assert plan["steps"] == []
    (refusal,) = plan["refused"]
    assert "carries ext4" in refusal["why"]


def test_what_is_there_already_stays_and_the_rest_is_made_beside_it(existing):
    plan = existing["beside"].ok().json()
    assert verbs(plan) == ["destroy-namespace", "mount", "create-namespace"]
    existing["apply beside"].ok()
    assert existing["old"].ok().out == "precious\n"
    existing["undo beside"].ok()


def test_without_the_guard_the_plan_says_what_is_lost(existing):
    steps = existing["plan"].ok().json()["steps"]
    lost = [each["destroys"][0] for each in steps if "destroys" in each]
    assert "ext4 (filesystem)" in " ".join(lost) and len(lost) == 2


@pytest.mark.soak
def test_without_the_guard_room_is_made(existing):
    assert "data are lost" in existing["apply"].ok().errors
    assert existing["again"].ok().errors == "pmem: nothing is to be done\n"
    assert " ext4 " in existing["mounted"].ok().out


@pytest.mark.soak
def test_undo_brings_back_what_was_not_written_over_and_says_so_of_the_rest(existing):
    stopped = existing["undo"].ok(12)
    assert "ext4 was there since, so its contents cannot come back" in stopped.errors
    told = undone(stopped) + undone(existing["forced"].ok())
    assert any("is back as devdax" in each for each in told)
    assert any("is back as fsdax, without its contents: ext4 was there" in each for each in told)
    before, after = (existing[name].ok().json() for name in ("list", "end"))
    assert {each["uuid"] for each in after} == {each["uuid"] for each in before}
    assert {each["name"]: each["mode"] for each in after} == {"old": "fsdax", "unused": "devdax"}


# --- ranges that the kernel sets aside -----------------------------------------------------------

EMULATED = """
[[rule]]
name = "emulated"
match = { type = "pmem" }
want = { mode = "sector", filesystem = "ext4", mount = "/mnt/emulated" }
"""
DIVIDED = """
[[rule]]
name = "divided"
match = { type = "pmem" }

[[rule.share]]
size = "50%"
mode = "fsdax"

[[rule.share]]
mode = "sector"
"""
RANGE = """
sh("list", "pmem list -BDRN")
pmem("explain", "explain", "--json")
divided = "/etc/pmemkit/divided.toml"
Path(divided).write_text(DIVIDED)
pmem("divided", "plan", "--json", divided)
pmem("plan", "plan", "--json", "--out", "/run/plan", P)
driver = "/sys/bus/platform/drivers/e820_pmem"
sh("gone", f"echo e820_pmem > {driver}/unbind; ls /sys/bus/nd/devices")
pmem("apply what is gone", "apply", "--yes", "--plan", "/run/plan", P)
sh("back", f"echo e820_pmem > {driver}/bind; sleep 1; ls /sys/bus/nd/devices")
pmem("apply", "apply", "--yes", P)
pmem("again", "apply", "--yes", P)
sh("mounted", "grep /mnt/emulated /proc/mounts")
pmem("undo", "undo", "--yes")
sh("end", "ndctl list -N")
""".replace("DIVIDED", repr(DIVIDED))


@pytest.fixture(scope="module")
def emulated(guest: Guest, python_layers: None):
    return boot(guest, [], RANGE, policy=EMULATED, memory="3G", kernel_arguments="memmap=128M!1G")


def test_a_range_without_labels_is_not_divided(emulated):
    (refusal,) = emulated["divided"].ok().json()["refused"]
    assert "no label area" in refusal["why"]
    (verdict,) = emulated["explain"].ok().json()
    assert verdict["nature"] == "storage"


def test_a_range_without_labels_becomes_storage_and_goes_back(emulated):
    assert verbs(emulated["plan"].ok().json()) == ["reconfigure-namespace", "mkfs", "mount"]
    emulated["apply"].ok()
    assert emulated["again"].ok().errors == "pmem: nothing is to be done\n"
    assert " ext4 " in emulated["mounted"].ok().out
    emulated["undo"].ok()


def test_a_region_that_went_away_since_the_plan(emulated):
    refused = emulated["apply what is gone"].ok(2)
    assert "region0" not in emulated["gone"].ok().out
    assert "went away since the plan was made; nothing was changed" in refused.errors
