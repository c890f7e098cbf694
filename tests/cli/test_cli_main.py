"""The command itself: help, version, start-up, errors, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_run import PATIENCE_SECONDS, PMEM, environment, pmem, refused

import pmemkit
from pmemkit.cli import COMMANDS, main

START_UP_RATIO = 5


def test_the_version():
    done = pmem("--version")
    assert (done.returncode, done.stdout) == (0, f"pmem {pmemkit.__version__}\n")


def test_help_names_every_command():
    done = pmem("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


def test_without_a_command_the_help_is_on_standard_error():
    done = pmem()
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: pmem" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: pmem {command}" in text
    assert f"examples:\n  pmem {command}" in text


def test_the_help_of_layers_is_made_from_the_table(capsys):
    from pmemkit.storage.layers import LAYERS

    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for name, kind in LAYERS.items():
        assert kind.what in text, name
        assert all(f"{option}=" in text for option in kind.options)


def test_an_unknown_command_is_wrong_usage():
    refused(pmem("explode"), 2, "'explode' is not a command", "create-image")


@pytest.mark.parametrize(
    "words",
    [
        ["create-image", "x"],
        ["create-image", "x", "--size", "1Z"],
        ["create-image", "x", "--siz", "1G"],
        ["info"],
        ["copy", "x"],
        ["serve", "x", "--layer", "explode"],
        ["serve", "x", "--max-connections", "0"],
        ["serve", "x", "--handshake-timeout", "-1"],
        ["serve", "x", "--poll-us", "often"],
        ["bench", "everything"],
        ["create-namespace"],
        ["create-namespace", "x", "-m", "turbo"],
        ["init-labels", "x", "-V", "1.3"],
        ["init-machine", "vm.toml"],
        ["reconfigure", "x", "namespace0.0"],
        ["write-infoblock", "-c", "-m", "sector"],
    ],
)
def test_wrong_usage_is_2(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: pmem" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_reason_of_a_refused_argument_is_shown():
    assert "'1Z' is not a size" in pmem("create-image", "x", "--size", "1Z").stderr
    assert "'explode' is not a layer" in pmem("serve", "x", "--layer", "explode").stderr


def test_bench_hands_over_to_the_suite():
    done = pmem("bench", "medium", "--help")
    assert done.returncode == 0
    assert "--quick" in done.stdout


def seconds_of(command):
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, env=environment(), check=True)
    return time.perf_counter() - began


def test_the_version_starts_in_a_few_times_what_an_empty_program_takes(scale):
    script = "import sys; from pmemkit.cli import main; sys.exit(main())"
    empty, version = [], []
    for _ in range(scale(15, 50)):
        empty.append(seconds_of([sys.executable, "-c", "pass"]))
        version.append(seconds_of([sys.executable, "-c", script, "--version"]))
    assert min(version) <= START_UP_RATIO * min(empty)


def test_starting_imports_nothing_heavy():
    script = (
        "import sys; from pmemkit.cli import main; main(['--version']);"
        "print(*{'argparse', 'asyncio', 'json', 're', 'rich', 'pathlib', 'pmemkit._native'}"
        " & set(sys.modules))"
    )
    command = [sys.executable, "-S", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.splitlines()[1:] == [""]


def test_a_reader_that_leaves_is_no_error(tmp_path):
    image = tmp_path / "image"
    pmem("create-image", image, "--size", "64M")
    for words in (["copy", str(image), "-"], ["list", *[str(image)] * 500]):
        process = subprocess.Popen(
            [*PMEM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
        )
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        process.stderr.close()
        assert process.wait(PATIENCE_SECONDS) == 128 + signal.SIGPIPE


def _reads_standard_input(pid: int) -> bool:
    """True while the process waits in read or readv on descriptor 0: by then all is imported. An
    interrupt in the middle of an import can be lost; that is CPython's."""
    try:
        words = Path(f"/proc/{pid}/syscall").read_text().split()
    except OSError:
        return False
    return len(words) > 1 and words[1] == "0x0" and words[0] in ("0", "19", "63", "65")


def test_ctrl_c_is_130(tmp_path):
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        [*PMEM, "copy", "-", str(tmp_path / "new")],
        stdin=read_end,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    os.close(read_end)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _reads_standard_input(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
        process.communicate()
        os.close(write_end)
    assert process.returncode == 130
    assert "interrupted" in error
    assert "0 bytes were copied" in error
    assert "Traceback" not in error


def test_an_error_of_the_system_names_the_file(tmp_path):
    refused(pmem("info", tmp_path / "nothing"), 11, tmp_path / "nothing", "No such file")


def test_every_json_is_json(tmp_path):
    image = tmp_path / "image"
    commands = [
        ["create-image", image, "--size", "1M", "--json"],
        ["list", image, "--json"],
        ["list", "-RND"],
        ["info", image, "--json"],
        ["copy", image, tmp_path / "copy", "--json"],
        [
            "init-machine",
            tmp_path / "vm.toml",
            tmp_path / "new",
            "--create",
            "--size=64M",
            "--json",
        ],
        ["init-labels", tmp_path / "vm.toml", "--json"],
        ["create-namespace", tmp_path / "vm.toml", "-m", "sector", "--json"],
        ["list", tmp_path / "vm.toml", "-BDRNiv"],
        ["info", tmp_path / "vm.toml", "--json"],
        ["info", f"{tmp_path / 'vm.toml'}:namespace0.0", "--json"],
        ["qemu-args", tmp_path / "vm.toml", "--json"],
        ["enable-namespace", tmp_path / "vm.toml", "all", "--json"],
        ["disable-namespace", tmp_path / "vm.toml", "all", "--json"],
        ["check-namespace", tmp_path / "vm.toml", "all", "--json"],
        ["read-labels", tmp_path / "vm.toml", "--json"],
        ["check-labels", tmp_path / "vm.toml", "--json"],
        ["read-infoblock", tmp_path / "vm.toml", "--json"],
        ["recookie", tmp_path / "vm.toml", "--json"],
        ["reconfigure", tmp_path / "vm.toml", "namespace0.0", "-m", "raw", "--yes", "--json"],
        ["destroy-namespace", tmp_path / "vm.toml", "all", "--json"],
        ["zero-labels", tmp_path / "vm.toml", "--json"],
    ]
    for words in commands:
        done = pmem(*words)
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)
