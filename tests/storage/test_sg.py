"""Scatter-gather across regions, from Python."""

import os
import threading

import pytest

import pmemkit
from pmemkit import sg
from pmemkit._native import sg as native_sg
from pmemkit.errors import (
    Busy,
    Closed,
    InvalidArgument,
    MediaError,
    NotSupported,
    OutOfRange,
    ReadOnly,
)
from pmemkit.media.badblocks import BadRun, note

MIB = 1 << 20
SPECS = ["anonymous:2M", "memfd:2M", "file", "lines"]


@pytest.fixture
def opened(tmp_path):
    """Opens a region of a kind; closed at the end."""
    regions = []

    def open_one(spec, **more):
        place = spec
        if spec in ("file", "lines"):
            place = tmp_path / f"{spec}-{len(regions)}"
            place.write_bytes(bytes(2 * MIB))
            more |= {"granularity": "cacheline"} if spec == "lines" else {}
        regions.append(pmemkit.open(place, **more))
        return regions[-1]

    yield open_one
    for region in regions:
        region.close()


@pytest.mark.parametrize("target", SPECS)
@pytest.mark.parametrize("source", SPECS)
def test_several_ranges_go_from_one_region_to_another(opened, source, target):
    one, two = opened(source), opened(target)
    data = os.urandom(2 * MIB)
    one.device().write(0, data)
    moved = sg.copy(
        [(one, 0, 5000), (one, MIB + 1, 7000)],
        [(two, 4095, 2), (two, MIB, 11_990), (two, 0, 8)],
        durable=True,
    )
    taken = data[:5000] + data[MIB + 1 :][:7000]
    assert moved == len(taken)
    found = two.device()
    assert found.read(4095, 2) + found.read(MIB, 11_990) + found.read(0, 8) == taken
    assert found.read(8, 4087) == bytes(4087)


def test_buffers_and_regions_mix(opened):
    region, back = opened("memfd:2M"), bytearray(20)
    sg.copy([(b"-hello-", 1, 5), (memoryview(b"world"), 0, 5)], [(region, 4090, 10)])
    assert region.device().read(4090, 10) == b"helloworld"
    sg.copy([(region, 4090, 10)], [(back, 10, 10)])
    assert back == bytes(10) + b"helloworld"


def test_what_is_refused_moved_nothing(opened):
    one, two = opened("memfd:2M"), opened("memfd:2M")
    sealed = opened("file", read_only=True)
    cases = [
        (InvalidArgument, [(one, 0, 10)], [(two, 0, 9)]),
        (InvalidArgument, [(one, 0, 10)], [(one, 5, 10)]),
        (InvalidArgument, [(b"12345", 0, 5)], [(b"12345", 0, 5)]),
        (OutOfRange, [(one, 2 * MIB, 1)], [(two, 0, 1)]),
        (OutOfRange, [(one, 0, 10)], [(bytearray(9), 0, 10)]),
        (OutOfRange, [(one, -1, 10)], [(two, 0, 10)]),
        (ReadOnly, [(one, 0, 10)], [(sealed, 0, 10)]),
    ]
    for error, source, target in cases:
        with pytest.raises(error) as refused:
            sg.copy(source, target)
        assert refused.value.moved is None
    assert sg.copy([], []) == 0
    one.close()
    with pytest.raises(Closed):
        sg.copy([(one, 0, 1)], [(two, 0, 1)])


def test_a_failure_says_how_much_was_moved(tmp_path, opened):
    image, two = tmp_path / "bad.img", opened("memfd:2M")
    image.write_bytes(b"x" * MIB)
    note(str(image), "inject", BadRun(8, 1))
    with pmemkit.open(image) as one:
        with pytest.raises(MediaError, match="1000 of 5000 bytes were copied") as failed:
            sg.copy([(one, 0, 1000), (one, 2000, 4000)], [(two, 0, 5000)], durable=True)
        assert failed.value.moved == 1000
        assert two.device().read(0, 1001) == b"x" * 1000 + b"\0"
        # A write over a bad block clears it, here as everywhere.
        sg.copy([(two, 0, 4096)], [(one, 4096, 4096)])
        assert one.device().read(4096, 512) == b"x" * 512


def test_regions_with_a_write_path_of_their_own_are_refused(opened, tmp_path):
    from pmemkit.cli import main

    image = str(tmp_path / "sector.img")
    assert main(["create-image", image, "--size", "64M"]) == 0
    assert main(["create-namespace", image, "--mode", "sector"]) == 0
    cached = opened("memfd:2M")
    cached.device(cache="writeback", cache_size="1M")
    with pmemkit.open(f"{image}:namespace0.0") as sectors:
        for region, error in ((sectors, NotSupported), (cached, Busy)):
            with pytest.raises(error):
                sg.copy([(bytes(512), 0, 512)], [(region, 0, 512)])


def test_closing_a_region_ends_the_copies_that_use_it(opened):
    one, two = opened("memfd:32M"), opened("memfd:32M")
    ended = []

    def copy_on():
        try:
            while True:
                sg.copy([(one, 0, 32 * MIB)], [(two, 0, 32 * MIB)])
        except Closed as error:
            ended.append(error)

    copies = threading.Thread(target=copy_on)
    copies.start()
    while not two.device().read(32 * MIB - 4096, 1) and two.device().extents()[0].kind == "hole":
        pass
    two.close()
    copies.join(30)
    assert len(ended) == 1
    assert ended[0].moved is None or ended[0].moved < 32 * MIB


def test_a_region_is_forgotten_when_it_is_closed():
    with pmemkit.open("memfd:1M") as region:
        number = region.lend("copy", write=True)
        assert region.lend("copy", write=False) == number
        assert native_sg.copy([(number, 0, 8)], [(number, 8, 8)]) == 8
    assert not native_sg.remove(number)
    with pytest.raises(Closed):
        native_sg.copy([(number, 0, 8)], [(bytearray(8), 0, 8)])
