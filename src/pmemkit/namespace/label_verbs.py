"""The verbs on label areas: init, zero, read, write, check, and recookie.

Invariants:
1. At every moment of an init, zero or recookie a reader finds the labels that were there, or those
   that are to be (for init and zero: none).
2. Labels that hold namespaces are never dropped without ``force``.

What this does not do: choose what goes into a label (:mod:`pmemkit.namespace.create`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pmemkit.bus.image import ImageDimm
from pmemkit.errors import InvalidArgument, NoSpace
from pmemkit.formats import guids
from pmemkit.formats.labels import (
    IndexHeader,
    Label,
    LabelArea,
    LabelV2,
    erase,
    initialise,
    read_area,
)
from pmemkit.namespace.advice import require_sound
from pmemkit.namespace.images import Images

__all__ = [
    "CheckedLabels",
    "check_labels",
    "init_labels",
    "label_record",
    "labels_listing",
    "recookie",
    "write_labels",
    "zero_labels",
]


def init_labels(
    images: Images, dimm: int, *, version: tuple[int, int] = (1, 1), force: bool = False
) -> LabelArea:
    """Makes the label area of a dimm hold no labels, in this version, and gives it as it is then.

    Refused without ``force`` (:class:`InvalidArgument`) where an index block is valid already,
    where the last bytes of the image are data that no label area explains, and where an info block
    makes a namespace of the label-less region, which labels would hide.
    """
    _require_area(images, dimm)
    path = images.machine.dimms[dimm].path
    _, area = images.label_area(dimm)
    found = read_area(area)
    if found.current is not None and not force:
        header = found.current.header
        text = (
            f"is labelled already: version {header.major}.{header.minor}, {len(found.labels)} "
            "labels in use; --force drops them"
        )
        raise InvalidArgument(text, op="init-labels", path=path)
    if found.current is None and any(area) and not force:
        text = (
            f"the last {len(area)} bytes hold data and no valid index block; --force makes them "
            "a label area and loses what is there"
        )
        raise InvalidArgument(text, op="init-labels", path=path)
    if found.current is None and not force:
        _refuse_hiding(images, dimm)
    images.write_labels(dimm, initialise(area, *version))
    return read_area(images.label_area(dimm)[1])


def _refuse_hiding(images: Images, dimm: int) -> None:
    bus = images.bus()
    region = next(each for each in bus.regions if bus.dimms[dimm] in each.dimms)
    for each in region.namespaces:
        if each.claim.info is not None:
            text = (
                f"is label-less and {each.dev} is of mode {each.claim.mode}: with labels its info "
                "block counts no more; --force does it"
            )
            raise InvalidArgument(text, op="init-labels", path=region.path)


def zero_labels(images: Images, dimm: int, *, offset: int = 0, length: int | None = None) -> int:
    """Zeroes the label area, or a part of it; the dimm is label-less then. Gives the bytes."""
    _require_area(images, dimm)
    _, area = images.label_area(dimm)
    groups = erase(area, offset, length)
    images.write_labels(dimm, groups)
    return len(groups[-1][0][1]) if groups else 0


def write_labels(images: Images, dimm: int, data: bytes, *, offset: int = 0) -> None:
    """Puts a dump of :command:`read-labels` back. What was there is dropped first, so a crash in
    between leaves a dimm without labels, never a mixture."""
    _require_area(images, dimm)
    _, area = images.label_area(dimm)
    if offset < 0 or offset + len(data) > len(area):
        text = f"{len(data)} bytes at {offset} do not fit into a label area of {len(area)} bytes"
        raise InvalidArgument(text, op="write-labels", path=images.machine.dimms[dimm].path)
    if offset == 0 and len(data) == len(area):
        images.write_labels(dimm, erase(area))
        found = read_area(data)
        size = found.sizing.index_size
        # The index blocks, which make the labels count, come last, and the current one of them
        # first: the other one alone would bring an older set of labels back.
        order = (1, 0) if found.current is not None and found.current.number else (0, 1)
        blocks = [[(place * size, data[place * size :][:size])] for place in order]
        images.write_labels(dimm, [[(2 * size, data[2 * size :])], *blocks])
    elif data:
        images.write_labels(dimm, [[(offset, data)]])


@dataclass(frozen=True, slots=True)
class CheckedLabels:
    """What a label area is worth."""

    dev: str
    labelled: bool
    free: int
    used: int
    findings: tuple[str, ...]


def check_labels(dimm: ImageDimm) -> CheckedLabels:
    """Judges the label area of a dimm without changing it."""
    area = dimm.span.area
    if area is None:
        return CheckedLabels(dimm.name, False, 0, 0, ("has no label area",))
    findings = [str(fault) for fault in area.faults]
    if area.current is None:
        blank = all(fault.field == "sig" for fault in area.faults)
        text = "is not initialised" if blank else "has no valid index block"
        return CheckedLabels(dimm.name, False, 0, 0, (text, *([] if blank else findings)))
    free = area.current.free_count
    used = area.current.header.nslot - free
    return CheckedLabels(dimm.name, True, free, used, tuple(findings))


def recookie(images: Images, dimm: int) -> list[Label]:
    """Gives the labels of a dimm that was moved to another slot the cookie of the set it is in now,
    in one atomic change. Gives the labels that were changed.

    Raises :class:`NoSpace` where there are fewer free slots than labels to change.
    """
    _require_area(images, dimm)
    bus = images.bus()
    path = images.machine.dimms[dimm].path
    here = bus.dimms[dimm]
    region = next(each for each in bus.regions if here in each.dimms)
    area = here.span.area
    if area is None or area.current is None:
        raise InvalidArgument("has no labels", op="recookie", path=path)
    if region.span.ways > 1:
        text = "belongs to an interleaved set, whose labels cannot be changed in one step"
        raise InvalidArgument(text, op="recookie", path=path)
    cookie = region.span.cookie
    require_sound(region, "recookie")
    stale = [label for label in area.labels if label.isetcookie != cookie and label.nlabel == 1]
    if not stale:
        return []
    if area.current.free_count < len(stale):
        text = (
            f"{len(stale)} labels are to be rewritten and {area.current.free_count} slots are free"
        )
        raise NoSpace(text, op="recookie", path=path)
    changed = [replace(label, isetcookie=cookie, flags=label.flags & ~8) for label in stale]
    images.write_labels(dimm, area.update(add=changed, remove=[each.slot for each in stale]))
    return changed


def _require_area(images: Images, dimm: int) -> None:
    spec = images.machine.dimms[dimm]
    if not spec.label_size:
        text = "has no label area; --label-size 128K, or a machine file, gives it one at its end"
        raise InvalidArgument(text, op="labels", path=spec.path)


def labels_listing(dimms: Sequence[ImageDimm]) -> list[dict[str, Any]]:
    """What ``ndctl read-labels --json`` prints: both index blocks as they are, valid or not, and
    every label whose slot number fits, freed ones too. Dimms without a label area are left out."""
    listing = []
    for dimm in dimms:
        area = dimm.span.area
        if area is not None:
            labels = [label_record(label) for label in area.stored]
            indexes = [_index_record(header) for header in area.headers]
            listing.append({"dev": dimm.name, "index": indexes, "label": labels})
    return listing


def _index_record(header: IndexHeader) -> dict[str, Any]:
    return {
        "signature": header.sig.split(b"\0", 1)[0].decode("ascii", "replace"),
        "major": header.major,
        "minor": header.minor,
        "labelsize": 1 << 7 + min(header.labelsize, 24),
        "seq": header.seq,
        "nslot": header.nslot,
    }


def label_record(label: Label) -> dict[str, Any]:
    """One label in the JSON of ``ndctl read-labels``. GUIDs are printed as it prints them."""
    record: dict[str, Any] = {
        "uuid": str(label.uuid),
        "name": label.name.split(b"\0", 1)[0].decode("utf-8", "replace"),
        "slot": label.slot,
        "position": label.position,
        "nlabel": label.nlabel,
        "flags": label.flags,
        "isetcookie": label.isetcookie,
        "lbasize": label.lbasize,
        "dpa": label.dpa,
        "rawsize": label.rawsize,
    }
    if isinstance(label, LabelV2):
        record["type_guid"] = guids.efi_text(label.type_guid)
        record["abstraction_guid"] = guids.efi_text(label.abstraction_guid)
    return record
