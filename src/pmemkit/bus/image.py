"""The image bus: files as the dimms of a machine, seen as a Linux that boots with them would.

Invariants:
1. Nothing is written and nothing is locked: an image may be looked at while it is in use.
2. Only what decides is read: the label area and the first blocks of each namespace.
3. A dimm without a valid index block is label-less: its region is one namespace over all of it. A
   labelled one has the namespaces that its labels name, and maybe none.

What this does not do: change anything (:mod:`pmemkit.namespace`).
"""

import io
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from pmemkit.bus.claim import Claim, probe_claim
from pmemkit.bus.machine import DimmSpec, Machine, checked, load_machine
from pmemkit.bus.scan import FoundNamespace, RegionScan, RegionSpan, Span, scan
from pmemkit.errors import InvalidArgument, NotSupported
from pmemkit.formats.cookie import cookies
from pmemkit.formats.labels import AREA_SIZE_MIN, SIGNATURE, read_area, sizing
from pmemkit.media.badblocks import BadRun, clip, read_bad_blocks
from pmemkit.media.provider import failure_of

__all__ = [
    "LABEL_SIZES",
    "ImageBus",
    "ImageDimm",
    "ImageNamespace",
    "ImageRegion",
    "Reader",
    "find_label_size",
    "machine_of",
    "observe",
    "observe_with",
    "open_reader",
]

Reader = Callable[[int, int], bytes]
"""Bytes at an offset; fewer where the image ends."""

_NO_UUID: Final = UUID(int=0)
LABEL_SIZES: Final = tuple(
    sorted(
        {1 << shift for shift in range(AREA_SIZE_MIN.bit_length() - 1, 27)}
        | {count << 17 for count in range(1, 33)}
    )
)
"""Sizes of label areas that are found without being told: powers of two up to 64 MiB, multiples of
128 KiB up to 4 MiB."""
_SLOTS: Final = 256


@dataclass(frozen=True, slots=True)
class ImageDimm:
    """A dimm and its image. Bytes."""

    name: str
    spec: DimmSpec
    file_size: int
    address: int
    span: Span
    read: Reader
    bad: tuple[BadRun, ...] = ()
    """Blocks of the image that cannot be read."""

    @property
    def label_offset(self) -> int:
        """Where the label area begins in the image."""
        return self.file_size - self.spec.label_size


@dataclass(frozen=True, slots=True)
class ImageNamespace:
    """A namespace of an image. Bytes."""

    dev: str
    region: "ImageRegion"
    offset: int
    """In the region."""
    size: int
    """All of it, with info blocks and page map."""
    found: FoundNamespace | None
    """What its labels say; ``None`` for the one namespace of a label-less region."""
    claim: Claim
    """What its info blocks say."""

    @property
    def uuid(self) -> UUID:
        """The uuid of the label; zero without one."""
        return self.found.uuid if self.found is not None else _NO_UUID

    @property
    def name(self) -> str:
        """The name in the label."""
        return self.found.name if self.found is not None else ""

    @property
    def start(self) -> int:
        """Its physical address, in a region of one dimm."""
        return self.region.start + self.offset

    @property
    def number(self) -> int:
        """N of namespaceR.N."""
        return int(self.dev.rpartition(".")[2])


