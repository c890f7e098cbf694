"""Fletcher-64 as libnvdimm computes it over labels, index blocks and info blocks.

The input is taken as little-endian 32-bit words. The low half of the result is their sum, the high
half the sum of all running sums, both modulo 2^32. Source: the kernel's ``nd_fletcher64`` (read,
not copied); checked against blocks that ndctl and the kernel wrote.

What this does not do: take the checksum field as zero
(:meth:`pmemkit.formats.layout.Layout.checksum_of` does).
"""

import struct
from itertools import accumulate

__all__ = ["fletcher64"]

_MASK = 0xFFFFFFFF


def fletcher64(data: bytes) -> int:
    """The sum of ``data``, whose length is a multiple of 4 (``ValueError`` otherwise)."""
    if len(data) % 4:
        raise ValueError(f"{len(data)} bytes are not whole 32-bit words")
    words = struct.unpack(f"<{len(data) // 4}I", data)
    low = high = 0
    for running in accumulate(words):
        low = running
        high += running & _MASK
    return (high & _MASK) << 32 | (low & _MASK)
