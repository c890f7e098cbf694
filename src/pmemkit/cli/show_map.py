"""The map of a region as people want to see it: namespaces, free extents, labels, and what is odd.

What this does not do: read anything; the bus is looked at already.
"""

from typing import TYPE_CHECKING, Any

from pmemkit.units import format_size

if TYPE_CHECKING:
    from pmemkit.bus.image import ImageBus, ImageDimm, ImageNamespace, ImageRegion

__all__ = ["map_facts", "map_lines"]

_WIDTH = 72
_MARKS = "0123456789abcdefghijklmnopqrstuvwxyz"


def map_facts(bus: "ImageBus", path: str) -> dict[str, Any]:
    """Dimms, regions, and what lies where in each; sizes and offsets are bytes."""
    from pmemkit.namespace.advice import notes, placement_notes

    return {
        "path": path,
        "dimms": [_dimm_facts(dimm) for dimm in bus.dimms],
        "regions": [_region_facts(region) for region in bus.regions],
        "notes": [*notes(bus), *placement_notes(bus)],
    }


def _dimm_facts(dimm: "ImageDimm") -> dict[str, Any]:
    area = dimm.span.area
    facts: dict[str, Any] = {
        "dev": dimm.name,
        "path": dimm.spec.path,
        "size": dimm.file_size,
        "slot": dimm.spec.slot,
        "serial": dimm.spec.serial_number,
        "nature": dimm.spec.nature,
        "label_size": dimm.spec.label_size,
        "labelled": area is not None and area.current is not None,
    }
    if area is not None and area.current is not None:
        header = area.current.header
        facts |= {
            "label_version": f"{header.major}.{header.minor}",
            "slots": header.nslot,
            "slots_free": area.current.free_count,
            "labels": len(area.labels),
            "label_cookies": sorted({label.isetcookie for label in area.labels}),
        }
    return facts


def _region_facts(region: "ImageRegion") -> dict[str, Any]:
    return {
        "dev": region.dev,
        "address": region.start,
        "size": region.size,
        "align": region.span.align,
        "dimms": [dimm.name for dimm in region.dimms],
        "labelled": region.labelled,
        "cookie": region.span.cookie,
        "namespaces": [_namespace_facts(each) for each in region.namespaces],
        "free": [{"offset": offset, "size": length} for offset, length in region.free()],
    }


def _namespace_facts(here: "ImageNamespace") -> dict[str, Any]:
    claim = here.claim
    return {
        "dev": here.dev,
        "offset": here.offset,
        "size": here.size,
        "mode": claim.mode,
        "enabled": claim.enabled,
        "data_offset": claim.offset,
        "data_size": here.size if claim.size is None else claim.size,
        "name": here.name,
        "uuid": str(here.uuid) if here.found is not None else None,
    }


def map_lines(facts: dict[str, Any]) -> list[str]:
    """The same for people."""
    dimms = {dimm["dev"]: dimm for dimm in facts["dimms"]}
    lines = [facts["path"]]
    for region in facts["regions"]:
        lines += _region_lines(region, [dimms[name] for name in region["dimms"]])
    return lines + [f"  note: {each}" for each in facts["notes"]]


def _region_lines(region: dict[str, Any], dimms: list[dict[str, Any]]) -> list[str]:
    kind = "labelled" if region["labelled"] else "label-less"
    lines = [
        f"  {region['dev']}: {format_size(region['size'])} at {region['address']:#x}, {kind}, "
        f"cookie {region['cookie']:#018x}"
    ]
    lines += [f"    {_dimm_line(dimm)}" for dimm in dimms]
    parts = _parts(region)
    lines += ["", f"    {_bar(parts, region['size'])}", ""]
    for mark, offset, length, what in parts:
        end = offset + length
        lines.append(f"    {mark} {offset:#12x} - {end:#12x} {format_size(length):>11}  {what}")
    return lines


def _dimm_line(dimm: dict[str, Any]) -> str:
    line = f"{dimm['dev']}: {dimm['path']}, slot {dimm['slot']}, serial {dimm['serial']:#x}"
    if dimm["labelled"]:
        used = dimm["slots"] - dimm["slots_free"]
        area = format_size(dimm["label_size"])
        return (
            f"{line}; labels {dimm['label_version']} in {area}, {used} of {dimm['slots']} slots "
            "in use"
        )
    if dimm["label_size"]:
        return f"{line}; label area of {format_size(dimm['label_size'])}, not initialised"
    return f"{line}; no label area"


def _parts(region: dict[str, Any]) -> list[tuple[str, int, int, str]]:
    """``(mark, offset, length, what)`` of everything in the region, in order."""
    parts = []
    for each in region["namespaces"]:
        number = int(each["dev"].rpartition(".")[2])
        name = f" {each['name']!r}" if each["name"] else ""
        state = "" if each["enabled"] else ", a kernel would leave it disabled"
        what = f"{each['dev']}{name}, {each['mode']}{state}"
        if each["data_size"] != each["size"]:
            what += f", {format_size(each['data_size'])} of data"
        parts.append((_MARKS[number % len(_MARKS)], each["offset"], each["size"], what))
    parts += [(".", each["offset"], each["size"], "free") for each in region["free"]]
    parts.sort(key=lambda part: part[1])
    filled: list[tuple[str, int, int, str]] = []
    behind = 0
    for part in (*parts, ("", region["size"], 0, "")):
        if part[1] > behind:
            filled.append(
                (
                    "?",
                    behind,
                    part[1] - behind,
                    "no namespace: rounding, or a label that is not used",
                )
            )
        behind = max(behind, part[1] + part[2])
        filled.append(part)
    return filled[:-1]


def _bar(parts: list[tuple[str, int, int, str]], size: int) -> str:
    """Each part as wide as its share, one column at least."""
    columns = []
    room = max(0, _WIDTH - len(parts))
    for mark, _, length, _ in parts:
        columns.append(mark * (1 + length * room // max(size, 1)))
    return f"[{'|'.join(columns)}]"
