"""Programs and system calls with an end to their time."""

import errno
import os
import time

import pytest

from pmemkit.bus.programs import (
    PACKAGES,
    in_child,
    json_of,
    run_program,
    write_attribute,
)
from pmemkit.errors import Busy, Corrupt, NoSpace, NotSupported, SystemFailure


def script(tmp_path, monkeypatch, text, name="ndctl"):
    """A program of this name, before all others."""
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr("pmemkit.bus.programs._PATH", f"{tmp_path}:/usr/bin:/bin")


def test_output_input_and_environment(tmp_path, monkeypatch):
    script(tmp_path, monkeypatch, 'printf "%s:" "$@"; cat; echo ":$LC_ALL:$EVIL"')
    monkeypatch.setenv("EVIL", "yes")
    assert run_program(["ndctl", "a b", "$(id)"], given=b"in") == b"a b:$(id):in:C:\n"


@pytest.mark.parametrize("program", sorted(PACKAGES))
def test_the_package_of_a_missing_program_is_named(program, monkeypatch):
    monkeypatch.setattr("pmemkit.bus.programs._PATH", "/nonexistent")
    with pytest.raises(NotSupported, match=f"on Debian it is in the package {PACKAGES[program]}$"):
        run_program([program])


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Device or resource busy", Busy),
        ("namespace is in use", Busy),
        ("No space left on device", NoSpace),
        ("Invalid argument", SystemFailure),
    ],
)
def test_what_it_said_is_in_the_error(tmp_path, monkeypatch, said, kind):
    script(tmp_path, monkeypatch, f"echo '  {said}' >&2; exit 3")
    with pytest.raises(kind) as caught:
        run_program(["ndctl", "destroy-namespace", "all"])
    assert type(caught.value) is kind
    assert caught.value.message == f"ndctl destroy-namespace failed: {said}"


def test_what_it_said_is_shortened_and_printable(tmp_path, monkeypatch):
    script(tmp_path, monkeypatch, r"printf '\033[31mred\n%2000d' 7 >&2; printf x >&2; exit 1")
    with pytest.raises(SystemFailure) as caught:
        run_program(["ndctl", "list"])
    assert caught.value.message.startswith("ndctl list failed: [31mred")
    assert len(caught.value.message) < 700
    assert caught.value.message.isprintable()
    script(tmp_path, monkeypatch, "exit 7")
    with pytest.raises(SystemFailure, match="ndctl list ended with 7"):
        run_program(["ndctl", "list"])


def test_a_program_that_does_not_end_is_ended(tmp_path, monkeypatch):
    script(tmp_path, monkeypatch, "exec sleep 1000")
    with pytest.raises(Busy, match=r"ndctl list had not ended after 0\.2 seconds"):
        run_program(["ndctl", "list"], timeout_seconds=0.2)


@pytest.mark.parametrize(
    ("printed", "found"),
    [(b"", []), (b'{"a":1}', [{"a": 1}]), (b'[{"a":1},3]', [{"a": 1}]), (b"7", [])],
)
def test_json_of_one_several_or_none(printed, found):
    assert json_of(printed, "ndctl") == found


def test_no_json():
    with pytest.raises(Corrupt, match="what ndctl printed is no JSON"):
        json_of(b"{", "ndctl")


# --- calls in a child ----------------------------------------------------------------------------


def test_the_answer_of_a_child():
    assert in_child(lambda: b"x" * 1_000_000, 30, "reading") == b"x" * 1_000_000


def test_the_error_of_a_child():
    def call():
        raise OSError(errno.EBUSY, "busy")

    with pytest.raises(OSError, match="offlining: Device or resource busy") as caught:
        in_child(call, 30, "offlining")
    assert caught.value.errno == errno.EBUSY


def test_a_child_that_dies():
    with pytest.raises(SystemFailure, match="reading ended the process that did it"):
        in_child(lambda: os.kill(os.getpid(), 9), 30, "reading")


def test_a_child_that_does_not_answer_is_ended(tmp_path):
    note = tmp_path / "pid"

    def call():
        note.write_text(str(os.getpid()))
        time.sleep(1000)
        return b""

    with pytest.raises(Busy, match="waiting had not ended after 0"):
        in_child(call, 0.5, "waiting")
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_an_attribute_is_written(tmp_path):
    path = tmp_path / "state"
    path.write_text("")
    write_attribute(path, "offline")
    assert path.read_text() == "offline"
    with pytest.raises(FileNotFoundError):
        write_attribute(tmp_path / "none", "x")
