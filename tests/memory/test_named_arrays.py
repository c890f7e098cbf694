"""Named arrays: found again after anything, shared by a protocol, never half there."""

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest

import pmemkit
from pmemkit import MemoryPool, RegionSpec, open_arrays
from pmemkit.errors import Busy, Corrupt, InvalidArgument, NoSpace, NotSupported
from pmemkit.formats.checksum import fletcher64
from pmemkit.formats.layout import corruptions
from pmemkit.formats.pool import PoolEntry, PoolHeader, pack_directory, read_slot
from pmemkit.memory.named import DirectoryStore, make_entry
from pmemkit.testing import Recording

MIB = 1 << 20
SLOT = 8192
"""A small slot, so that crash images are small."""


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "region"
    with made.open("wb") as file:
        file.truncate(32 * MIB)
    return made


def open_pool(path, *more) -> MemoryPool:
    return MemoryPool([RegionSpec(path, "named", names=True), *more], block_size="8M")


def test_arrays_are_found_again(path):
    with open_pool(path) as pool:
        table = pool.create("table", (100, 1000), "f8")
        assert not table.any()
        table[:] = np.arange(1000)
        record = pool.create("records/2026", 50, [("key", "u4"), ("value", "f4", (3,))])
        record["value"] = 2.5
        fortran = pool.create("größe", (7, 9), "i2", order="F")
        fortran[3, 4] = 12
        pool.create("nothing", 0)
        pool.persist("table")
        del table, record, fortran
    with open_pool(path) as pool:
        assert sorted(pool) == ["größe", "nothing", "records/2026", "table"]
        assert len(pool) == 4
        assert (pool["table"] == np.arange(1000)).all()
        assert (pool["records/2026"]["value"] == 2.5).all()
        assert pool["records/2026"].dtype["value"].shape == (3,)
        assert pool["größe"].flags.f_contiguous
        assert pool["größe"][3, 4] == 12
        assert pool["nothing"].shape == (0,)
        assert "table" in pool
        assert pool.validate() == []


def test_space_of_deleted_arrays_is_used_again_and_of_kept_ones_never(path):
    with open_pool(path) as pool:
        for round_ in range(8):
            kept = pool.create(f"kept {round_}", MIB, "u1")
            kept[:] = round_ + 1
            pool.create("gone", 6 * MIB, "u1")[:] = 0xEE
            del pool["gone"]
        with pytest.raises(KeyError):
            pool["gone"]
        volatile = pool.full(4 * MIB, 0xDD, "u1")
    del volatile, kept, pool
    with open_pool(path) as pool:
        more = pool.full(9 * MIB, 0xCC, "u1")
        for round_ in range(8):
            assert (pool[f"kept {round_}"] == round_ + 1).all()
        assert more.nbytes == 9 * MIB


def test_what_is_refused(path):
    with open_pool(path, "anonymous:8M") as pool:
        kept = pool.create("a", 10)
        for name in ("", "x" * 256, "a\0b"):
            with pytest.raises(InvalidArgument, match="is no name"):
                pool.create(name, 10)
        with pytest.raises(InvalidArgument, match="already"):
            pool.create("a", 10)
        with pytest.raises(InvalidArgument, match="cannot be kept"):
            pool.create("objects", 10, object)
        with pytest.raises(InvalidArgument, match="8 dimensions"):
            pool.create("deep", (1,) * 9)
        with pytest.raises(InvalidArgument, match="has no named arrays"):
            pool.create("b", 10, region="anonymous:8M")
        with pytest.raises(NoSpace):
            pool.create("large", 64 * MIB)
        with pytest.raises(Busy, match="in use in this process"):
            del pool["a"]
        del kept
        del pool["a"]
        assert list(pool) == []
    with pytest.raises(InvalidArgument, match="names=True"):
        MemoryPool(["anonymous:8M"], block_size="8M").create("a", 10)
    with pytest.raises(InvalidArgument, match="survive the process"):
        MemoryPool([RegionSpec("anonymous:8M", names=True)], block_size="8M")


