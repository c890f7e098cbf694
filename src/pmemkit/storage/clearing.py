"""Bad blocks under a range that is to be written: cleared by writing them whole, or a reason to
refuse.

What this does not do: clear those of a device DAX, which only the kernel's own call does
(``ndctl clear-errors``).
"""

import os
import re
import stat
from pathlib import Path

from pmemkit.errors import MediaError
from pmemkit.media.badblocks import BAD_BLOCK_SIZE, BadRun, clip, read_bad_blocks
from pmemkit.storage.device import BlockDevice
from pmemkit.storage.region import Region

__all__ = ["bad_runs", "clear_edges", "refuse_bad_blocks"]


def bad_runs(
    region: Region, start: int, length: int, *, sysfs: Path = Path("/sys")
) -> list[BadRun]:
    """The bad blocks that touch a range, in blocks from the start of the region: those that are
    listed beside an image, or by the kernel for a block device."""
    opened = region.opened
    base = opened.part[0] if opened.part is not None else 0
    listed: tuple[BadRun, ...] = ()
    if opened.backing == "file":
        listed = read_bad_blocks(opened.path)
    elif opened.backing == "block device" and opened.file is not None:
        listed = _of_block_device(opened.file.fileno(), sysfs)
    in_region = clip(listed, base, region.size)
    first, end = start // BAD_BLOCK_SIZE, -(-(start + length) // BAD_BLOCK_SIZE)
    cut = (BadRun(low := max(run.offset, first), min(run.end, end) - low) for run in in_region)
    return [run for run in cut if run.length > 0]


def _of_block_device(fd: int, sysfs: Path) -> tuple[BadRun, ...]:
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return ()
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    try:
        text = (sysfs / "dev/block" / number / "badblocks").read_text(encoding="ascii")
    except (OSError, ValueError):
        return ()
    found = (re.fullmatch(r"(\d{1,18}) (\d{1,18})", line) for line in text.splitlines())
    return tuple(BadRun(int(each[1]), int(each[2])) for each in found if each)


def refuse_bad_blocks(region: Region, start: int, length: int) -> None:
    """Raises :class:`MediaError` where the range touches a bad block."""
    found = bad_runs(region, start, length)
    if found:
        count = sum(run.length for run in found)
        text = (
            f"{count} bad blocks in the range, the first is {found[0].offset}; nothing was written"
        )
        offset = found[0].offset * BAD_BLOCK_SIZE
        raise MediaError(text, op="copy", offset=offset, path=region.path)


def clear_edges(region: Region, device: BlockDevice, start: int, length: int) -> int:
    """Zeroes the bad blocks that the range begins or ends inside of: a write of a part of one is
    refused, and the rest of it is lost already. Gives how many those were."""
    ends = {edge // BAD_BLOCK_SIZE for edge in (start, start + length) if edge % BAD_BLOCK_SIZE}
    bad = [
        block
        for block in sorted(ends)
        if any(run.offset <= block < run.end for run in bad_runs(region, start, length))
    ]
    for block in bad:
        at = block * BAD_BLOCK_SIZE
        device.zero(at, min(BAD_BLOCK_SIZE, device.size - at), no_hole=True)
    return len(bad)
