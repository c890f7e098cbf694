"""DAX devices as system RAM and back, block by block, with an end to the time it may take.

The kernel may online new memory by itself, into a zone from which it cannot be taken away again;
then ``daxctl`` refuses, and devices that become memory by themselves can hardly be taken back. So
its policy is "offline" for the time of a step, every block is onlined as wanted, and the policy is
what it was afterwards. What it was is also in a file that lives as long as the policy does, until
the next boot: whoever comes after a process that died puts it back.

Invariants:
1. The kernel's own policy is as before on every way out of a step.
2. Blocks go offline within a bounded time, or those that already did go online again, in the zone
   where they were, and the error names who may hold the others.
3. A device that somebody has open, or mapped, does not become memory.

States of a device: devdax → system-ram with its blocks offline → some online → all online; back the
same way. A step that fails ends in the state that it began with.

What this does not do: end processes, or move their pages.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from pmemkit.bus.dax import DaxDevice, dax_device
from pmemkit.bus.holders import Holders, holders_of_node, hugetlb_of_node
from pmemkit.bus.memory import Block, auto_online
from pmemkit.errors import Busy, InvalidArgument, NotSupported, PmemError, SystemFailure
from pmemkit.policy.kernel_live import Live, Made, failure_of_write
from pmemkit.policy.kernel_names import range_of
from pmemkit.policy.model import Entry, Keep, Step
from pmemkit.units import format_size

__all__ = [
    "offline_memory",
    "online_memory",
    "quiet_auto_online",
    "reconfigure_device",
    "restore_auto_online",
    "reverse_device",
    "reverse_memory",
]

_Zone = Literal["movable", "kernel"]

_STATES: Final[dict[str, str]] = {"movable": "online_movable", "kernel": "online_kernel"}
_POLICIES: Final = ("offline", "online", "online_kernel", "online_movable")
_WRITE_SECONDS: Final = 15.0
"""How long one attempt at one block may take."""
_PAUSES: Final = (0.1, 0.5, 1.0, 2.0, 4.0)
"""Between the attempts, seconds."""
_NAMED: Final = 8
"""Candidates that an error names."""


# --- the kernel's own policy ---------------------------------------------------------------------


def _policy(live: Live) -> Path:
    return live.sysfs / "devices" / "system" / "memory" / "auto_online_blocks"


def _marker(live: Live) -> Path:
    return live.runtime / "auto_online_blocks"


def restore_auto_online(live: Live) -> str | None:
    """Puts back what a process that died had changed; says what it did."""
    try:
        was = _marker(live).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    if was in _POLICIES and auto_online(live.sysfs) == "offline":
        live.put(_policy(live), was, "the kernel's policy for new memory")
    _marker(live).unlink(missing_ok=True)
    return f"the kernel's policy for new memory is {was} again"


@contextmanager
def quiet_auto_online(live: Live) -> Iterator[None]:
    """With a kernel that leaves new memory blocks offline."""
    restore_auto_online(live)
    was = auto_online(live.sysfs)
    if was is None or was == "offline":
        yield
        return
    live.runtime.mkdir(mode=0o755, parents=True, exist_ok=True)
    _marker(live).write_text(was, encoding="ascii")
    try:
        live.put(_policy(live), "offline", "the kernel's policy for new memory")
        yield
    finally:
        restore_auto_online(live)


# --- devices -------------------------------------------------------------------------------------


def reconfigure_device(live: Live, step: Step, keep: Keep, made: Made) -> dict[str, Any]:
    """``daxctl reconfigure-device``, block by block."""
    device = _target(live, step, made)
    mode = step.params["mode"]
    blocks = device.blocks(live.sysfs)
    keep(
        {
            "device": device.dev,
            "mode": device.mode,
            "auto_online": auto_online(live.sysfs) or "",
            "online": {str(each.number): each.zone for each in blocks if each.online},
        }
    )
    if mode == "devdax":
        _to_devdax(live, device)
    elif mode == "system-ram":
        _to_memory(live, device, step.params.get("online") or "movable")
    else:
        raise InvalidArgument(f"{mode!r} is no mode of a DAX device: devdax or system-ram")
    facts: dict[str, Any] = {"dev": device.dev, "chardev": device.dev, "mode": mode}
    place = range_of(live, device.owner) if device.kind == "namespace" else None
    return facts | ({"range": place} if place is not None else {})


def _target(live: Live, step: Step, made: Made) -> DaxDevice:
    """The device of a step: named, or of what an earlier step made."""
    if not step.target.startswith("@"):
        return dax_device(step.target, live.sysfs)
    number = step.target[1:]
    facts = made.get(int(number)) if number.isdecimal() else None
    name = facts.get("chardev") if facts is not None else None
    if not isinstance(name, str):
        raise InvalidArgument(f"{step.target} made no DAX device", op=step.verb)
    return dax_device(name, live.sysfs)


def _require_closed(live: Live, device: DaxDevice) -> None:
    path = f"/dev/{device.dev}"
    users = Holders.look([path], live.sysfs, live.proc).of_path(path)
    if users:
        raise Busy(f"{device.dev} is in use by {', '.join(users)}", op="reconfigure-device")


def _to_memory(live: Live, device: DaxDevice, online: str) -> None:
    if online not in ("movable", "kernel", "no"):
        raise InvalidArgument(f"{online!r} is no way to online memory: movable, kernel or no")
    was = device.mode
    if was != "system-ram":
        _require_closed(live, device)
        if device.target_node is None:
            text = f"{device.dev} has no NUMA node of its own, so it cannot be system RAM"
            raise NotSupported(text, op="reconfigure-device")
    with quiet_auto_online(live):
        try:
            if was != "system-ram":
                _reconfigure(live, device.dev, "system-ram")
            blocks = dax_device(device.dev, live.sysfs).blocks(live.sysfs)
            if not blocks:
                text = f"{device.dev} is smaller than a memory block, or lies across two"
                raise NotSupported(text, op="reconfigure-device")
            _arrange(live, device.dev, blocks, {each.number: online for each in blocks})
        except PmemError:
            if was != "system-ram":
                _back(live, device.dev)
            raise


def _arrange(
    live: Live, dev: str, blocks: Sequence[Block], wanted: Mapping[int, str | None]
) -> None:
    """Has each block in the zone that is wanted for it, or offline. A block changes its zone only
    while it is offline."""
    wrong = [each for each in blocks if each.online and wanted.get(each.number) != each.zone]
    _offline(live, dax_device(dev, live.sysfs), wrong)
    offline = {each.number for each in blocks if not each.online} | {e.number for e in wrong}
    for zone in ("movable", "kernel"):
        here = [e for e in blocks if e.number in offline and wanted.get(e.number) == zone]
        try:
            _online(live, dev, here, "kernel" if zone == "kernel" else "movable")
        except PmemError:
            _online_as(live, dev, wrong)
            raise


def _reconfigure(live: Live, dev: str, mode: str) -> None:
    """By daxctl, which loads kmem; by the driver links for devices that no driver has, with which
    it does nothing."""
    words = ["daxctl", "reconfigure-device", "--mode", mode]
    words += ["--no-online"] if mode == "system-ram" else []
    live.tool(*words, dev, timeout_seconds=120)
    found = dax_device(dev, live.sysfs)
    if found.mode != mode:
        raise SystemFailure(f"{dev} is {found.mode} after daxctl made it {mode}", op=mode)


def _back(live: Live, dev: str) -> None:
    """After a failure on the way to memory: device DAX again."""
    device = dax_device(dev, live.sysfs)
    if device.mode == "system-ram":
        _offline(live, device)
        _reconfigure(live, dev, "devdax")


def _to_devdax(live: Live, device: DaxDevice) -> None:
    if device.mode == "devdax":
        return
    was = _offline(live, device) if device.mode == "system-ram" else []
    try:
        _reconfigure(live, device.dev, "devdax")
    except PmemError:
        _online_as(live, device.dev, was)
        raise


def reverse_device(live: Live, entry: Entry, _force: bool) -> str:
    """The mode that it had, and its blocks as they were."""
    restore_auto_online(live)
    kept = entry.kept
    if "device" not in kept:
        return f"{entry.step.target} was not touched"
    device = _still(live, str(kept["device"]))
    if device is None:
        return f"{kept['device']} is gone already"
    was: Mapping[str, str] = kept.get("online") or {}
    if kept["mode"] == "system-ram":
        zones = set(was.values())
        with quiet_auto_online(live):
            if device.mode != "system-ram":
                _require_closed(live, device)
                _reconfigure(live, device.dev, "system-ram")
            _settle_blocks(live, device.dev, was)
        where = f", {' and '.join(sorted(zones))}" if zones else ", offline"
        return f"{device.dev} is system RAM again{where}; its contents before are not memory's"
    if device.mode == "system-ram":
        _to_devdax(live, device)
        return f"{device.dev} is device DAX again; what was in it is lost"
    return f"{device.dev} is {device.mode}, as it was"


def _still(live: Live, dev: str) -> DaxDevice | None:
    try:
        return dax_device(dev, live.sysfs)
    except InvalidArgument:
        return None


# --- blocks --------------------------------------------------------------------------------------


def online_memory(live: Live, step: Step, keep: Keep, made: Made) -> dict[str, Any]:
    """Onlines every block that is offline, in the zone."""
    device = _memory_target(live, step, made)
    blocks = device.blocks(live.sysfs)
    keep(_blocks_facts(device, blocks))
    zone: _Zone = "kernel" if step.params.get("zone") == "kernel" else "movable"
    _online(live, device.dev, [each for each in blocks if not each.online], zone)
    return {"dev": device.dev}


def offline_memory(live: Live, step: Step, keep: Keep, made: Made) -> dict[str, Any]:
    """Offlines every block, or none."""
    device = _memory_target(live, step, made)
    keep(_blocks_facts(device, device.blocks(live.sysfs)))
    _offline(live, device)
    return {"dev": device.dev}


def _memory_target(live: Live, step: Step, made: Made) -> DaxDevice:
    device = _target(live, step, made)
    if device.mode != "system-ram":
        raise InvalidArgument(f"{device.dev} is {device.mode}, not system-ram", op=step.verb)
    return device


def _blocks_facts(device: DaxDevice, blocks: Sequence[Block]) -> dict[str, Any]:
    online = {str(each.number): each.zone for each in blocks if each.online}
    return {"device": device.dev, "online": online}


def reverse_memory(live: Live, entry: Entry, _force: bool) -> str:
    """Every block online or offline as it was."""
    if "device" not in entry.kept:
        return f"{entry.step.target} was not touched"
    device = _still(live, str(entry.kept["device"]))
    if device is None or device.mode != "system-ram":
        return f"{entry.kept['device']} is no memory any more"
    _settle_blocks(live, device.dev, entry.kept.get("online") or {})
    return f"the memory blocks of {device.dev} are online and offline as they were"


def _settle_blocks(live: Live, dev: str, was: Mapping[str, str]) -> None:
    blocks = dax_device(dev, live.sysfs).blocks(live.sysfs)
    _arrange(live, dev, blocks, {each.number: was.get(str(each.number)) for each in blocks})


def _online(live: Live, dev: str, blocks: Sequence[Block], zone: _Zone) -> None:
    """Onlines blocks that are offline; what it did before it fails is undone."""
    done: list[Block] = []
    for number, block in enumerate(blocks, start=1):
        try:
            live.write(block.place / "state", _STATES[zone], _WRITE_SECONDS)
        except OSError as failure:
            for each in done:
                live.put(each.place / "state", "offline", f"memory block {each.number}")
            what = f"memory block {block.number} of {dev} cannot be onlined ({zone})"
            raise failure_of_write(failure, what) from failure
        done.append(block)
        live.progress(f"{dev}: {number} of {len(blocks)} memory blocks online ({zone})")


def _online_as(live: Live, dev: str, blocks: Sequence[Block]) -> None:
    """Onlines blocks in the zones where they were."""
    for block in blocks:
        state = _STATES[block.zone or "movable"]
        try:
            live.write(block.place / "state", state, _WRITE_SECONDS)
        except OSError as failure:
            live.progress(f"{dev}: memory block {block.number} stays offline: {failure}")


def _offline(live: Live, device: DaxDevice, blocks: Sequence[Block] | None = None) -> list[Block]:
    """Offlines blocks, all that are online by default, and gives them as they were. Raises
    :class:`Busy`, and all are as they were, where that does not succeed in time."""
    if blocks is None:
        blocks = [each for each in device.blocks(live.sysfs) if each.online]
    started = live.clock()
    deadline = started + live.offline_seconds
    left, done = list(blocks), list[Block]()
    # The highest first: what is allocated first is usually at the low end.
    left.sort(key=lambda block: -block.number)
    for pause in (*_PAUSES, None):
        stuck = []
        for block in left:
            if _try_offline(live, block, deadline):
                done.append(block)
                live.progress(f"{device.dev}: {len(done)} of {len(blocks)} memory blocks offline")
            else:
                stuck.append(block)
        left = stuck
        if not left:
            return done
        if pause is None or live.clock() + pause >= deadline:
            break
        live.progress(f"{device.dev}: {len(left)} memory blocks are busy, trying again")
        live.sleep(pause)
    text = _who(live, device, blocks, left, live.clock() - started)
    _online_as(live, device.dev, done)
    raise Busy(text, op="offline")


def _try_offline(live: Live, block: Block, deadline: float) -> bool:
    seconds = min(_WRITE_SECONDS, deadline - live.clock())
    if seconds <= 0:
        return False
    try:
        live.write(block.place / "state", "offline", seconds)
    except OSError:
        # It may be offline all the same: the one who wrote was ended a moment too late.
        return _state(block) == "offline"
    return True


def _state(block: Block) -> str | None:
    try:
        return (block.place / "state").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def _who(
    live: Live,
    device: DaxDevice,
    blocks: Sequence[Block],
    left: Sequence[Block],
    seconds: float,
) -> str:
    """The sentence for memory that does not go: how much, why maybe, and who may hold it."""
    numbers = ", ".join(str(each.number) for each in left[:_NAMED])
    numbers += ", …" if len(left) > _NAMED else ""
    text = (
        f"{len(left)} of {len(blocks)} memory blocks of {device.dev} did not go offline in "
        f"{seconds:.0f} seconds ({numbers}); all blocks are as they were"
    )
    kernel = [each for each in left if each.zone == "kernel"]
    if kernel:
        text += (
            f". {len(kernel)} of them are in a zone of the kernel ({kernel[0].zones[0]}), where "
            "there may be what cannot be moved at all: it goes only with a reboot, after which "
            "the memory has to be onlined as movable"
        )
    candidates = _candidates(live, device)
    if candidates:
        return f"{text}. Who may hold them: {'; '.join(candidates)}"
    return f"{text}. No process has pages on its node; the kernel itself holds them"


def _candidates(live: Live, device: DaxDevice) -> list[str]:
    if device.target_node is None:
        return []
    node = device.target_node
    holders = holders_of_node(node, live.proc)
    # Who locked its memory is the likelier one.
    holders.sort(key=lambda holder: not holder.locked)
    found = [f"process {each}" for each in holders[:_NAMED]]
    huge = hugetlb_of_node(node, live.sysfs)
    if huge:
        found.append(f"{format_size(huge)} of huge pages on node {node}")
    return found + _tmpfs(live, node)


def _tmpfs(live: Live, node: int) -> list[str]:
    """Mounts of tmpfs whose memory policy names the node."""
    try:
        lines = (live.proc / "self" / "mountinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        words, _, rest = line.partition(" - ")
        policy = re.search(r"\bmpol=\w+(?:=\w+)?:([\d,-]+)", rest)
        if rest.startswith("tmpfs ") and policy and _names(policy[1], node):
            fields = words.split()
            found.append(f"the tmpfs on {fields[4] if len(fields) > 4 else '?'}")
    return found


def _names(nodes: str, node: int) -> bool:
    for part in nodes.split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and int(first) <= node <= int(last if last.isdecimal() else first):
            return True
    return False