def test_other_data_is_never_taken_for_a_directory(path):
    with path.open("r+b") as file:
        file.write(b"somebody's data" * 1000)
    with pytest.raises(Corrupt, match="no directory of named arrays and other data"):
        open_pool(path)
    assert path.read_bytes()[:15] == b"somebody's data"


def test_a_region_leaves_with_its_arrays(path):
    with open_pool(path, RegionSpec("anonymous:32M", "other")) as pool:
        array = pool.create("a", MIB, "u1")
        array[:] = 5
        other = pool.full(MIB, 6, "u1", region="named")
        with pytest.raises(Busy, match="named arrays of region named are in use: a"):
            pool.remove("named")
        assert (pool["a"] == 5).all()
        del array
        filler = pool.empty(31 * MIB + 1, "u1", region="other")
        with pytest.raises(NoSpace):
            pool.remove("named")
        assert (pool["a"] == 5).all()
        del filler
        pool.remove("named")
        assert list(pool) == []
        assert (other == 6).all()
        pool.add(RegionSpec(path, "named", names=True))
        assert (pool["a"] == 5).all()
        assert pool.validate() == []


def test_a_namespace_of_an_image_can_be_the_region(tmp_path):
    image = tmp_path / "dimm.img"

    def pmem(*words: str) -> None:
        command = [sys.executable, "-m", "pmemkit", *words]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    pmem("create-image", str(image), "--size", "96M", "--label-size", "128K")
    pmem("create-namespace", str(image), "--mode", "devdax", "--size", "64M")
    region = f"{image}:namespace0.0"
    with MemoryPool([RegionSpec(region, "ns", names=True)], block_size="8M") as pool:
        pool.create("kept", 1000, "u4")[:] = 77
        with pytest.raises(Busy):
            pmemkit.open(region)
    with open_arrays(region) as arrays:
        assert (arrays["kept"] == 77).all()


# --- sharing --------------------------------------------------------------------------------------


def test_readers_beside_a_pool(path):
    with open_pool(path) as pool:
        ours = pool.create("a", (10, 1000), "u4")
        ours[:] = 3
        with open_arrays(path) as arrays:
            theirs = arrays["a"]
            assert (theirs == 3).all()
            ours[:] = 4
            assert (theirs == 4).all()
            with pytest.raises(ValueError, match="read-only"):
                theirs[:] = 5
            with pytest.raises(NotSupported):
                arrays.persist("a")
            pool.create("b", 5)[:] = 1
            assert sorted(arrays) == ["a", "b"]
            del ours
            with pytest.raises(Busy, match=r"process \(?\d+\)?.* has array 'a' open"):
                del pool["a"]
            del theirs
            del pool["a"]
            assert list(arrays) == ["b"]
            with pytest.raises(KeyError):
                arrays["a"]


def test_a_writer_in_another_process(path):
    with open_pool(path) as pool:
        ours = pool.create("a", 1000, "u4")
        text = f"""
from pmemkit import open_arrays
with open_arrays({str(path)!r}, writable=True) as arrays:
    arrays["a"][:] = 9
    arrays.persist("a")
"""
        subprocess.run([sys.executable, "-c", text], check=True, timeout=60)
        assert (ours == 9).all()
        with pytest.raises(Busy, match="this process"):
            open_pool(path)


def test_arrays_without_a_directory(path):
    with pytest.raises(InvalidArgument, match="no named arrays yet"):
        open_arrays(path)


# --- power failures -------------------------------------------------------------------------------


def store_on(medium, size: int) -> DirectoryStore:
    return DirectoryStore.open(medium, size, path="recording", slot_size=SLOT)


def names_in(image: bytes) -> dict[str, bytes]:
    """What a reader finds after a failure: names, and the first bytes of their arrays."""

    class Bytes:
        def read(self, offset: int, length: int) -> bytes:
            return image[offset : offset + length]

    store = DirectoryStore.open(Bytes(), len(image), path="image", slot_size=SLOT, may_format=False)
    return {
        entry.text: image[store.place_of(entry)[0] :][: entry.nbytes]
        for entry in store.directory.entries
    }


