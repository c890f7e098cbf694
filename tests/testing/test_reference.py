"""The reference device: the few things that the conformance suite takes from it on trust."""

import pytest

from pmemkit.errors import InvalidArgument, NotSupported, OutOfRange, ReadOnly
from pmemkit.testing import ReferenceDevice


def test_bytes_written_are_the_bytes_there():
    device = ReferenceDevice(32)
    assert device.write(3, bytearray(b"abcdef")) == 6
    device.zero(4, 2)
    assert device.peek(0, 10) == b"\0\0\0a\0\0def\0"
    device.poke(0, b"zz")
    assert device.read(0, 4) == b"zz\0a"
    assert device.extents(0, 32) == [
        (2, False),
        (1, True),
        (1, False),
        (2, True),
        (3, False),
        (23, True),
    ]
    device.zero(0, 32, no_hole=True)
    assert device.extents(0, 32) == [(32, False)]
    assert device.extents(32, 0) == []


def test_it_refuses_with_the_right_class():
    device = ReferenceDevice(4096, caps={"write", "flush"}, block_size_min=512)
    with pytest.raises(OutOfRange) as caught:
        device.read(4096, 512)
    assert (caught.value.op, caught.value.offset) == ("read", 4096)
    with pytest.raises(InvalidArgument):
        device.write(0, b"x")
    with pytest.raises(NotSupported):
        device.zero(0, 512)
    with pytest.raises(NotSupported):
        device.write(0, bytes(512), fua=True)
    with pytest.raises(OutOfRange):
        device.read(-512, 512)
    with pytest.raises(ReadOnly):
        ReferenceDevice(4096, read_only=True).write(0, b"x")
    assert device.extents(5, 7) == [(7, False)]
