"""Making, destroying and converting namespaces on images.

A namespace comes into being with its label: everything else is written before, into space that
belongs to nobody, and is durable by then. It ends with its label too. Both are one index block, so
at every moment a reader finds the old set of namespaces or the new one.

A label-less region is one namespace that cannot be made or removed; what can be changed is the info
block on it, and there the moment is the one in which its checksum becomes right.

What this does not do: interleaved sets. They are shown and never changed, because no write is
atomic on several dimms.
"""

import uuid as uuids
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal
from uuid import UUID

from pmemkit.bus.image import ImageNamespace, ImageRegion
from pmemkit.bus.model import Mode
from pmemkit.errors import Corrupt, InvalidArgument, NotSupported
from pmemkit.formats import btt, guids
from pmemkit.formats.infoblock import (
    ALIGNMENTS,
    INFO_OFFSET,
    RESERVED_SIZE,
    DaxInfo,
    PfnInfo,
    shape,
)
from pmemkit.formats.labels import Label, LabelV1, LabelV2, Write
from pmemkit.formats.layout import Clear
from pmemkit.namespace.advice import legal_size, require_sound, require_start
from pmemkit.namespace.images import Images, Progress, Step
from pmemkit.units import format_size

__all__ = ["MODES", "Wish", "create", "destroy", "reconfigure"]

