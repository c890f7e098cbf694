"""Policy on the live machine: a survey of it, and every verb with its reverse.

The programs that the field maintains do the work: ndctl, daxctl, cxl, mkfs and mount. sysfs is
read for everything and written where they cannot.

Invariants:
1. Without root nothing is begun.
2. Names, paths and options are checked before a program sees them; there is no shell.
3. A step that fails has put back what it had changed, or says what it could not.

What this does not do: plan or journal (:mod:`pmemkit.policy.apply` does), or install programs.
"""

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pmemkit.bus.declarations import load_declarations
from pmemkit.bus.programs import Run, run_program, write_attribute
from pmemkit.errors import InvalidArgument, NotSupported, SystemFailure
from pmemkit.policy import kernel_cxl, kernel_files, kernel_memory, kernel_namespaces
from pmemkit.policy.kernel_live import OFFLINE_SECONDS, Live, Made
from pmemkit.policy.kernel_survey import survey
from pmemkit.policy.model import Entry, Keep, MachineState, Step, Verb

__all__ = ["KernelActions"]

_Perform = Callable[[Live, Step, Keep, Made], dict[str, Any]]
_Reverse = Callable[[Live, Entry, bool], str]

_VERBS: Final[dict[Verb, tuple[_Perform, _Reverse]]] = {
    "create-cxl-region": (kernel_cxl.create_region, kernel_cxl.reverse_create_region),
    "destroy-cxl-region": (kernel_cxl.destroy_region, kernel_cxl.reverse_destroy_region),
    "init-labels": (kernel_namespaces.init_labels, kernel_namespaces.reverse_init),
    "create-namespace": (kernel_namespaces.create_namespace, kernel_namespaces.reverse_create),
    "destroy-namespace": (kernel_namespaces.destroy_namespace, kernel_namespaces.bring_back),
    "reconfigure-namespace": (
        kernel_namespaces.reconfigure_namespace,
        kernel_namespaces.bring_back,
    ),
    "enable-namespace": (kernel_namespaces.enable_namespace, kernel_namespaces.reverse_enable),
    "reconfigure-device": (kernel_memory.reconfigure_device, kernel_memory.reverse_device),
    "online-memory": (kernel_memory.online_memory, kernel_memory.reverse_memory),
    "offline-memory": (kernel_memory.offline_memory, kernel_memory.reverse_memory),
    "mkfs": (kernel_files.make_filesystem, kernel_files.reverse_make),
    "mount": (kernel_files.mount, kernel_files.reverse_mount),
    "umount": (kernel_files.umount, kernel_files.reverse_umount),
}


class KernelActions:
    """The running machine as an :class:`~pmemkit.policy.model.Actions`."""

    def __init__(
        self,
        *,
        sysfs: str | Path = "/sys",
        proc: str | Path = "/proc",
        dev: str | Path = "/dev",
        runtime: str | Path = "/run/pmemkit",
        run: Run = run_program,
        write: Callable[[Path, str, float], None] = write_attribute,
        progress: Callable[[str], None] | None = None,
        offline_seconds: float = OFFLINE_SECONDS,
        declarations: str | None = None,
    ) -> None:
        """``declarations`` is a machine file with what the owner knows of the dimms; by default
        ``/etc/pmemkit/machine.toml`` where there is one. ``progress`` gets sentences."""
        self._live = Live(
            sysfs=Path(sysfs),
            proc=Path(proc),
            dev=Path(dev),
            runtime=Path(runtime),
            run=run,
            write=write,
            offline_seconds=offline_seconds,
        )
        if progress is not None:
            self._live.progress = progress
        self._declarations = declarations

    def observe(self) -> MachineState:
        """The machine as it is now."""
        live = self._live
        declared = load_declarations(self._declarations)
        return survey(live.sysfs, live.proc, live.dev, declared, live.run)

    def perform(
        self, step: Step, keep: Keep, made: Mapping[int, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Carries a step out; see :class:`~pmemkit.policy.model.Actions`."""
        perform, _ = _functions(step)
        _require_root()
        kernel_memory.restore_auto_online(self._live)
        return perform(self._live, step, keep, made)

    def reverse(self, entry: Entry, *, force: bool = False) -> str:
        """Takes a step back; see :class:`~pmemkit.policy.model.Actions`."""
        _, reverse = _functions(entry.step)
        _require_root()
        kernel_memory.restore_auto_online(self._live)
        return reverse(self._live, entry, force)


def _functions(step: Step) -> tuple[_Perform, _Reverse]:
    found = _VERBS.get(step.verb)
    if found is None:
        raise NotSupported(f"{step.verb} is nothing that can be done here", op="apply")
    if step.target.startswith("@") and not step.target[1:].isdecimal():
        raise InvalidArgument(f"{step.target!r} is no target", op=step.verb)
    return found


def _require_root() -> None:
    if os.geteuid() != 0:
        text = "changing the machine needs root; planning does not"
        raise SystemFailure(text, errno=errno.EPERM, op="apply")
