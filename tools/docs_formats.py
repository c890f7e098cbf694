#!/usr/bin/env python3
"""Writes docs/formats from the tables and the module documentation of `pmemkit.formats`.

    tools/docs_formats.py            writes the documents
    tools/docs_formats.py --check    exits 1 and names those that are not what would be written

Prose lives in the docstrings of the format modules, tables in their layouts, and traps below, each
with the test that pins it; a trap whose test is not there is an error.

What this does not do: explain how Linux, QEMU or ndctl work beyond what is on media.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from pmemkit.formats import (  # noqa: E402
    btt,
    checksum,
    cookie,
    guids,
    infoblock,
    labels,
    layout,
    pool,
)
from pmemkit.units import format_size  # noqa: E402

__all__ = ["TRAPS", "Trap", "documents", "main", "missing_tests"]

TARGET = ROOT / "docs" / "formats"
GENERATED = "<!-- Written by tools/docs_formats.py; change the docstrings and tables instead. -->"


class Trap(NamedTuple):
    """What others fell into, and what keeps us out of it."""

    format: str
    text: str
    test: str
    """``path::function``."""


_LABELS = "tests/formats/test_labels.py::"
_INFO = "tests/formats/test_infoblock.py::"
_COOKIE = "tests/formats/test_cookie.py::"
_TRAPS = "tests/formats/test_traps.py::"
_POOL = "tests/memory/test_named_arrays.py::"

TRAPS = (
    Trap(
        "labels",
        "Of two index blocks with the same sequence number, block 1 is current: a kernel that "
        "initialised the area itself makes such a pair with its first change.",
        _LABELS + "test_the_first_update_of_a_kernel_that_made_the_area_itself_counts",
    ),
    Trap(
        "labels",
        "Kernels up to about 4.12 counted 1016 slots in 128 KiB, today's count 1020: a reader "
        "takes the number from media. They also left the flag UPDATING set.",
        _LABELS + "test_an_area_of_older_kernels_with_fewer_slots_is_read_by_its_own_number",
    ),
    Trap(
        "labels",
        "Bits of the bitmap behind the last slot are set by ndctl and cleared by Linux: the "
        "checksums of two empty areas differ, and a reader ignores these bits.",
        _LABELS + "test_bits_behind_the_last_slot_are_clear_when_written_and_ignored_when_read",
    ),
    Trap(
        "labels",
        "A label has its uuid in text order and its two GUIDs in EFI order. `ndctl read-labels` "
        "prints the GUIDs in the order of their bytes.",
        _LABELS + "test_uuid_order_and_guid_order_stand_in_one_label",
    ),
    Trap(
        "labels",
        "An area that held labels of one version may have a valid block of it left behind the "
        "blocks of the other version, and the kernel would believe it.",
        _LABELS + "test_init_of_one_version_over_the_other_leaves_nothing_of_it",
    ),
    Trap(
        "labels",
        "A torn index block and the next write to it, torn elsewhere, can make up the whole block "
        "of the change that never happened: an invalid block is zeroed before it is written.",
        "tests/namespace/test_crash_images.py::test_a_change_after_a_torn_one_does_not_complete_it",
    ),
    Trap(
        "labels",
        "The old interleave-set cookie sorted its records as byte strings; labels with it exist.",
        _COOKIE + "test_the_four_dimms_of_the_kernels_test_module_in_the_old_order",
    ),
    Trap(
        "labels",
        "Linux numbers namespaces by their physical start compared lowest byte first.",
        "tests/bus/test_scan.py::test_namespaces_are_numbered_by_their_start_lowest_byte_first",
    ),
    Trap(
        "btt",
        "Bit 30 of a map entry is error and bit 31 zero; the kernel's own btt.rst prints the "
        "columns the other way round.",
        _TRAPS + "test_bit_30_is_error_and_bit_31_is_zero",
    ),
    Trap(
        "btt",
        "The initial state, no bit set, means the block of the sector's own number and shows what "
        "the media hold there; it does not mean zeroes (docs/decisions/0006).",
        _TRAPS + "test_a_fresh_map_is_initial_and_the_data_area_is_cleared_where_that_is_cheap",
    ),
    Trap(
        "btt",
        "A log group has 64 bytes for four entries of 16 and uses two of them: 0 and 1, or 0 and 2 "
        "in layouts older than Linux 4.15, whose structure had its padding inside.",
        _TRAPS + "test_both_places_of_the_second_entry_of_a_log_group_are_read",
    ),
    Trap(
        "btt",
        "A request over several sectors goes on behind a zero entry; the kernel's read returned "
        "there without the rest.",
        _TRAPS + "test_a_read_over_a_zero_entry_goes_on_behind_it",
    ),
    Trap(
        "btt",
        "The sequence number of a log entry lies in its second 8 bytes, which are written last: "
        "8-byte stores are all that power failure is assumed not to tear.",
        _TRAPS + "test_the_half_of_a_log_entry_that_commits_it_is_the_second",
    ),
    Trap(
        "btt",
        "The info block of the first arena is the last write of a new layout; its copy at the end "
        "of the arena, which Linux never reads, comes before.",
        _TRAPS + "test_the_info_block_of_the_first_arena_is_written_last",
    ),
    Trap(
        "infoblocks",
        "A null parent uuid is a wildcard in a BTT info block and none in a PFN or DAX one.",
        _INFO + "test_a_block_is_valid_for_its_own_parent_only",
    ),
    Trap(
        "infoblocks",
        "`align` is what was asked for, but the data begin at a multiple of 2 MiB at least.",
        _INFO + "test_whatever_is_made_is_valid_where_it_was_made",
    ),
    Trap(
        "infoblocks",
        "A block is valid relative to the physical address of the namespace: the same image "
        "plugged elsewhere may not be enabled.",
        _INFO + "test_an_image_is_valid_only_relative_to_where_it_is_plugged",
    ),
    Trap(
        "infoblocks",
        "Fields that a minor version does not have yet hold anything, and are not read.",
        _INFO + "test_older_versions_have_fewer_fields_and_their_rubbish_is_not_read",
    ),
    Trap(
        "pool",
        "The signature is longer than what power failure leaves whole: half of it in the first "
        "slot, and nothing in the second, is a directory that was never finished, not other data.",
        _POOL + "test_a_failure_while_the_first_directory_is_made_leaves_one_that_can_be_made",
    ),
)


def missing_tests() -> list[str]:
    """Tests that traps name and nobody wrote."""
    missing = []
    for trap in TRAPS:
        path, _, name = trap.test.partition("::")
        file = ROOT / path
        if not file.is_file() or f"\ndef {name}(" not in file.read_text(encoding="utf-8"):
            missing.append(trap.test)
    return missing


# --- pieces --------------------------------------------------------------------------------------


def prose(thing: Any) -> str:
    """A docstring as Markdown."""
    text = inspect.getdoc(thing) or ""
    text = re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", text)
    text = text.replace("``", "`")
    # What the module does and does not do with files is not about the format.
    text = re.split(r"\n\nWhat this does not do:", text)[0]
    return text.replace("Invariants:\n1.", "Invariants:\n\n1.").replace(
        "others fell into:\n1.", "others fell into:\n\n1."
    )


def table(rows: Sequence[tuple[str, ...]], head: tuple[str, ...]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


_KINDS = {
    "int": "integer",
    "bytes": "bytes",
    "text": "text, padded with NUL",
    "uuid": "uuid, text order",
    "guid": "guid, EFI order",
    "zero": "zero",
    "checksum": "checksum",
}


def structure(kind: type[layout.Layout]) -> str:
    """Heading, prose and table of one layout."""
    rows = [
        (str(row.offset), str(row.width), f"`{row.name}`", _KINDS[row.kind], row.rule)
        for row in kind.fields()
    ]
    head = ("offset", "bytes", "field", "kind", "a reader demands")
    return f"## {kind.TITLE}\n\n{prose(kind)}\n\n{kind.SIZE} bytes.\n\n{table(rows, head)}\n"


def traps(name: str) -> str:
    """The traps of one document."""
    rows = [(trap.text, f"`{trap.test}`") for trap in TRAPS if trap.format == name]
    return f"## Traps\n\n{table(rows, ('trap', 'pinned by'))}\n"


def constants(module: ModuleType, names: tuple[str, ...]) -> str:
    """Values of a module."""
    rows = [(f"`{name}`", _value(getattr(module, name))) for name in names]
    return table(rows, ("name", "value"))


def _value(value: Any) -> str:
    if isinstance(value, int):
        return f"{value} ({value:#x})" if value > 9 else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(each)}" for key, each in value.items())
    if isinstance(value, tuple):
        return ", ".join(str(each) for each in value)
    return f"`{value!r}`" if isinstance(value, bytes) else str(value)


# --- documents -----------------------------------------------------------------------------------


def _index() -> str:
    rows = []
    for name, module in (
        ("labels", labels),
        ("btt", btt),
        ("infoblocks", infoblock),
        ("pool", pool),
    ):
        rows.append((f"[{name}]({name}.md)", prose(module).split("\n\n")[0].replace("\n", " ")))
    return "\n".join(
        [
            "# On-media formats",
            "",
            prose(layout),
            "",
            table(rows, ("document", "what it is")),
            "",
            "## Checksum",
            "",
            prose(checksum),
            "",
            "## GUIDs",
            "",
            prose(guids),
            "",
            table(
                [(text, str(guid)) for guid, text in guids.ABSTRACTIONS.items()]
                + [("range type: persistent memory", str(guids.PERSISTENT_MEMORY))],
                ("claim", "guid"),
            ),
            "",
        ]
    )


def _labels() -> str:
    sizes = [1 << shift for shift in (10, 11, 12, 14, 16, 17, 18, 20)]
    rows = []
    for size in sizes:
        small, large = labels.sizing(size, 128), labels.sizing(size, 256)
        rows.append(
            (
                format_size(size),
                f"{small.slot_count} / {small.index_size}",
                f"{large.slot_count} / {large.index_size}",
            )
        )
    flags = [(f"{flag.value:#x}", flag.name or "") for flag in labels.LabelFlag]
    return "\n".join(
        [
            "# Label area",
            "",
            prose(labels),
            "",
            structure(labels.IndexHeader),
            "The bitmap of free slots begins at byte 72: bit n % 8 of byte n / 8 is slot n, 1 is",
            "free. The block is padded with zeroes to the index size, and its checksum covers all",
            "of it.",
            "",
            structure(labels.LabelV1),
            structure(labels.LabelV2),
            "## Flags",
            "",
            table(flags, ("bit", "name")),
            "",
            "## Division",
            "",
            "Slots and bytes of an index block, by the size of the area:",
            "",
            table(rows, ("area", "version 1.1", "version 1.2")),
            "",
            "## Interleave-set cookie",
            "",
            prose(cookie),
            "",
            traps("labels"),
        ]
    )


def _btt() -> str:
    return "\n".join(
        [
            "# Block translation table",
            "",
            prose(btt),
            "",
            structure(btt.BttInfo),
            structure(btt.LogEntry),
            "## Map entry",
            "",
            "4 bytes a sector, at `mapoff` + 4 * sector.",
            "",
            table(
                [
                    ("0", "0", "initial: the block of the sector's own number, as it is"),
                    ("0", "1", "error: reads fail, the next write replaces the entry"),
                    ("1", "0", "zero: reads give zeroes"),
                    ("1", "1", "normal"),
                ],
                ("bit 31 (zero)", "bit 30 (error)", "meaning of the block number in bits 0 to 29"),
            ),
            "",
            "## Numbers",
            "",
            constants(
                btt,
                (
                    "SECTOR_SIZES",
                    "LANES",
                    "ARENA_SIZE_MIN",
                    "ARENA_SIZE_MAX",
                    "INITIAL_OFFSET",
                    "MAP_MASK",
                    "ERROR",
                    "ZERO",
                    "NORMAL",
                ),
            ),
            "",
            traps("btt"),
        ]
    )


def _infoblocks() -> str:
    names = ("INFO_OFFSET", "RESERVED_SIZE", "PAGE_SIZE", "SUBSECTION_SIZE", "ALIGNMENTS")
    return "\n".join(
        [
            "# PFN and DAX info blocks",
            "",
            prose(infoblock),
            "",
            structure(infoblock.PfnInfo),
            structure(infoblock.DaxInfo),
            "Before version 1.1 there were no pads, before 1.2 no `align` (the largest power of",
            "two up to `dataoff` stood for it), before 1.4 no sizes of pages.",
            "",
            "The map lies on media with `mode` 2 only. Then Linux computes `npfns` from the space",
            "and ignores a larger number in the block; pmemkit refuses such a block.",
            "",
            "## Numbers",
            "",
            constants(infoblock, names),
            "",
            traps("infoblocks"),
        ]
    )


def _pool() -> str:
    return "\n".join(
        [
            "# Directory of named arrays",
            "",
            prose(pool),
            "",
            structure(pool.PoolHeader),
            structure(pool.PoolEntry),
            "## Numbers",
            "",
            constants(pool, ("FRAME_SIZE", "SLOT_SIZE", "NAME_MAX", "DIMENSIONS_MAX")),
            "",
            traps("pool"),
        ]
    )


def documents() -> dict[str, str]:
    """Every document by its name."""
    made = {
        "index.md": _index(),
        "labels.md": _labels(),
        "btt.md": _btt(),
        "infoblocks.md": _infoblocks(),
        "pool.md": _pool(),
    }
    return {name: f"{GENERATED}\n\n{text.rstrip()}\n" for name, text in made.items()}


def main(arguments: list[str] | None = None) -> int:
    """Writes, or checks."""
    parser = argparse.ArgumentParser(description="Write docs/formats from the tables.")
    parser.add_argument("--check", action="store_true", help="only say what is not up to date")
    parser.add_argument("--target", type=Path, default=TARGET, help="directory of the documents")
    options = parser.parse_args(arguments)
    stale = [f"no such test: {each}" for each in missing_tests()]
    for name, text in documents().items():
        path = options.target / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if options.check:
            stale.append(f"{path} is not what tools/docs_formats.py writes")
        else:
            options.target.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    print("\n".join(stale), file=sys.stderr, end="\n" if stale else "")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