MODES: Final[tuple[Mode, ...]] = ("raw", "sector", "fsdax", "devdax")
_PAGE: Final = 4096
_WORD: Final = 8
"""Bytes that a power failure cannot tear: the beginning of every signature."""
_NAME_MOST: Final = 63
_DEFAULT_ALIGN: Final = 2 << 20
_CLAIMS: Final[dict[str, UUID]] = {
    "raw": guids.NULL,
    "sector": guids.BTT2,
    "fsdax": guids.PFN,
    "devdax": guids.DAX,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a namespace is to be. ``None`` takes ndctl's default. Bytes."""

    mode: Mode = "fsdax"
    size: int | None = None
    name: str = ""
    uuid: UUID | None = None
    sector_size: int | None = None
    arena_size: int | None = None
    """Of mode sector: how it is divided, so that each part has its own log."""
    map: Literal["mem", "dev"] = "dev"
    align: int | None = None
    force: bool = False
    """Accept a start that is a multiple of 2 MiB only, and drop a damaged info block."""

    def checked(self) -> "Wish":
        """With defaults filled in. Raises :class:`InvalidArgument` for what no region could be."""
        if self.mode not in MODES:
            choices = ", ".join(MODES)
            raise InvalidArgument(f"mode {self.mode!r} is none of {choices}", op="create")
        if len(self.name.encode()) > _NAME_MOST or "\0" in self.name:
            raise InvalidArgument(
                f"a name of {len(self.name.encode())} bytes is longer than {_NAME_MOST}",
                op="create",
            )
        paged = self.mode in ("fsdax", "devdax")
        if self.align is not None and not paged and self.align != _PAGE:
            raise InvalidArgument(f"mode {self.mode} has no alignment to choose", op="create")
        if self.align is not None and self.align not in ALIGNMENTS:
            choices = ", ".join(format_size(each) for each in ALIGNMENTS)
            raise InvalidArgument(
                f"an alignment of {self.align} bytes is none of {choices}", op="create"
            )
        if self.arena_size is not None:
            if self.mode != "sector":
                raise InvalidArgument(f"mode {self.mode} has no arenas", op="create")
            # Refuses what nothing could be divided into.
            btt.arenas(btt.ARENA_SIZE_MAX, btt.SECTOR_SIZES[0], "2.0", self.arena_size)
        choices_of: dict[str, tuple[int, ...]] = {
            "sector": btt.SECTOR_SIZES,
            "raw": (512, 4096),
            "fsdax": (512, 4096),
            "devdax": (512, 4096),
        }
        sector_size = self.sector_size or (4096 if self.mode == "sector" else 512)
        if sector_size not in choices_of[self.mode]:
            choices = ", ".join(str(each) for each in choices_of[self.mode])
            raise InvalidArgument(
                f"a sector size of {sector_size} bytes is none of {choices}, which mode "
                f"{self.mode} has",
                op="create",
            )
        align = self.align or (_DEFAULT_ALIGN if paged else _PAGE)
        return replace(self, sector_size=sector_size, align=align, uuid=self.uuid or uuids.uuid4())


def create(
    images: Images, region_name: str | None, wish: Wish, *, progress: Progress | None = None
) -> ImageNamespace:
    """Makes a namespace and gives it as a reader finds it afterwards.

    On a labelled region it takes free space; ``region_name`` ``None`` takes the first region that
    has enough. On a label-less region it puts an info block onto the one namespace there is, which
    then has to be raw. Raises :class:`InvalidArgument` or :class:`NoSpace` before anything is
    written. When it returns, the namespace is durable.
    """
    wish = wish.checked()
    region = _choose_region(images, region_name, wish)
    if not region.labelled:
        return _claim_whole(images, region, wish, progress)
    _require_single(region)
    require_sound(region, "create")
    assert wish.align is not None
    size = legal_size(region, wish.size, wish.align, raw=wish.mode == "raw")
    offset = next(start for start, length in region.free() if length >= size)
    label = _new_label(region, wish, offset, size)
    change = _label_change(region, add=[label])
    _write_content(images, region, wish, offset, size, label.uuid, progress)
    images.write_labels(images.number_of(region), change)
    return _found(images, region, label.uuid)


def _choose_region(images: Images, name: str | None, wish: Wish) -> ImageRegion:
    bus = images.bus()
    if name is not None:
        return bus.region(name)
    if not bus.regions:
        raise InvalidArgument("there is no region", op="create")
    for region in bus.regions:
        needed = wish.size or 1
        if region.labelled and any(length >= needed for _, length in region.free()):
            return region
        blank = not region.labelled and region.namespaces[0].claim.info is None
        if blank and wish.size in (None, region.size):
            return region
    return bus.regions[0]


def _require_single(region: ImageRegion) -> None:
    if region.span.ways > 1:
        text = (
            f"{region.dev} is interleaved over {region.span.ways} dimms; such sets are shown and "
            "not changed"
        )
        raise NotSupported(text, op="create", path=region.path)


def _claim_whole(
    images: Images, region: ImageRegion, wish: Wish, progress: Progress | None
) -> ImageNamespace:
    """Puts an info block on the namespace of a label-less region."""
    _require_whole(region, wish)
    here = region.namespaces[0]
    if here.claim.info is not None:
        kind = here.claim.info.TITLE
        text = f"{here.dev} carries a {kind}; destroy it or reconfigure the namespace"
        raise InvalidArgument(text, op="create", path=region.path)
    if here.claim.faults:
        text = f"{here.dev} carries a damaged info block ({here.claim.faults[0]})"
        raise Corrupt(f"{text}; destroying it with --force drops it", op="create", path=region.path)
    if wish.mode == "raw":
        text = f"{region.dev} is label-less: its namespace is raw already"
        raise InvalidArgument(text, op="create", path=region.path)
    _write_content(images, region, wish, 0, region.size, UUID(int=0), progress)
    return images.bus().namespace(here.dev)


def _require_whole(region: ImageRegion, wish: Wish) -> None:
    """Refuses what a label-less region cannot be, whatever is on it."""
    _require_single(region)
    require_sound(region, "create")
    if wish.size not in (None, region.size):
        text = (
            f"{region.dev} is label-less: it is one namespace of {region.size} bytes "
            f"({format_size(region.size)}) and cannot be divided; pmem init-labels gives it labels"
        )
        raise InvalidArgument(text, op="create", path=region.path)
    if wish.name or (wish.sector_size == 4096 and wish.mode in ("raw", "fsdax")):
        text = f"{region.dev} is label-less: there is no place for a name or a sector size"
        raise InvalidArgument(text, op="create", path=region.path)


def _new_label(region: ImageRegion, wish: Wish, offset: int, size: int) -> Label:
    """The label of a new namespace; its slot is chosen when it is written."""
    assert wish.uuid is not None and wish.sector_size is not None
    area = region.dimms[0].span.area
    if area is not None and wish.uuid in {each.uuid for each in area.labels}:
        raise InvalidArgument(f"uuid {wish.uuid} is in use in {region.dev}", op="create")
    common: dict[str, Any] = {
        "uuid": wish.uuid,
        "name": wish.name.encode(),
        "nlabel": 1,
        "position": 0,
        "isetcookie": region.span.cookie,
        "lbasize": 4096 if wish.sector_size >= 4096 else 512,
        "dpa": region.dimms[0].spec.dpa + offset,
        "rawsize": size,
        "slot": 0,
    }
    if region.span.version == (1, 1):
        return LabelV1(**common)
    claim = _CLAIMS[wish.mode]
    return LabelV2(**common, type_guid=guids.PERSISTENT_MEMORY, abstraction_guid=claim)


def _write_content(
    images: Images,
    region: ImageRegion,
    wish: Wish,
    offset: int,
    size: int,
    parent: UUID,
    progress: Progress | None,
) -> None:
    """Writes what a namespace of this mode has on media, durable when it returns."""
    steps = list(_content(region, wish, region.start + offset, size, parent))
    if wish.mode != "raw":
        steps[-1:] = _signed_last(steps[-1])
    number = images.number_of(region)
    base = region.dimms[0].spec.dpa + offset
    more = {} if progress is None else {"progress": progress}
    images.carry_out(number, steps, base=base, **more)


def _signed_last(step: Step) -> list[Step]:
    """The write of an info block in two: a block without the first word of its signature is none,
    so that a power failure in between leaves the place as if nothing had been there."""
    (write,) = step
    assert not isinstance(write, Clear)
    offset, block = write
    return [[(offset + _WORD, block[_WORD:])], [(offset, block[:_WORD])]]


def _content(
    region: ImageRegion, wish: Wish, start: int, size: int, parent: UUID
) -> Iterator[Step]:
    """Groups of writes, offsets from the start of the namespace; what makes it valid comes last."""
    assert wish.align is not None and wish.sector_size is not None
    yield from _blank(region, start - region.start, size)
    match wish.mode:
        case "sector":
            version: Literal["1.1", "2.0"] = (
                "2.0" if region.labelled and region.span.version != (1, 1) else "1.1"
            )
            yield from btt.fresh_layout(
                size,
                wish.sector_size,
                version=version,
                uuid=uuids.uuid4(),
                parent_uuid=parent,
                arena_size=wish.arena_size or btt.ARENA_SIZE_MAX,
            )
        case "fsdax" | "devdax":
            require_start(region, start, force=wish.force)
            layout = PfnInfo if wish.mode == "fsdax" else DaxInfo
            divided = shape(size, map=wish.map, align=wish.align, start=start)
            info = layout(
                signature=layout.SIGNATURE,
                uuid=uuids.uuid4(),
                parent_uuid=parent,
                dataoff=divided.dataoff,
                npfns=divided.npfns,
                mode=1 if wish.map == "mem" else 2,
                start_pad=divided.start_pad,
                end_trunc=divided.end_trunc,
                align=wish.align,
            )
            yield [(INFO_OFFSET, info.sealed())]
        case _:
            return


def _label_change(
    region: ImageRegion, *, add: Sequence[Label] = (), remove: Sequence[Label] = ()
) -> list[list[Write]]:
    """One atomic change of the labels of a region of one dimm, not yet carried out."""
    area = region.dimms[0].span.area
    assert area is not None
    return area.update(add=add, remove=[label.slot for label in remove])


def _found(images: Images, region: ImageRegion, uuid: UUID) -> ImageNamespace:
    """The namespace of this uuid as it is now."""
    for each in images.bus().region(region.dev).namespaces:
        if each.uuid == uuid:
            return each
    raise AssertionError(f"namespace {uuid} is not there after it was made")


def destroy(images: Images, name: str, *, force: bool = False) -> ImageNamespace:
    """Removes a namespace and gives it as it was. Its space is free as soon as the label is.

    A label-less one loses its info block and is raw again. The data stay where they were until
    somebody writes there; the first 8 KiB, where info blocks live, are zeroed. One whose info block
    is damaged goes with ``force`` only (:class:`Corrupt`): a repair could have brought it back.
    """
    here = images.bus().namespace(name)
    region = here.region
    _require_single(region)
    require_sound(region, "destroy")
    _require_intact(here, "destroy", force=force)
    if here.found is None and here.claim.info is None and not here.claim.faults:
        text = (
            f"{here.dev} is the raw namespace of a label-less region: there is nothing to destroy. "
            "pmem init-labels gives the region labels"
        )
        raise InvalidArgument(text, op="destroy", path=region.path)
    if here.found is not None:
        images.write_labels(
            images.number_of(region), _label_change(region, remove=here.found.labels)
        )
    _forget(images, here)
    return here


def _require_intact(here: ImageNamespace, op: str, *, force: bool) -> None:
    faults = here.claim.faults
    if here.found is not None and here.found.claim in (None, guids.NULL):
        # A block of another parent is what an earlier namespace left, not damage of this one.
        faults = tuple(fault for fault in faults if fault.field != "parent_uuid")
    if faults and not force:
        text = f"{here.dev} is damaged ({faults[0]}); --force drops what is there"
        raise Corrupt(text, op=op, path=here.region.path)


def _forget(images: Images, here: ImageNamespace) -> None:
    """Makes the namespace one without an info block."""
    base = here.region.dimms[0].spec.dpa + here.offset
    steps = _blank(here.region, here.offset, here.size)
    images.carry_out(images.number_of(here.region), steps, base=base)


def _blank(region: ImageRegion, offset: int, size: int) -> list[Step]:
    """What zeroes the places where info blocks are looked for. The signatures go first: without
    their first word there is no block, and nothing looks like a damaged one."""
    length = min(RESERVED_SIZE, size)
    if not any(region.read(offset, length)):
        return []
    signatures = [(at, bytes(_WORD)) for at in (0, INFO_OFFSET) if at < length]
    return [signatures, [Clear(0, length)]]


def reconfigure(
    images: Images, name: str, wish: Wish, *, progress: Progress | None = None
) -> ImageNamespace:
    """Turns a namespace into another mode, at the same place. Its data are lost.

    In between it is a raw namespace of the same name and size; a crash leaves it as it was, or like
    that, or as it is to be.
    """
    wish = wish.checked()
    assert wish.align is not None and wish.sector_size is not None
    here = images.bus().namespace(name)
    region = here.region
    _require_single(region)
    require_sound(region, "reconfigure")
    _require_intact(here, "reconfigure", force=wish.force)
    if wish.size not in (None, here.size):
        text = f"{here.dev} has {here.size} bytes; to have another size, destroy and create it"
        raise InvalidArgument(text, op="reconfigure", path=region.path)
    # Everything that can be refused is refused before the first write.
    list(_content(region, wish, here.start, here.size, here.uuid))
    if here.found is None:
        _require_whole(region, wish)
        _forget(images, here)
        if wish.mode == "raw":
            return images.bus().namespace(here.dev)
        return _claim_whole(images, images.bus().region(region.dev), wish, progress)
    wish = replace(wish, size=here.size, name=wish.name or here.name)
    number = images.number_of(region)
    raw = _new_label(region, replace(wish, mode="raw", uuid=uuids.uuid4()), here.offset, here.size)
    final = _new_label(region, wish, here.offset, here.size)
    images.write_labels(number, _label_change(region, add=[raw], remove=here.found.labels))
    _write_content(images, region, wish, here.offset, here.size, final.uuid, progress)
    between = images.bus().region(region.dev)
    old = next(each for each in between.namespaces if each.uuid == raw.uuid)
    assert old.found is not None
    images.write_labels(number, _label_change(between, add=[final], remove=old.found.labels))
    return _found(images, between, final.uuid)
