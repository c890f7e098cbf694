"""The verbs of namespaces on the live machine, by ndctl, and their reverses.

What a step replaces is kept first: the label areas of the dimms, the 8 KiB at the start of the
namespace where info blocks are, and checksums of samples of its contents. Taking a step back puts
the label and the info block back; the contents are then as they were if nobody wrote since, which
the samples tell: the whole first MiB, the end, where a sector namespace logs every write, and pages
in between. Where all of these were zeros the namespace was blank: then there are no contents to
bring back, and only what was put there since may be lost.

Invariants:
1. Nothing that is mounted, held or open is disabled, reconfigured or destroyed.
2. A region that was disabled for a step is enabled again on every way out of it.
3. Only the labels of the namespace in question are put back; those of others stay as they are, and
   space that another namespace took since is not taken from it.

What this does not do: keep contents. What was written over is gone, and the error says so. Nor does
it put labels back while another namespace of the region is in use: the kernel reads labels when a
region is enabled, so all of it has to be disabled for a moment.
"""

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

from pmemkit.bus.kernel import kernel_bus
from pmemkit.bus.model import Namespace
from pmemkit.bus.sysfs import Node
from pmemkit.errors import Busy, Corrupt, InvalidArgument, NotSupported, PmemError, SystemFailure
from pmemkit.formats.labels import Label, apply, read_area
from pmemkit.policy.kernel_leftovers import put_back, wipe, wipe_again
from pmemkit.policy.kernel_live import Live, Made, failure_of_write
from pmemkit.policy.kernel_names import range_of
from pmemkit.policy.model import Entry, Keep, Step
from pmemkit.units import format_size

__all__ = [
    "bring_back",
    "create_namespace",
    "destroy_namespace",
    "enable_namespace",
    "facts_of",
    "init_labels",
    "reconfigure_namespace",
    "reverse_create",
    "reverse_enable",
    "reverse_init",
    "touched",
]

_INFO_SIZE: Final = 8 << 10
_HEAD_SIZE: Final = 1 << 20
_TAIL_SIZE: Final = 64 << 10
_SAMPLES: Final = 2048
"""More than one for each page map, map of a BTT, and journal of a file system."""
_PAGE: Final = 4 << 10
_MODES: Final = ("raw", "sector", "fsdax", "devdax")


# --- making --------------------------------------------------------------------------------------


def create_namespace(live: Live, step: Step, keep: Keep, _made: Made) -> dict[str, Any]:
    """``ndctl create-namespace`` with a uuid of our choice, by which it is found again."""
    live.region(step.target)
    before = live.namespaces(step.target)
    wanted = step.params
    name = wanted.get("name")
    for each in before.values():
        same = bool(name) and (each.name, each.mode) == (name, wanted["mode"])
        if same and _raw_size(live, each.dev) == wanted.get("size"):
            return facts_of(live, each.dev)
    uuid = str(uuid4())
    keep({"uuid": uuid, "before": sorted(before)})
    words = ["ndctl", "create-namespace", "--region", step.target, "--no-autolabel"]
    words += _shape_words(wanted, uuid)
    if wanted.get("size") is not None:
        words += ["--size", str(int(wanted["size"]))]
    try:
        live.tool(*words, timeout_seconds=300)
        found = _find(live, step.target, uuid, set(before))
        _require_size(live, found, wanted.get("size"))
    except PmemError:
        _remove_new(live, step.target, set(before))
        raise
    wipe(live, found, keep)
    return facts_of(live, found)


def _shape_words(wanted: Mapping[str, Any], uuid: str) -> list[str]:
    mode = wanted["mode"]
    if mode not in _MODES:
        raise InvalidArgument(f"{mode!r} is no mode of a namespace")
    words = ["--mode", mode, "--uuid", uuid]
    if wanted.get("name"):
        words += ["--name", _plain_name(wanted["name"])]
    if mode == "sector" and wanted.get("sector_size"):
        words += ["--sector-size", str(int(wanted["sector_size"]))]
    if mode in ("fsdax", "devdax"):
        words += ["--map", str(wanted["map"])] if wanted.get("map") in ("mem", "dev") else []
        words += ["--align", str(int(wanted["align"]))] if wanted.get("align") else []
    return words


