"""Wear levelling of mode sector from Python: what is refused, what it does, what it gains."""

import pytest

import pmemkit
from pmemkit import _native
from pmemkit.bench._levelling import arenas_for, lifetime
from pmemkit.bus import machine_of
from pmemkit.errors import InvalidArgument
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.storage.levelling import LEVELLING_PERIOD
from pmemkit.testing.sectors import SmallArena

HAMMERED = 7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"levelling": "most-worn"}, "'most-worn' is none of off, random, least-worn"),
        ({"levelling": "random", "levelling_period": 0}, "a levelling period of 0 writes"),
    ],
)
def test_what_the_engine_would_not_take_is_refused_at_the_door(tmp_path, options, said):
    with pytest.raises(InvalidArgument, match=said):
        pmemkit.open(tmp_path / "none.img", **options)
    arena = SmallArena()
    medium = _native.media.map_anonymous(1 << 20)
    medium.write(0, arena.fresh())
    wanted = (options["levelling"], options.get("levelling_period", 1), 1)
    numbers = (0, 512, 64, 512, 68, 4, 64, arena.mapoff, arena.logoff, False)
    with pytest.raises(InvalidArgument):
        _native.btt.Engine(medium, [numbers], levelling=wanted)


@pytest.mark.parametrize("levelling", ["off", "random", "least-worn"])
def test_sectors_are_moved_where_it_is_wanted(tmp_path, levelling):
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    with open_images(machine_of([image])) as images:
        create(images, None, Wish(mode="sector", sector_size=512, arena_size=16 << 20))
    place = f"{image}:namespace0.0"
    options = {"levelling": levelling, "levelling_period": 8}
    with pmemkit.open(place, **options) as region, region.device() as device:
        for number in range(400):
            device.write(0, number.to_bytes(2, "little") * 256)
        assert device.read(0, 1024) == (399).to_bytes(2, "little") * 256 + bytes(512)
        moved = region.relocations
        assert moved == 0 if levelling == "off" else 0 < moved <= 400 // 8 + 1
        assert region.validate() == []


def test_one_hot_sector_uses_nine_tenths_of_the_media():
    arenas = arenas_for(1, 16 << 20)
    plain = lifetime(arenas, [HAMMERED], "off")
    levelled = lifetime(arenas, [HAMMERED], "least-worn")
    assert plain.share < 1 <= 90 <= levelled.share
    assert 0 < levelled.extra <= 100 / LEVELLING_PERIOD + 0.01
    # The log is used evenly, and has its place all the same.
    assert plain.first_line(64, "log") < 0.1 < 2 < levelled.first_line(64, "log") < 3.2
