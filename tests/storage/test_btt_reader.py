"""A namespace of mode sector as a device, compared with the slow reader; and readers in Python."""

import errno
import random

import pytest

from pmemkit._native import block
from pmemkit.bus import machine_of, observe
from pmemkit.errors import MediaError, OutOfRange, PmemError, ReadOnly
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels
from pmemkit.storage.btt_reader import BttReader
from pmemkit.storage.region import open_region

MIB = 1 << 20


@pytest.fixture
def image(tmp_path):
    """An image with a sector namespace of 4096-byte sectors behind a raw one."""
    path = tmp_path / "a.img"
    with path.open("wb") as file:
        file.truncate(128 * MIB + (128 << 10))
    with open_images(machine_of([path], label_size=128 << 10)) as images:
        init_labels(images, 0, version=(1, 2))
        create(images, None, Wish(mode="raw", size=16 * MIB))
        create(images, None, Wish(mode="sector", size=32 * MIB))
    return path


def test_opened_read_only_it_stores_nothing(image):
    before = image.read_bytes()
    with open_region(f"{image}:namespace0.1", read_only=True) as region:
        assert (region.mode, region.read_only) == ("sector", True)
        device = region.device()
        assert device.read(4090, 10000) == bytes(10000)
        with pytest.raises(ReadOnly):
            device.write(0, b"x")
        assert region.validate() == []
    assert image.read_bytes() == before


def test_bytes_of_any_range_are_kept_and_the_slow_reader_agrees(image):
    choose = random.Random(5)
    with open_region(f"{image}:namespace0.1") as region:
        device = region.device()
        assert device.size % 4096 == 0
        model = bytearray(1 << 17)
        for _ in range(150):
            offset = choose.randrange(len(model))
            data = choose.randbytes(choose.randrange(len(model) - offset) % 20000 + 1)[
                : len(model) - offset
            ]
            assert device.write(offset, data) == len(data)
            model[offset : offset + len(data)] = data
            offset, length = choose.randrange(len(model) - 5000), choose.randrange(5000)
            assert device.read(offset, length) == model[offset : offset + length]
            target = bytearray(length)
            device.readinto(offset, target)
            assert target == model[offset : offset + length]
        with pytest.raises(OutOfRange):
            device.read(device.size - 1, 2)
        with pytest.raises(OutOfRange):
            device.write(device.size - 1, b"xx")
        assert region.validate() == []
    here = observe(machine_of([image])).namespace("namespace0.1")
    content = image.read_bytes()[here.offset :]
    reader = BttReader(
        lambda offset, length: content[offset : offset + length],
        here.size,
        version=here.claim.version,
        parent_uuid=here.uuid,
    )
    assert reader.read(0, len(model)) == model
    assert reader.size == device_size(image)


def device_size(image):
    with open_region(f"{image}:namespace0.1", read_only=True) as region:
        return region.device().size


def test_two_namespaces_of_an_image_are_open_for_writing_at_once(image):
    with (
        open_region(f"{image}:namespace0.0") as first,
        open_region(f"{image}:namespace0.1") as second,
    ):
        first.device().write(0, b"raw")
        assert second.device().read(0, 3) == bytes(3)
        with pytest.raises(PmemError, match="has it open"), open_images(machine_of([image])):
            pass


def test_what_is_written_in_a_raw_namespace_stays_in_it(image):
    with open_region(f"{image}:namespace0.0") as region:
        assert region.size == 16 * MIB
        region.device().write(region.size - 4, b"last")
        region.device().flush()
    assert image.read_bytes()[16 * MIB - 4 : 16 * MIB + 1] == b"lastB"


def test_errors_of_the_callable_keep_their_kind():
    def fail(offset, length):
        raise MediaError("poison", op="read", offset=offset)

    channel = block.python_reader(4096, 512, fail).channel(read_only=True)
    with pytest.raises(MediaError, match="poison"):
        channel.read(0, 512)


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda offset, length: b"short", "5 bytes came, 512 were asked for"),
        (lambda offset, length: 7, "TypeError"),
        (lambda offset, length: 1 // 0, "division"),
        (lambda offset, length: (_ for _ in ()).throw(OSError(errno.EIO, "no")), "no"),
    ],
)
def test_a_callable_that_misbehaves_is_an_error(read, said):
    channel = block.python_reader(4096, 512, read).channel(read_only=True)
    with pytest.raises(PmemError, match=said):
        channel.read(0, 512)


def test_a_sector_size_is_a_power_of_two():
    with pytest.raises(PmemError, match="500 bytes is no power of two"):
        block.python_reader(4096, 500, lambda offset, length: b"")


def test_any_range_reads_as_the_callable_says_and_nothing_else_is_offered():
    content = random.Random(1).randbytes(1 << 18)
    device = block.python_reader(
        len(content), 4096, lambda offset, length: content[offset : offset + length]
    )
    assert device.caps == {"multi_conn"}
    channel = device.channel()
    choose = random.Random(2)
    for _ in range(200):
        offset = choose.randrange(len(content))
        length = choose.randrange(len(content) - offset)
        assert channel.read(offset, length) == content[offset : offset + length]
    with pytest.raises(PmemError):
        channel.write(0, b"x")
    for refused in (channel.flush, lambda: channel.discard(0, 1), lambda: channel.zero(0, 1)):
        with pytest.raises(PmemError):
            refused()
    with pytest.raises(OutOfRange):
        channel.read(len(content), 1)