def _plain_name(name: object) -> str:
    text = str(name)
    if not text.isprintable() or text.startswith("-") or not 0 < len(text.encode()) < 64:
        raise InvalidArgument(f"{text[:80]!r} is no name for a namespace: 1 to 63 printable bytes")
    return text


def _find(live: Live, region: str, uuid: str, before: set[str]) -> str:
    """The namespace with this uuid, or else the only new one."""
    here = live.namespaces(region)
    for each in here.values():
        if uuid in (each.uuid, each.raw_uuid):
            return each.dev
    new = sorted(set(here) - before)
    if len(new) != 1:
        raise SystemFailure(f"ndctl made a namespace in {region}, but it cannot be found")
    return new[0]


def _require_size(live: Live, dev: str, size: int | None) -> None:
    found = _raw_size(live, dev)
    if size is not None and found != size:
        text = f"{dev} has {found} bytes where {size} were asked for"
        raise SystemFailure(text, op="create-namespace")


def _raw_size(live: Live, dev: str) -> int:
    return live.namespace_node(dev).size("size")


def _remove_new(
    live: Live, region: str, before: set[str], kept: Mapping[str, Any] | None = None
) -> list[str]:
    """Takes away what a failed or interrupted creation left."""
    removed = []
    found = live.namespaces(region)
    for dev in sorted(set(found) - before):
        put_back(live, found[dev], kept or {})
        live.tool("ndctl", "destroy-namespace", "--force", dev)
        removed.append(dev)
    return removed


def facts_of(live: Live, dev: str) -> dict[str, Any]:
    """What later steps and the reverse need to know of a namespace that was made."""
    here = live.namespace(dev)
    facts: dict[str, Any] = {
        "dev": dev,
        "uuid": here.uuid or here.raw_uuid,
        "raw_uuid": here.raw_uuid,
        "blockdev": here.blockdev,
        "chardev": here.chardev,
        "range": range_of(live, dev),
    }
    if here.blockdev is not None:
        facts["head"] = _head_sum(live.dev / here.blockdev)
    return {name: value for name, value in facts.items() if value is not None}


def _head_sum(device: Path) -> str:
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return hashlib.sha256(os.pread(descriptor, _HEAD_SIZE, 0)).hexdigest()
    except OSError as failure:
        return f"unreadable: {failure.strerror}"
    finally:
        os.close(descriptor)


def touched(live: Live, made: Mapping[str, Any]) -> str | None:
    """Why a namespace is no longer as it was made; ``None``: its start is unchanged."""
    device = made.get("blockdev")
    if device is None or "head" not in made:
        return None
    if _head_sum(live.dev / device) != made["head"]:
        return f"something was written to {made['dev']} since it was made"
    return None


def reverse_create(live: Live, entry: Entry, force: bool) -> str:
    """Destroys the namespace that was made."""
    region = entry.step.target
    if "uuid" not in entry.kept and "dev" not in entry.made:
        return f"no namespace was made in {region}"
    known = set(live.namespaces(region))
    if entry.state == "started":
        before = set(entry.kept.get("before", known))
        removed = _remove_new(live, region, before, entry.kept)
        gone = ", ".join(removed)
        return f"{gone} is destroyed again" if removed else f"no namespace was made in {region}"
    uuid = entry.made.get("uuid")
    here = next((e for e in live.namespaces(region).values() if uuid in (e.uuid, e.raw_uuid)), None)
    if here is None:
        return f"the namespace made in {region} is gone already"
    live.require_unused(here, "destroyed")
    facts = {**entry.made, "dev": here.dev, "blockdev": here.blockdev}
    why = touched(live, facts)
    if why is not None and not force:
        raise Corrupt(f"{why}; destroying it loses that", op="undo")
    put_back(live, here, entry.kept)
    live.tool("ndctl", "destroy-namespace", "--force", here.dev)
    return f"{here.dev} is destroyed again"


# --- labels --------------------------------------------------------------------------------------


