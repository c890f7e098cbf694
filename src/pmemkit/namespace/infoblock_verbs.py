"""Reading and writing info blocks, as ``ndctl read-infoblock`` and ``write-infoblock`` do.

What this does not do: decide whether a namespace may carry the block.
"""

import uuid as uuids
from typing import Any, Literal
from uuid import UUID

from pmemkit.errors import Corrupt
from pmemkit.formats.btt import BttInfo
from pmemkit.formats.infoblock import INFO_OFFSET, DaxInfo, Info, PfnInfo, shape

__all__ = ["find_infoblock", "infoblock_image", "infoblock_record"]

_LAYOUTS: tuple[type[BttInfo] | type[PfnInfo] | type[DaxInfo], ...] = (BttInfo, PfnInfo, DaxInfo)
_BTT_NAMES = (
    "external_lbasize",
    "external_nlba",
    "internal_lbasize",
    "internal_nlba",
    "nfree",
    "infosize",
    "nextoff",
    "dataoff",
    "mapoff",
    "logoff",
    "info2off",
)
_PAGE_MAP_NAMES = (
    "dataoff",
    "npfns",
    "mode",
    "start_pad",
    "end_trunc",
    "align",
    "page_size",
    "page_struct_size",
)


def find_infoblock(data: bytes) -> tuple[int, Info | BttInfo]:
    """The info block in the first 8 KiB of a namespace, and where it lies.

    Raises :class:`Corrupt`: there is none, or its checksum is wrong.
    """
    wrong = ""
    for offset in (INFO_OFFSET, 0):
        block = data[offset : offset + 4096]
        for layout in _LAYOUTS:
            if len(block) < layout.SIZE:
                continue
            info = layout.unpack(block)
            if not layout.TITLE or not _is_signed(info):
                continue
            faults = layout.basic_faults(block)
            if not faults:
                return offset, info
            wrong = wrong or str(faults[0])
    raise Corrupt(wrong or "there is no info block in the first 8 KiB", op="read-infoblock")


def _is_signed(info: Info | BttInfo) -> bool:
    return info.signature == type(info).SIGNATURE


def infoblock_record(info: Info | BttInfo) -> dict[str, Any]:
    """An info block in the JSON of ``ndctl read-infoblock``."""
    record: dict[str, Any] = {
        "signature": info.signature.rstrip(b"\0").decode("ascii", "replace"),
        "uuid": str(info.uuid),
        "parent_uuid": str(info.parent_uuid),
        "flags": info.flags,
        "version": f"{info.major}.{info.minor}",
    }
    names = _BTT_NAMES if isinstance(info, BttInfo) else _PAGE_MAP_NAMES
    return record | {name: getattr(info, name) for name in names}


def infoblock_image(
    size: int,
    *,
    mode: Literal["fsdax", "devdax"],
    map: Literal["mem", "dev"],
    align: int,
    uuid: UUID | None = None,
    parent_uuid: UUID | None = None,
    start: int = 0,
) -> bytes:
    """The first 8 KiB of a namespace of ``size`` bytes that would begin at physical ``start``."""
    layout = PfnInfo if mode == "fsdax" else DaxInfo
    divided = shape(size, map=map, align=align, start=start, pad=True)
    info = layout(
        signature=layout.SIGNATURE,
        uuid=uuid or uuids.uuid4(),
        parent_uuid=parent_uuid or UUID(int=0),
        dataoff=divided.dataoff,
        npfns=divided.npfns,
        mode=1 if map == "mem" else 2,
        start_pad=divided.start_pad,
        end_trunc=divided.end_trunc,
        align=align,
    )
    return bytes(INFO_OFFSET) + info.sealed()
