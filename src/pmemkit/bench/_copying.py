"""Cases of suite ``dax``: a file into a region, and a region into another.

The file stands on a disk; the region is memory of another file system, so that only the copy is
measured and not the page cache in front of a second disk. Everybody reads a file that nobody has in
a page cache: ``dd`` goes around it as we do, ``cp`` through it. All of them fill a new file, whose
memory the kernel finds and clears first. The floor is the disk itself, read around the page cache
into one buffer that is used again and again, with the same queue depth; against it stands a copy
into a region that has its memory already, as a device has.

What this does not do: judge; compare with daxio, which copies as ``memcpy`` of a mapping does.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pmemkit import _native
from pmemkit.bench._runner import Options, Report, alternate
from pmemkit.errors import NoSpace
from pmemkit.storage import open_region
from pmemkit.storage.copying import DeviceSource, DeviceTarget
from pmemkit.storage.direct import carrier_for, copy_carried
from pmemkit.storage.region import Region
from pmemkit.units import format_size

__all__ = ["copying"]

_SIZE = 4 << 30
_SIZE_QUICK = 256 << 20
_BLOCK = 1 << 20
_SHARED_MEMORY = "/dev/shm"
_GIB = 1 << 30
_MADV_POPULATE_WRITE = 23
"""Of Linux; Python has no name for it."""


def copying(report: Report, options: Options, size: int | None = None) -> None:
    """Adds the records of copies of ``size`` bytes: 4 GiB, or what there is room for."""
    with ExitStack() as stack:
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=Path.cwd())))
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_SHARED_MEMORY)))
        size = size or _fitting(_SIZE_QUICK if options.quick else _SIZE, disk, memory)
        label = format_size(size)
        if any(options.wanted(each) for each in _file_names(label)):
            _make_file(disk / "source", size)
            _from_file(report, options, disk / "source", memory / "target", size)
        name = f"region to region {label}"
        if options.wanted(name):
            _between(report, options, name, size)


def _file_names(label: str) -> tuple[str, ...]:
    peers = ("dd", "dd direct", "cp", "the disk")
    return tuple(f"file to region {label} against {peer}" for peer in peers)


def _fitting(wanted: int, disk: Path, memory: Path) -> int:
    """``wanted``, or the half of what is free, in whole blocks."""
    pages, page = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    room = [shutil.disk_usage(disk).free, shutil.disk_usage(memory).free, pages * page // 2]
    size = min(wanted, min(room) // 2) // _BLOCK * _BLOCK
    if size < _BLOCK:
        raise NoSpace("there is no room for anything to copy", op="bench")
    return size


def _make_file(path: Path, size: int) -> None:
    block = os.urandom(_BLOCK)
    with path.open("wb") as file:
        for _ in range(size // _BLOCK):
            file.write(block)
        os.fsync(file.fileno())


def _forgotten(source: Path, target: Path) -> None:
    """Takes the source out of the page cache and gives the target's memory back, whoever copied."""
    fd = os.open(source, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    target.unlink(missing_ok=True)


def _timed(source: Path, target: Path, size: int, work: Callable[[], object]) -> float:
    """GiB a second."""
    _forgotten(source, target)
    start = time.perf_counter()
    work()
    return size / _GIB / (time.perf_counter() - start)


def _ours(source: Path, target: Path) -> None:
    size = source.stat().st_size
    with open_region(target, create_size=size) as region:
        _into(source, region)


def _into(source: Path, region: Region) -> None:
    with open_region(source, read_only=True) as one:
        copy_carried(
            DeviceSource(one.device()),
            DeviceTarget(region.device()),
            carrier_for(one, region, around="on"),
        )


def _disk(source: Path, size: int) -> None:
    """Reads all of the file around the page cache into one buffer."""
    fd = os.open(source, os.O_RDONLY)
    try:
        window = 16 * _BLOCK
        buffer = _native.media.map_anonymous(window)
        copier = _native.direct.Copier(fd, "in", around="on")
        for offset in range(0, size, window):
            copier.transfer(buffer, offset, 0, min(window, size - offset))
    finally:
        os.close(fd)


def _program(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def _from_file(report: Report, options: Options, source: Path, target: Path, size: int) -> None:
    dd = ("dd", f"if={source}", f"of={target}", "bs=1M")
    peers: dict[str, Callable[[], None]] = {
        "dd": partial(_program, *dd),
        "dd direct": partial(_program, *dd, "iflag=direct"),
        "cp": partial(_program, "cp", str(source), str(target)),
        "the disk": partial(_disk, source, size),
    }
    for name, (peer_name, peer) in zip(_file_names(format_size(size)), peers.items(), strict=True):
        if not options.wanted(name):
            continue
        with ExitStack() as stack:
            work = partial(_ours, source, target)
            if peer_name == "the disk":
                region = stack.enter_context(open_region(f"memfd:{size}"))
                region.medium.zero(0, size)
                work = partial(_into, source, region)
            sides = [partial(_timed, source, target, size, each) for each in (work, peer)]
            ours, theirs = alternate(sides, options.runs)
            report.add(name, "GiB/s", ours, theirs, peer_name)
            target.unlink(missing_ok=True)


def _between(report: Report, options: Options, name: str, size: int) -> None:
    """Both regions are there already; the peer is the C library's ``memcpy`` of the same bytes."""
    import ctypes
    import mmap

    half = min(size, _GIB)
    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    with open_region(f"memfd:{half}") as one, open_region(f"memfd:{half}") as two:
        block = os.urandom(_BLOCK)
        for offset in range(0, half, _BLOCK):
            one.medium.write(offset, block)
            two.medium.write(offset, block)
        segments = [(each.lend("bench", write=True), 0, half) for each in (one, two)]
        files = [each.opened.file for each in (one, two)]
        views = [mmap.mmap(file.fileno(), half) for file in files if file is not None]
        places = [ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in views]
        for view in views:
            view.madvise(_MADV_POPULATE_WRITE)

        def ours() -> float:
            start = time.perf_counter()
            _native.sg.copy(segments[:1], segments[1:])
            return half / _GIB / (time.perf_counter() - start)

        def theirs() -> float:
            start = time.perf_counter()
            memcpy(places[1], places[0], half)
            return half / _GIB / (time.perf_counter() - start)

        mine, other = alternate([ours, theirs], options.runs)
        report.add(name, "GiB/s", mine, other, "memcpy")