def init_labels(live: Live, step: Step, keep: Keep, _made: Made) -> dict[str, Any]:
    """``ndctl init-labels``, with the region disabled meanwhile."""
    node = live.region(step.target)
    if node.number("nstype") == 5:
        return {}
    dimms = _dimms(node)
    if not dimms:
        raise NotSupported(f"{step.target} has no dimms, so it has no labels", op="init-labels")
    areas = {dimm: _read_labels(live, dimm) for dimm in dimms}
    for dimm, area in areas.items():
        if read_area(area).labels:
            text = f"{dimm} has labels, which the kernel does not use; nothing is written over them"
            raise InvalidArgument(text, op="init-labels")
    keep({"labels": areas})
    with _disabled(live, dimms):
        for dimm in dimms:
            live.run(["ndctl", "init-labels", "--force", dimm], timeout_seconds=60, given=b"")
    if live.region(step.target).number("nstype") != 5:
        raise SystemFailure(f"{step.target} has no labels although they were initialised")
    return {"dimms": dimms}


def reverse_init(live: Live, entry: Entry, _force: bool) -> str:
    """Puts the label areas back as they were, if no namespace was made meanwhile."""
    areas: Mapping[str, bytes] = entry.kept.get("labels", {})
    changed = [dimm for dimm, area in areas.items() if _read_labels(live, dimm) != area]
    if not changed:
        return f"the label areas of {entry.step.target} are as they were"
    for dimm in changed:
        labels = read_area(_read_labels(live, dimm)).labels
        if labels:
            text = f"{dimm} has {len(labels)} labels by now; destroy their namespaces first"
            raise Busy(text, op="undo")
    with _disabled(live, list(areas)):
        for dimm in changed:
            _write_labels(live, dimm, areas[dimm])
    text = f"the label areas of {entry.step.target} are as they were"
    if live.region(entry.step.target).number("nstype") == 5:
        return f"{text}; the kernel takes it for a region without labels from the next boot on"
    return text


def _dimms(region: Node) -> list[str]:
    count = min(region.number("mappings") or 0, 64)
    texts = [region.text(f"mapping{index}") or "" for index in range(count)]
    names = [text.split(",")[0] for text in texts]
    return [name for name in dict.fromkeys(names) if name.startswith("nmem")]


def _read_labels(live: Live, dimm: str) -> bytes:
    words = ["ndctl", "read-labels", live.name_of("nmem", dimm)]
    return live.run(words, timeout_seconds=60, given=b"")


def _write_labels(live: Live, dimm: str, area: bytes) -> None:
    words = ["ndctl", "write-labels", live.name_of("nmem", dimm)]
    live.run(words, timeout_seconds=60, given=area)


@contextmanager
def _disabled(live: Live, dimms: list[str]) -> Iterator[None]:
    """With every region that uses one of the dimms disabled. Raises :class:`Busy` before that if
    one of their namespaces is in use."""
    wanted = set(dimms)
    regions = [
        region
        for bus in kernel_bus(live.sysfs)
        for region in bus.regions
        if wanted & {mapping.dimm for mapping in region.mappings}
    ]
    for region in regions:
        for namespace in region.namespaces:
            live.require_unused(namespace, "disabled")
    enabled = [region.dev for region in regions if region.state is None]
    try:
        for dev in enabled:
            live.run(["ndctl", "disable-region", dev], timeout_seconds=60, given=b"")
        yield
    finally:
        for dev in enabled:
            live.run(["ndctl", "enable-region", dev], timeout_seconds=60, given=b"")


# --- destroying and reconfiguring ----------------------------------------------------------------


def destroy_namespace(live: Live, step: Step, keep: Keep, _made: Made) -> dict[str, Any]:
    """``ndctl destroy-namespace``, of one that nobody uses."""
    live.name_of("namespace", step.target)
    number = step.target.removeprefix("namespace").split(".")[0]
    here = live.namespaces(f"region{number}").get(step.target)
    if here is None:
        return {}
    _require_uuid(here, step)
    live.require_unused(here, "destroyed")
    _keep_namespace(live, here, keep)
    try:
        live.tool("ndctl", "destroy-namespace", "--force", here.dev)
    except PmemError:
        _enable_again(live, here)
        raise
    return {"region": f"region{number}"}


