#!/usr/bin/env python3
"""A real Linux kernel with its nvdimm stack, booted under QEMU on image files to run scripts.

    tools/guest.py run --dimm IMAGE[,label-size=128K][,align=2M][,slot=N] … -- ndctl list -RNi
    tools/guest.py build                       only builds the guest and prints where it is

Steps go in as a second initramfs; exit statuses, stdout and stderr come out as counted bytes on a
port of their own, so kernel messages cannot be mistaken for results. What is booted comes from
`tools/guest_image.py`, what it is booted on from `tools/guest_machine.py`.

`Guest.run` is for tests, the command line for people and for scripts (``--json``).

Invariants:
1. A result is what the guest wrote, byte for byte. A step without a complete frame did not end.
2. A guest does not outlive its call: QEMU is killed on every way out of it.
3. An image file holds everything that the steps wrote when `Guest.run` returns: the guest has
   unmounted, synced and switched itself off. Otherwise it raises `GuestFailedError`, unless the
   caller asked for a power failure.

What this does not do: install anything, use KVM, or judge pmemkit. It is the referee, also when
pmemkit runs in it (`tools/guest_python.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.guest_image import Archive, build
from tools.guest_machine import CxlDevice, Dimm, Machine, guess_label_size
from tools.guest_packages import KERNEL_VARIABLE, GuestError, GuestUnavailableError, Qemu
from tools.guest_python import layers

__all__ = [
    "CxlDevice",
    "Dimm",
    "Guest",
    "GuestError",
    "GuestFailedError",
    "GuestUnavailableError",
    "Result",
    "StepResult",
    "guess_label_size",
    "main",
]


CXL_MODULES = ("cxl_acpi", "cxl_pci", "cxl_mem", "cxl_pmem", "dax_cxl")
"""What makes CXL devices appear; not kmem, which takes whatever region of RAM is made."""

_POWER_FAILED = "the power failed"
_ARGUMENTS = "console=ttyS0 loglevel=5 panic=-1 oops=panic no_timer_check"
"""Without the last one Linux counts ticks of a timer and panics on a machine that is too busy."""
_TAIL_LINES = 50
_POLL_SECONDS = 0.05


class GuestFailedError(GuestError):
    """A guest was started and did not end as it should have."""

    def __init__(self, why: str, result: Result) -> None:
        lines = result.console.rstrip().splitlines()[-_TAIL_LINES:]
        shown = "\n".join(f"  | {line}" for line in lines)
        super().__init__(f"{why}; the last lines of the console:\n{shown}")
        self.result = result
        """What had come out until then."""


# --- results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepResult:
    """What one script did."""

    name: str
    status: int | None
    """Exit status; ``None`` when it did not end, or was never begun."""
    stdout: bytes = b""
    stderr: bytes = b""

    @property
    def text(self) -> str:
        """Stdout as text."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def errors(self) -> str:
        """Stderr as text."""
        return self.stderr.decode("utf-8", "replace")

    def json(self) -> Any:
        """Stdout as JSON, of a step that succeeded; ndctl prints nothing for an empty list."""
        self.check()
        try:
            return json.loads(self.stdout) if self.stdout.strip() else []
        except ValueError as failure:
            raise GuestError(f"step {self.name}: no JSON: {failure}\n{self.text}") from failure

    def check(self) -> StepResult:
        """Itself; raises `GuestError` with all output unless the exit status is 0."""
        if self.status != 0:
            ended = "did not end" if self.status is None else f"ended with {self.status}"
            raise GuestError(f"step {self.name} {ended}\n{self.text}{self.errors}".rstrip())
        return self


@dataclass
class Result:
    """What one boot left behind."""

    steps: dict[str, StepResult]
    powered_off: bool = False
    """The guest itself said that everything is on the media."""
    console: str = ""
    messages: str = ""
    """The kernel's messages, from ``dmesg``."""
    running: str | None = field(default=None)
    """The step that was running when the guest was ended."""

    def __getitem__(self, name: str) -> StepResult:
        return self.steps[name]

    def check(self) -> Result:
        """Itself; raises `GuestError` for the first step that failed."""
        for step in self.steps.values():
            step.check()
        return self


def parse_frames(data: bytes, names: Sequence[str]) -> Result:
    """Reads the frames that ``tests/kernel/image/init`` writes; an incomplete one is left out."""
    result = Result({name: StepResult(name, None) for name in names})
    at = 0
    while (end := data.find(b"\n", at)) >= 0:
        word, *numbers = data[at:end].split()
        values = [int(number) for number in numbers]
        at = end + 1
        if word == b"begin":
            result.running = names[values[0]]
        elif word == b"step" and at + values[2] + values[3] <= len(data):
            index, status, out_bytes, error_bytes = values
            middle, last = at + out_bytes, at + out_bytes + error_bytes
            step = StepResult(names[index], status, data[at:middle], data[middle:last])
            result.steps[step.name], result.running, at = step, None, last
        elif word == b"dmesg" and at + values[0] <= len(data):
            result.messages = data[at : at + values[0]].decode("utf-8", "replace")
            at += values[0]
        elif word == b"end":
            result.powered_off = True
        else:
            break
    return result