def entry(name: str, first: int) -> PoolEntry:
    return make_entry(name, (600,), np.dtype("u8"), "C", first)


@pytest.mark.parametrize("granularity", ["cacheline", "page"])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_power_failure_leaves_the_directory_before_or_after(granularity, seed, scale):
    """Creating and deleting in a random order; garbage in the frames beforehand."""
    size = 2 * SLOT + 8 * 8192
    choose = random.Random(seed)
    garbage = bytes(2 * SLOT) + choose.randbytes(size - 2 * SLOT)
    recording = Recording(size, granularity=granularity, initial=garbage)
    medium = recording.medium()
    store = store_on(medium, size)
    zeroes = bytes(4800)
    after: list[tuple[int, set[str], set[str]]] = []
    there: dict[str, PoolEntry] = {}
    for number in range(scale(8, 20)):
        before = set(there)
        begin = recording.event_count()
        if there and choose.random() < 0.4:
            gone = there.pop(choose.choice(sorted(there)))
            store.delete(gone)
        else:
            free = set(range(0, 16, 2)) - {each.first for each in there.values()}
            if not free:
                continue
            made = entry(f"array {number}", choose.choice(sorted(free)))
            store.insert(made)
            there[made.text] = made
        after.append((begin, before, set(there)))
    after.append((recording.event_count(), set(there), set(there)))
    looked = 0
    for (begin, before, now), (end, _, _) in itertools.pairwise(after):
        for event in range(begin + 1, end + 1):
            limit = scale(6, 64)
            for image in recording.crash_images(event, limit=limit, seed=seed, torn_pages=True):
                found = names_in(image)
                assert set(found) in (before, now)
                assert all(found[name] == zeroes for name in found)
                looked += 1
        assert set(names_in(recording.durable_image(end))) == now
    assert looked > 50


def test_a_failure_while_the_first_directory_is_made_leaves_one_that_can_be_made():
    size = 2 * SLOT + 4 * 8192
    recording = Recording(size, granularity="cacheline", initial=bytes(size))
    store_on(recording.medium(), size)
    for event in range(recording.event_count() + 1):
        for image in recording.crash_images(event, limit=64):
            again = Recording(size, initial=image).medium()
            store = store_on(again, size)
            assert store.directory.entries == ()


# --- hostile directories --------------------------------------------------------------------------


def good_slot() -> tuple[bytes, int]:
    size = 2 * SLOT + 32 * 4096
    medium = Recording(size, initial=bytes(size)).medium()
    store = store_on(medium, size)
    store.insert(entry("first", 0))
    store.insert(entry("second", 4))
    return pack_directory(store.directory), size


def read_of(raw: bytes, size: int):
    whole = raw.ljust(size, b"\0")
    return read_slot(lambda at, length: whole[at : at + length], size, 0, SLOT)


def test_every_wrong_field_is_noticed():
    raw, size = good_slot()
    assert read_of(raw, size)[1] == []
    header, entries = raw[: PoolHeader.SIZE], raw[PoolHeader.SIZE :]
    for what, changed in corruptions(PoolHeader, header):
        found, faults = read_of(changed + entries, size)
        assert found is None, what
        assert faults, what
    for what, changed in corruptions(PoolEntry, entries[: PoolEntry.SIZE]):
        every = changed + entries[PoolEntry.SIZE :]
        summed = PoolHeader.unpack(header)
        sealed = PoolHeader(
            **{
                **{row.name: getattr(summed, row.name) for row in PoolHeader.fields()},
                "entries_checksum": fletcher64(every),
            }
        ).sealed()
        found, faults = read_of(sealed + every, size)
        assert found is None, what
        assert faults, what


def test_entries_that_overlap_or_share_a_name_are_noticed():
    size = 2 * SLOT + 32 * 4096
    for second, wrong in ((entry("second", 1), "inside another"), (entry("first", 8), "twice")):
        medium = Recording(size, initial=bytes(size)).medium()
        store = store_on(medium, size)
        store.insert(entry("first", 0))
        store.insert(second)
        _, faults = read_of(pack_directory(store.directory), size)
        assert wrong in str(faults[0])
