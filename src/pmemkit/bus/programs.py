"""Programs of others and system calls that may take long, each with an end to its time.

Invariants:
1. No shell: a program gets a list of words, a fixed environment and nothing on standard input but
   what it is given.
2. Nothing outlives its time: what has not ended by then is killed, and `Busy` says so.
3. What a program said when it failed is in the error, shortened, and free of control characters.

What this does not do: know what a program is for.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from pmemkit.errors import Busy, Corrupt, NoSpace, NotSupported, PmemError, SystemFailure

__all__ = [
    "PACKAGES",
    "Run",
    "in_child",
    "json_of",
    "missing",
    "run_program",
    "write_attribute",
]

PACKAGES: Final = {
    "ndctl": "ndctl",
    "daxctl": "daxctl",
    "cxl": "cxl",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mount": "mount",
    "umount": "mount",
    "losetup": "mount",
    "modprobe": "kmod",
}
"""The Debian package of each program that is used."""

_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_SAID_LENGTH: Final = 600
_READ_SIZE: Final = 1 << 16
_GRACE_SECONDS: Final = 5.0


class Run(Protocol):
    """Something that runs programs."""

    def __call__(
        self, argv: Sequence[str], *, timeout_seconds: float = 60, given: bytes = b""
    ) -> bytes:
        """What the program printed; raises :class:`PmemError` where it failed."""


def run_program(argv: Sequence[str], *, timeout_seconds: float = 60, given: bytes = b"") -> bytes:
    """Runs a program and returns what it printed.

    Raises ``NotSupported`` with the name of the package where it is not installed, ``Busy`` where
    it took too long or says that something is busy, ``NoSpace``, or ``SystemFailure``.
    """
    program = shutil.which(argv[0], path=_PATH)
    if program is None:
        raise NotSupported(missing(argv[0]), op=argv[0])
    environment = {"PATH": _PATH, "LC_ALL": "C", "HOME": "/"}
    try:
        process = subprocess.Popen(
            [program, *argv[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
    except OSError as failure:
        message = f"{argv[0]} could not be started: {failure.strerror}"
        raise SystemFailure(message, errno=failure.errno, op=argv[0]) from failure
    try:
        printed, complained = process.communicate(given, timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        # One that waits for a device cannot die yet; it is left to the kernel.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_GRACE_SECONDS)
        what = " ".join(argv[:2])
        raise Busy(f"{what} had not ended after {timeout_seconds:g} seconds", op=argv[0]) from None
    except BaseException:
        process.kill()
        # Whoever cleans up afterwards must not do so while it is still at work.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_GRACE_SECONDS)
        raise
    if process.returncode != 0:
        raise _failure(argv, process.returncode, complained or printed)
    return printed


def missing(program: str) -> str:
    """The sentence for a program that is not there."""
    package = PACKAGES.get(program)
    where = f"; on Debian it is in the package {package}" if package else ""
    return f"{program} is not installed{where}"


def _failure(argv: Sequence[str], status: int, said: bytes) -> PmemError:
    text = said.decode("utf-8", "replace")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    words = " ".join(word for word in argv[:2] if word[0] not in "/-")
    # What was wrong comes before how to do it right.
    text = text.partition(" Usage:")[0]
    if len(text) > _SAID_LENGTH:
        text = f"{text[:_SAID_LENGTH]} …"
    message = f"{words} failed: {text}" if text else f"{words} ended with {status}"
    lowered = text.lower()
    kind: type[PmemError] = SystemFailure
    if "busy" in lowered or "in use" in lowered:
        kind = Busy
    elif "no space" in lowered or "insufficient" in lowered:
        kind = NoSpace
    return kind(message, op=argv[0])


def json_of(printed: bytes, program: str) -> list[dict[str, Any]]:
    """The objects that ndctl, daxctl or cxl printed: one, a list, or nothing at all."""
    if not printed.strip():
        return []
    try:
        found = json.loads(printed)
    except ValueError as failure:
        raise Corrupt(f"what {program} printed is no JSON: {failure}", op=program) from failure
    found = found if isinstance(found, list) else [found]
    return [each for each in found if isinstance(each, dict)]


def write_attribute(path: Path, text: str, timeout_seconds: float = 60) -> None:
    """Writes an attribute of sysfs; ``OSError`` with the errno of the kernel, or ``Busy`` when it
    takes too long: a write of ``offline`` may try for as long as something pins its memory."""

    def write() -> bytes:
        descriptor = os.open(path, os.O_WRONLY)
        os.write(descriptor, text.encode())
        os.close(descriptor)
        return b""

    in_child(write, timeout_seconds, f"writing {text!r} to {path}")


def in_child(call: Callable[[], bytes], timeout_seconds: float, what: str) -> bytes:
    """What ``call`` returns, which runs in a child process: it may hang, or die of SIGBUS.

    An ``OSError`` of it is raised here with its errno. ``Busy``: it did not end in time and was
    killed.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(call, sender)
    os.close(sender)
    try:
        answer = _receive(receiver, time.monotonic() + timeout_seconds)
    finally:
        os.close(receiver)
        _end(child)
    if answer is None:
        raise Busy(f"{what} had not ended after {timeout_seconds:g} seconds", op="write")
    if not answer:
        raise SystemFailure(f"{what} ended the process that did it", op="write")
    if answer[0]:
        number = answer[0]
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return answer[1:]


def _be_child(call: Callable[[], bytes], sender: int) -> None:
    """The child's whole life: nothing of the parent's is flushed, closed or called on its way
    out."""
    answer = b"\x05"
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        answer = b"\0" + call()
    except OSError as failure:
        answer = bytes([min(failure.errno or 5, 255)])
    finally:
        while answer:
            answer = answer[os.write(sender, answer) :]
        os._exit(0)


def _receive(receiver: int, deadline: float) -> bytes | None:
    """All that the child wrote, or ``None`` when there is no end of it at the deadline."""
    poller = select.poll()
    poller.register(receiver, select.POLLIN | select.POLLHUP)
    answer = b""
    while (left := deadline - time.monotonic()) > 0:
        if poller.poll(min(left, 1.0) * 1000):
            part = os.read(receiver, _READ_SIZE)
            if not part:
                return answer
            answer += part
    return None


def _end(child: int) -> None:
    """Ends a child and forgets it; one that cannot die yet is left to the kernel."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline:
        ended, _ = os.waitpid(child, os.WNOHANG)
        if ended:
            return
        os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