# --- running -------------------------------------------------------------------------------------


def _steps_archive(
    steps: Mapping[str, str],
    files: Mapping[str, bytes],
    modules: Sequence[str],
    stop: bool,
) -> bytes:
    archive = Archive()
    archive.directory("steps")
    archive.directory("in")
    for index, script in enumerate(steps.values()):
        archive.file(f"steps/{index:04d}", script.encode() + b"\n", 0o755)
    for name, data in files.items():
        archive.file(f"in/{name}", data)
    archive.file("etc/more-modules", "\n".join(modules).encode() + b"\n")
    if stop:
        archive.file("stop-on-failure", b"")
    return archive.bytes()


class Guest:
    """A built guest, ready to be booted any number of times."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any], qemu: Qemu) -> None:
        self.directory = directory
        self.kernel_release: str = manifest["release"]
        self.programs = frozenset[str](manifest["programs"])
        """Those that are not busybox's; ``daxcopy`` is missing where there was no C compiler."""
        self.qemu = qemu

    @classmethod
    def build(
        cls, kernel: str | None = None, cache: Path | None = None, *, cxl: bool = False
    ) -> Guest:
        """Builds it unless the cache has it; `GuestUnavailableError` says what is missing.

        With ``cxl`` it has a kernel and a QEMU that know CXL memory, from Debian's backports where
        this machine's are too old.
        """
        directory, manifest = build(kernel, cache, cxl)
        return cls(directory, manifest, Qemu.find(cache, cxl))

    def run(
        self,
        dimms: Sequence[Dimm],
        steps: Mapping[str, str],
        *,
        timeout_seconds: float = 90,
        step_timeout_seconds: float | None = None,
        memory: str = "1G",
        cpus: int = 1,
        nodes: Sequence[str] = (),
        cxl: Sequence[CxlDevice] = (),
        python: bool = False,
        modules: Sequence[str] | None = None,
        kernel_arguments: str = "",
        qemu_arguments: Sequence[str] = (),
        files: Mapping[str, bytes] | None = None,
        stop_on_failure: bool = False,
        power_fails: Callable[[], bool] | None = None,
    ) -> Result:
        """Boots on the dimms, runs each script (``sh -e``), and switches the guest off.

        A step that fails does not keep the others from running unless ``stop_on_failure``.
        ``nodes`` and ``cxl`` are those of `Machine`. ``python`` puts Python and pmemkit into the
        guest. ``modules`` are loaded before the first step; by default those of CXL, but not kmem,
        if there are CXL devices. ``files`` are found under ``/in``. ``qemu_arguments`` attach what
        `Machine` cannot describe. A guest that takes longer than ``timeout_seconds``, or one of
        whose steps takes longer than ``step_timeout_seconds``, is killed; that and a guest that
        dies raise `GuestFailedError` with whatever had come out. ``power_fails`` is asked all the
        time; when it says so, QEMU is killed, and the result is what had come out until then.
        """
        machine = Machine(dimms, cxl, memory, cpus, nodes)
        if modules is None:
            modules = CXL_MODULES if cxl else ()
        archive = _steps_archive(steps, files or {}, modules, stop_on_failure)
        with tempfile.TemporaryDirectory(prefix="pmemkit-guest-") as name:
            scratch = Path(name)
            with (scratch / "initramfs").open("wb") as initramfs:
                parts = [self.directory / "initramfs.cpio", *(layers() if python else ())]
                initramfs.writelines(part.read_bytes() for part in parts)
                initramfs.write(archive)
            command = [
                *self._qemu(scratch),
                *("-append", f"{_ARGUMENTS} {kernel_arguments}"),
                *machine.arguments(),
                *qemu_arguments,
            ]
            environment = {**os.environ, **self.qemu.environment}
            limits = (timeout_seconds, step_timeout_seconds)
            why = _boot(command, environment, scratch, limits, power_fails)
            result = parse_frames(_read(scratch / "results"), list(steps))
            result.console = _read(scratch / "console").decode("utf-8", "replace").replace("\r", "")
        if why == _POWER_FAILED:
            return result
        if why is None and not result.powered_off:
            why = "the guest died"
        if why is not None:
            during = f" during step {result.running}" if result.running else ""
            raise GuestFailedError(why + during, result)
        return result

    def _qemu(self, scratch: Path) -> list[str]:
        # A test that is killed takes its guest with it.
        bound = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
        return [
            *(*bound, *self.qemu.command, "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-display", "none"),
            *("-kernel", str(self.directory / "kernel"), "-initrd", str(scratch / "initramfs")),
            *("-serial", f"file:{scratch / 'console'}", "-device", "virtio-serial-pci"),
            *("-chardev", f"file,id=results,path={scratch / 'results'}"),
            *("-device", "virtserialport,chardev=results,name=results"),
        ]