def reconfigure_namespace(live: Live, step: Step, keep: Keep, _made: Made) -> dict[str, Any]:
    """``ndctl create-namespace --reconfig``: another mode in the same place."""
    here = live.namespace(step.target)
    _require_uuid(here, step)
    live.require_unused(here, "reconfigured")
    _keep_namespace(live, here, keep)
    uuid = str(uuid4())
    keep({"new_uuid": uuid})
    region = _region_of(here.dev)
    before = set(live.namespaces(region)) - {here.dev}
    words = ["ndctl", "create-namespace", "--force", "--reconfig", here.dev, "--no-autolabel"]
    try:
        live.tool(*words, *_shape_words(step.params, uuid), timeout_seconds=300)
    except PmemError:
        _enable_again(live, here)
        raise
    found = _find(live, region, uuid, before)
    wipe(live, found, keep)
    return facts_of(live, found)


def _require_uuid(here: Namespace, step: Step) -> None:
    """Names are given anew at each boot; the uuid says whether it is still the same one."""
    wanted = step.params.get("uuid")
    if wanted and wanted not in (here.uuid, here.raw_uuid):
        text = f"{here.dev} has the uuid {here.uuid}, not {wanted}: it is another one by now"
        raise InvalidArgument(text, op=step.verb)


def _enable_again(live: Live, here: Namespace) -> None:
    """After a failure: as it was, or as near to it as the kernel allows."""
    if here.state is None and here.dev in live.namespaces(_region_of(here.dev)):
        live.tool("ndctl", "enable-namespace", here.dev)


def _region_of(namespace: str) -> str:
    return f"region{namespace.removeprefix('namespace').split('.')[0]}"


def _keep_namespace(live: Live, here: Namespace, keep: Keep) -> None:
    """Keeps what brings a namespace back."""
    node = live.namespace_node(here.dev)
    holder = _holder_of(node)
    start = _data_start(node, holder, here.mode)
    size = node.size("size")
    region = live.region(_region_of(here.dev))
    labels = {}
    if region.number("nstype") == 5:
        labels = {dimm: _read_labels(live, dimm) for dimm in _dimms(region)}
    with _raw_device(live, here.dev) as device:
        info = _read(device, 0, min(_INFO_SIZE, size))
        sums, blank = _samples(device, start, size)
    keep(
        {
            "dev": here.dev,
            "mode": here.mode,
            "class": node.text("holder_class") or "",
            "raw_uuid": here.raw_uuid or here.uuid,
            "enabled": here.state is None,
            "size": size,
            "range": range_of(live, here.dev),
            "start": start,
            "labels": labels,
            "info": info,
            "samples": sums,
            "blank": blank and (holder.name != "" or not any(info)),
        }
    )


def _holder_of(node: Node) -> Node:
    """What has claimed a namespace; a node without attributes where nothing has."""
    name = node.text("holder") or ""
    known = re.fullmatch(r"(btt|pfn|dax)\d{1,9}\.\d{1,9}", name)
    return Node(name, node.place.parent / name if known else node.place / "nothing")


def _data_start(node: Node, holder: Node, mode: str) -> int:
    """Where what is not kept begins: behind the page map of one that has it, else behind what is
    kept as the info block, which in a raw one is contents."""
    if mode in ("fsdax", "devdax"):
        first, data = node.number("resource"), holder.number("resource")
        if first is not None and data is not None and 0 <= data - first < node.size("size"):
            return data - first
    return _INFO_SIZE


@contextmanager
def _raw_device(live: Live, dev: str) -> Iterator[Path]:
    """The namespace as a plain block device without regard to its mode; disabled afterwards."""
    node = live.namespace_node(dev)
    live.run(["ndctl", "disable-namespace", dev], timeout_seconds=60, given=b"")
    live.put(node.place / "force_raw", "1", f"{dev} as raw")
    try:
        live.run(["ndctl", "enable-namespace", dev], timeout_seconds=60, given=b"")
        disk = live.wait_for(
            lambda: node.below("block") and Node("block", node.place / "block").below(".*")
        )
        if not disk:
            raise SystemFailure(f"{dev} has no block device although it is enabled as raw")
        path = live.dev / disk[0].name
        live.wait_for(path.exists)
        yield path
    finally:
        live.run(["ndctl", "disable-namespace", dev], timeout_seconds=60, given=b"")
        live.put(node.place / "force_raw", "0", f"{dev} as what it is")