@dataclass(slots=True)
class ImageRegion:
    """A region of an image bus."""

    span: RegionSpan
    dimms: tuple[ImageDimm, ...]
    scan: RegionScan | None
    """``None`` for a label-less region."""
    namespaces: tuple[ImageNamespace, ...] = ()

    @property
    def dev(self) -> str:
        """Its name."""
        return f"region{self.span.index}"

    @property
    def start(self) -> int:
        """Its physical address."""
        return self.span.start

    @property
    def size(self) -> int:
        """Bytes."""
        return self.span.size

    @property
    def labelled(self) -> bool:
        """True when namespaces come from labels."""
        return self.scan is not None

    @property
    def path(self) -> str:
        """The image of the first dimm."""
        return self.dimms[0].spec.path

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the region, where it is one dimm."""
        return self.dimms[0].read(self.dimms[0].spec.dpa + offset, length)

    def bad(self, offset: int, length: int) -> tuple[BadRun, ...]:
        """Bad blocks in a range of the region, counted from its start, where it is one dimm."""
        if len(self.dimms) > 1:
            return ()
        return clip(self.dimms[0].bad, self.dimms[0].spec.dpa + offset, length)

    def free(self) -> list[tuple[int, int]]:
        """``(offset, length)`` of what no label reserves, cut to the region's alignment."""
        if self.scan is None:
            return []
        unit, gaps, behind = self.span.align, [], 0
        for offset, length in (*self.scan.busy, (self.size, 0)):
            start, end = -(-behind // unit) * unit, offset // unit * unit
            if end > start:
                gaps.append((start, end - start))
            behind = max(behind, offset + length)
        return gaps


@dataclass(frozen=True, slots=True)
class ImageBus:
    """Everything that the images of a machine hold."""

    machine: Machine
    dimms: tuple[ImageDimm, ...]
    regions: tuple[ImageRegion, ...]

    def region(self, name: str) -> ImageRegion:
        """The region called ``regionR``."""
        for region in self.regions:
            if region.dev == name:
                return region
        known = ", ".join(region.dev for region in self.regions)
        text = f"{name!r} is no region here; there are {known}"
        raise InvalidArgument(text, op="list", path=self.path)

    def namespace(self, name: str) -> ImageNamespace:
        """The namespace called ``namespaceR.N`` or ``R.N``, or the one that has this uuid, of its
        label or of its info block, or this name."""
        every = [each for region in self.regions for each in region.namespaces]
        for each in every:
            if name in (each.dev, each.dev.removeprefix("namespace")):
                return each
        found = [
            each
            for each in every
            if name.lower() in (str(each.uuid), str(each.claim.uuid))
            or (name and name == each.name)
        ]
        if len(found) == 1:
            return found[0]
        known = ", ".join(each.dev for each in found or every) or "none"
        several = "stands for several namespaces" if found else "is no namespace here"
        text = f"{name!r} {several}; there is {known}"
        raise InvalidArgument(text, op="list", path=self.path)

    @property
    def path(self) -> str:
        """The machine file, or the image of the first dimm."""
        return self.machine.path or self.machine.dimms[0].path


def machine_of(
    paths: Sequence[str | os.PathLike[str]],
    *,
    label_size: int | None = None,
    slot: int | None = None,
    align: int | None = None,
) -> Machine:
    """The machine of a machine file (``*.toml``), or the one that has these images as its dimms.

    Of an image without a machine file, the size of the label area is found by its index blocks and
    the slot by the cookie of its labels; ``label_size`` and ``slot`` override that.
    """
    names = [os.fspath(path) for path in paths]
    described = [name for name in names if name.endswith(".toml")]
    if described:
        if len(names) > 1:
            text = f"a machine file stands alone; there are also {len(names) - 1} other paths"
            raise InvalidArgument(text, op="machine", path=described[0])
        return load_machine(described[0])
    dimms = []
    for place, name in enumerate(names):
        read, file_size, close = open_reader(name)
        try:
            area_size = find_label_size(read, file_size) if label_size is None else label_size
            number = slot if slot is not None and place == 0 else None
            spec = DimmSpec(path=name, label_size=area_size, align=align or 4096, slot=number)
            if number is None and area_size:
                area = read(file_size - area_size, area_size)
                spec = DimmSpec(
                    path=name,
                    label_size=area_size,
                    align=align or 4096,
                    slot=_slot_of(area, spec) if slot is None else slot + place,
                )
        finally:
            close()
        dimms.append(checked(spec, name))
    handles = [dimm.slot for dimm in dimms]
    if len(set(handles)) < len(handles):
        # Two images that were labelled for the same slot: only one can be right; places decide.
        dimms = [DimmSpec(path=d.path, label_size=d.label_size, align=d.align) for d in dimms]
    return Machine.of(dimms)


def find_label_size(read: Reader, file_size: int) -> int:
    """Bytes of the label area at the end of an image, found by a valid index block; 0 for none.

    Areas of 2^n bytes are found, and multiples of QEMU's least, 128 KiB, up to 4 MiB. Where no
    block is valid but one is signed, the area is damaged; it is one nevertheless, so that nobody
    takes the image for a label-less one.
    """
    damaged = 0
    for size in LABEL_SIZES:
        if size >= file_size:
            continue
        start = file_size - size
        places = {0, sizing(size, 128).index_size, sizing(size, 256).index_size}
        if not any(read(start + place, len(SIGNATURE)) == SIGNATURE for place in places):
            continue
        if read_area(read(start, size)).current is not None:
            return size
        damaged = damaged or size
    return damaged


def _slot_of(area: bytes, spec: DimmSpec) -> int | None:
    """The QEMU slot whose cookie the labels carry."""
    found = read_area(area)
    if found.current is None or not found.labels:
        return None
    header = found.current.header
    wanted = {label.isetcookie for label in found.labels if label.nlabel == 1}
    for slot in range(_SLOTS):
        identity = DimmSpec(path=spec.path, slot=slot).identity()
        if cookies([identity]).of_version(header.major, header.minor) in wanted:
            return slot
    return None


def observe(machine: Machine) -> ImageBus:
    """What the images of a machine hold now."""
    with ExitStack() as stack:
        opened = []
        for dimm in machine.dimms:
            read, file_size, close = open_reader(dimm.path)
            stack.callback(close)
            opened.append((read, file_size))
        return observe_with(machine, opened)


def observe_with(machine: Machine, opened: Sequence[tuple[Reader, int]]) -> ImageBus:
    """The same, through readers that the caller has; each comes with the size of its image."""
    addresses = machine.addresses(file_size for _, file_size in opened)
    dimms = tuple(
        _dimm(f"nmem{number}", spec, address, read, file_size)
        for number, (spec, address, (read, file_size)) in enumerate(
            zip(machine.dimms, addresses, opened, strict=True)
        )
    )
    regions = []
    for index, numbers in enumerate(machine.sets):
        members = tuple(dimms[number] for number in numbers)
        regions.append(_region(index, members))
    return ImageBus(machine, dimms, tuple(regions))


def _dimm(name: str, spec: DimmSpec, address: int, read: Reader, file_size: int) -> ImageDimm:
    if spec.label_size >= file_size > 0:
        text = f"the label area of {spec.label_size} bytes leaves nothing of {file_size} bytes"
        raise InvalidArgument(text, op="open", path=spec.path)
    area = None
    if spec.label_size and file_size:
        area = read_area(read(file_size - spec.label_size, spec.label_size))
    span = Span(name, spec, spec.region_size(file_size), area)
    return ImageDimm(name, spec, file_size, address, span, read, read_bad_blocks(spec.path))


def _region(index: int, dimms: tuple[ImageDimm, ...]) -> ImageRegion:
    span = RegionSpan(index, dimms[0].address, tuple(dimm.span for dimm in dimms))
    if not span.labelled:
        region = ImageRegion(span, dimms, None)
        claim = _claim(region, 0, region.size, None)
        whole = ImageNamespace(f"namespace{index}.0", region, 0, region.size, None, claim)
        region.namespaces = (whole,)
        return region
    found = scan(span)
    region = ImageRegion(span, dimms, found)
    region.namespaces = tuple(
        ImageNamespace(
            f"namespace{index}.{number}",
            region,
            each.offset,
            each.size,
            each,
            _claim(region, each.offset, each.size, each),
        )
        for number, each in enumerate(found.namespaces)
    )
    return region


def _claim(region: ImageRegion, offset: int, size: int, found: FoundNamespace | None) -> Claim:
    if region.span.ways > 1:
        return Claim.of_label(found.claim if found is not None else None)
    return probe_claim(
        lambda at, length: region.read(offset + at, length),
        size=size,
        start=region.start + offset,
        parent=found.uuid if found is not None else _NO_UUID,
        abstraction=found.claim if found is not None else None,
    )


def open_reader(path: str) -> tuple[Reader, int, Callable[[], None]]:
    """A reader of an image, its size, and what closes it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as cause:
        raise failure_of(cause, "open", path) from cause
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise NotSupported("is neither a file nor a block device", op="open", path=path)
        file_size = os.lseek(fd, 0, os.SEEK_END)
        file = io.FileIO(fd)
    except OSError as cause:
        os.close(fd)
        raise failure_of(cause, "open", path) from cause

    def read(offset: int, length: int) -> bytes:
        parts = []
        try:
            while length > 0 and (part := os.pread(file.fileno(), length, offset)):
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
        except OSError as cause:
            raise failure_of(cause, "read", path) from cause
        return b"".join(parts)

    return read, file_size, file.close