def _boot(
    command: Sequence[str],
    environment: Mapping[str, str],
    scratch: Path,
    limits: tuple[float, float | None],
    power_fails: Callable[[], bool] | None,
) -> str | None:
    """Runs QEMU to its end; why that was not a good one, or ``None``."""
    timeout_seconds, step_seconds = limits
    started = progressed = time.monotonic()
    seen = 0
    with (scratch / "qemu").open("wb") as said:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment
            )
        except OSError as failure:
            raise GuestUnavailableError(str(failure)) from failure
        try:
            while process.poll() is None:
                now, size = time.monotonic(), _size(scratch / "results")
                if size != seen:
                    seen, progressed = size, now
                if now - started > timeout_seconds:
                    return f"the guest did not end within {timeout_seconds:g} seconds"
                if step_seconds is not None and seen and now - progressed > step_seconds:
                    return f"nothing happened for {step_seconds:g} seconds"
                if power_fails is not None and power_fails():
                    return _POWER_FAILED
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        text = _read(scratch / "qemu").decode("utf-8", "replace").strip()
        return f"QEMU ended with {process.returncode}: {text}"
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


# --- the command line ----------------------------------------------------------------------------


def _as_json(result: Result) -> str:
    def step(value: StepResult) -> dict[str, Any]:
        return {**asdict(value), "stdout": value.text, "stderr": value.errors}

    plain = {
        "powered_off": result.powered_off,
        "steps": {name: step(value) for name, value in result.steps.items()},
        "messages": result.messages,
        "console": result.console,
    }
    return json.dumps(plain, indent=2)


def _print(result: Result, as_json: bool, with_console: bool) -> int:
    if as_json:
        print(_as_json(result))
    else:
        if with_console:
            print(result.console, file=sys.stderr)
        for step in result.steps.values():
            sys.stdout.flush()
            sys.stdout.buffer.write(step.stdout)
            sys.stdout.buffer.flush()
            sys.stderr.buffer.write(step.stderr)
    statuses = [step.status for step in result.steps.values() if step.status != 0]
    return (statuses[0] or 1) if statuses else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A Linux guest with NVDIMMs made of image files.")
    parser.add_argument("--kernel", help=f"kernel package or .deb (also {KERNEL_VARIABLE})")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build the guest unless it is there, and print where")
    run = commands.add_parser("run", help="boot on images, run a command, print its output")
    run.add_argument(
        "--dimm",
        action="append",
        default=[],
        metavar="IMAGE[,OPTION=VALUE]…",
        help="size, label-size (a size, 0 or auto), align (a size or none), slot, uuid, "
        "unarmed, readonly, node",
    )
    run.add_argument(
        "--cxl",
        action="append",
        default=[],
        metavar="[volatile=PATH|SIZE][,persistent=PATH,lsa=PATH][,serial=N]",
        help="a CXL device; the guest then has a newer kernel and QEMU",
    )
    run.add_argument(
        "--nodes",
        default="",
        metavar="SIZE[,SIZE]…",
        help="ordinary memory of each NUMA node, instead of --memory; 0 is none",
    )
    run.add_argument("--python", action="store_true", help="with python3 and pmem in the guest")
    run.add_argument("--images", default="", help="dimms with no options: PATH[,PATH]…")
    run.add_argument("--label-size", default="auto", help="of --images: a size, 0 or auto")
    run.add_argument("--memory", default="1G")
    run.add_argument("--cpus", type=int, default=1)
    run.add_argument("--append", default="", help="more kernel arguments")
    run.add_argument("--timeout", type=float, default=90, metavar="SECONDS")
    run.add_argument(
        "--script", type=Path, action="append", default=[], help="run a file's content"
    )
    run.add_argument("--stop-on-failure", action="store_true", help="run no step after a failure")
    run.add_argument("--json", action="store_true", help="everything that came out, as JSON")
    run.add_argument("--console", action="store_true", help="show the console on stderr")
    run.add_argument("words", nargs="*", metavar="COMMAND", help="a shell command, after --")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the commands of the module's head; the exit status is the step's."""
    options = _options(arguments)
    try:
        cxl = [CxlDevice.parse(text) for text in getattr(options, "cxl", ())]
        guest = Guest.build(options.kernel, cxl=bool(cxl))
        if options.command == "build":
            print(guest.directory)
            return 0
        steps = {str(path): path.read_text(encoding="utf-8") for path in options.script}
        if options.words:
            steps["command"] = " ".join(options.words)
        plain = (f"{path},label-size={options.label_size}" for path in options.images.split(","))
        dimms = [*options.dimm, *(plain if options.images else ())]
        result = guest.run(
            [Dimm.parse(text) for text in dimms],
            steps,
            timeout_seconds=options.timeout,
            memory=options.memory,
            cpus=options.cpus,
            nodes=options.nodes.split(",") if options.nodes else (),
            cxl=cxl,
            python=options.python,
            kernel_arguments=options.append,
            stop_on_failure=options.stop_on_failure,
        )
        return _print(result, options.json, options.console)
    except GuestFailedError as failure:
        _print(failure.result, options.json, False)
        print(f"guest: {failure}", file=sys.stderr)
    except (GuestError, OSError, ValueError) as failure:
        print(f"guest: {failure}", file=sys.stderr)
    return 125


if __name__ == "__main__":
    sys.exit(main())