def _read(device: Path, offset: int, length: int) -> bytes:
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def _samples(device: Path, start: int, size: int) -> tuple[str, bool]:
    """A checksum of what tells whether contents changed, and whether all of that is zeros."""
    whole, blank = hashlib.sha256(), True
    step = max(_PAGE, (size - start) // _SAMPLES // _PAGE * _PAGE)
    places = [(start, _HEAD_SIZE), *((offset, _PAGE) for offset in range(start, size, step))]
    places.append((max(start, size - _TAIL_SIZE), _TAIL_SIZE))
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset, length in places:
            try:
                data = os.pread(descriptor, min(length, size - offset), offset)
            except OSError as failure:
                data = f"unreadable: {failure.errno}".encode()
            whole.update(data)
            blank = blank and not any(data)
    finally:
        os.close(descriptor)
    return whole.hexdigest(), blank


# --- bringing back -------------------------------------------------------------------------------


def bring_back(live: Live, entry: Entry, force: bool) -> str:
    """Puts a namespace back that was destroyed or reconfigured, with its contents where nothing was
    written since, and with ``force`` without them."""
    kept = entry.kept
    if "info" not in kept:
        _enable_if_there(live, entry.step.target)
        return f"{entry.step.target} was not touched"
    region = _region_of(kept["dev"])
    blank = bool(kept.get("blank"))
    made = _made_of(live, region, entry)
    if made is not None and blank and not force:
        _require_untouched(live, made, entry)
    restored = made is not None and put_back(live, made, kept)
    labels: Mapping[str, bytes] = kept.get("labels", {})
    before = {dimm: _read_labels(live, dimm) for dimm in labels}
    areas = {dimm: _with_label(live, entry, dimm, before[dimm]) for dimm in labels}
    changed = {dimm: area for dimm, area in areas.items() if area != before[dimm]}
    _write_all(live, changed)
    dev = _named(live, region, kept)
    present = live.namespace(dev)
    live.require_unused(present, "put back")
    why = _put_back(live, dev, kept, blank or (force and kept["mode"] != "raw"))
    if why is not None and not (force or blank):
        _write_all(live, {dimm: before[dimm] for dimm in changed})
        if not changed:
            _enable_if_there(live, dev)
        if restored and (made := _made_of(live, region, entry)) is not None:
            wipe_again(live, made, kept)
        raise Corrupt(why, op="undo")
    if not labels:
        _set_class(live, dev, str(kept.get("class", "")))
    if kept["enabled"]:
        live.tool("ndctl", "enable-namespace", dev)
    if why is None:
        return f"{dev} is back as {kept['mode']}, with its contents"
    if blank:
        return f"{dev} is back as {kept['mode']}, which was blank"
    return f"{dev} is back as {kept['mode']}, without its contents: {why}"


def _made_of(live: Live, region: str, entry: Entry) -> Namespace | None:
    """What a step has made of the namespace that is to come back, if it is there."""
    found = live.namespaces(region)
    uuid = entry.made.get("uuid") or entry.kept.get("new_uuid")
    here = next((e for e in found.values() if uuid and uuid in (e.uuid, e.raw_uuid)), None)
    if here is None and not entry.kept["labels"]:
        return found.get(str(entry.made.get("dev")))
    return here


def _require_untouched(live: Live, here: Namespace, entry: Entry) -> None:
    """Raises :class:`Corrupt` where something was written to what a step made of a blank one."""
    lost = touched(live, {**entry.made, "dev": here.dev, "blockdev": here.blockdev})
    if lost is not None:
        raise Corrupt(f"{lost}; taking that back loses it", op="undo")


def _set_class(live: Live, dev: str, name: str) -> None:
    """Has the kernel forget what ndctl told it that a label-less namespace had become."""
    node = live.namespace_node(dev)
    try:
        # Nothing is a new line.
        live.write(node.place / "holder_class", name or "\n", 60)
    except OSError as failure:
        # It is set first, and then there is no label to write it to.
        if failure.errno != errno.ENXIO or (node.text("holder_class") or "") != name:
            raise failure_of_write(failure, f"{dev} as {name or 'raw'}") from failure


def _enable_if_there(live: Live, dev: str) -> None:
    here = live.namespaces(_region_of(dev)).get(dev)
    if here is not None and here.state is not None:
        live.tool("ndctl", "enable-namespace", dev)


def _write_all(live: Live, areas: Mapping[str, bytes]) -> None:
    if not areas:
        return
    with _disabled(live, list(areas)):
        for dimm, area in areas.items():
            _write_labels(live, dimm, area)


def _with_label(live: Live, entry: Entry, dimm: str, area: bytes) -> bytes:
    """The label area as it is, with the label of the namespace in it as it was."""
    kept = entry.kept
    uuid = UUID(kept["raw_uuid"])
    wanted = [label for label in read_area(kept["labels"][dimm]).labels if label.uuid == uuid]
    current = read_area(area)
    if current.current is None:
        raise Corrupt(f"{dimm} has no label index any more; nothing was written", op="undo")
    if all(any(_same(each, label) for each in current.labels) for label in wanted):
        return area
    ours = []
    for each in current.labels:
        inside = [label for label in wanted if _overlap(each, label)]
        if not inside:
            continue
        if entry.step.verb != "reconfigure-namespace" or not _same_place(each, inside[0]):
            text = f"the namespace with the uuid {each.uuid} has taken its space on {dimm} since"
            raise Corrupt(f"{text}; destroy that first", op="undo")
        ours.append(each.slot)
    return apply(area, current.update(add=wanted, remove=ours))


def _same(one: Label, other: Label) -> bool:
    fields = ("uuid", "name", "flags", "dpa", "rawsize", "lbasize", "position", "isetcookie")
    guid = getattr(one, "abstraction_guid", None) == getattr(other, "abstraction_guid", None)
    return guid and all(getattr(one, name) == getattr(other, name) for name in fields)


def _same_place(one: Label, other: Label) -> bool:
    return (one.dpa, one.rawsize) == (other.dpa, other.rawsize)


def _overlap(one: Label, other: Label) -> bool:
    return one.dpa < other.dpa + other.rawsize and other.dpa < one.dpa + one.rawsize


def _named(live: Live, region: str, kept: Mapping[str, Any]) -> str:
    """Its name now; the kernel may have given it another number."""
    here = live.namespaces(region)
    if not kept.get("labels"):
        return str(kept["dev"])
    for dev in here:
        node = live.namespace_node(dev)
        if node.text("uuid") == kept["raw_uuid"]:
            return dev
    text = f"the label of {kept['dev']} is back, but the kernel shows no such namespace"
    raise SystemFailure(text, op="undo")


def _put_back(live: Live, dev: str, kept: Mapping[str, Any], anyhow: bool) -> str | None:
    """Writes the info block, which in a raw namespace is contents, if the contents are as they
    were, or ``anyhow``. Says why they are not."""
    why = None
    if "overwritten" in kept:
        why = f"{kept['overwritten']}, so its contents cannot come back"
    with _raw_device(live, dev) as device:
        sums, _ = _samples(device, kept["start"], kept["size"])
        if why is None and sums != kept["samples"]:
            size = format_size(kept["size"])
            why = f"some of its {size} was written over since, so its contents cannot come back"
        info = kept["info"]
        if (why is None or anyhow) and _read(device, 0, len(info)) != info:
            _write(device, info)
    return why


def _write(device: Path, data: bytes) -> None:
    descriptor = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, data, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- enabling ------------------------------------------------------------------------------------


def enable_namespace(live: Live, step: Step, keep: Keep, _made: Made) -> dict[str, Any]:
    """``ndctl enable-namespace``."""
    here = live.namespace(step.target)
    keep({"enabled": here.state is None})
    if here.state is not None:
        live.tool("ndctl", "enable-namespace", here.dev)
    return facts_of(live, here.dev)


def reverse_enable(live: Live, entry: Entry, _force: bool) -> str:
    """Disables it again, if it was."""
    dev = entry.step.target
    here = live.namespaces(_region_of(dev)).get(dev)
    if entry.kept.get("enabled", True) or here is None or here.state is not None:
        return f"{dev} is as it was"
    live.require_unused(here, "disabled")
    live.run(["ndctl", "disable-namespace", dev], timeout_seconds=60, given=b"")
    return f"{dev} is disabled again"
