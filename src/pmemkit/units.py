"""Sizes as people write them: ``1G`` is 2^30 bytes, as ndctl and qemu-img read it."""

import re

from pmemkit.errors import InvalidArgument

__all__ = ["format_size", "parse_size"]

_SUFFIXES = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
# The digits are bounded: Python refuses to convert thousands of them with an error of its own.
_SIZE = re.compile(
    r"\s*(\d{1,32})(?:\.(\d{1,32}))?\s*([bkmgtpe]?)(?:ib|b)?\s*", re.IGNORECASE | re.ASCII
)
_SIZE_MAX = 2**63 - 1


def parse_size(text: str) -> int:
    """Bytes of a size such as ``4096``, ``512M``, ``1.5G``, ``2TiB`` (all powers of 1024).

    Raises :class:`InvalidArgument` for anything else, for a fraction of a byte, and for sizes past
    2^63 - 1.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidArgument(f"{text!r} is not a size; write it as 4096, 512M or 1.5G")
    whole, fraction, suffix = match.groups()
    shift = _SUFFIXES[suffix.lower()]
    fraction = fraction or ""
    scaled = int(whole + fraction) << shift
    scale: int = 10 ** len(fraction)
    size, rest = divmod(scaled, scale)
    if rest:
        raise InvalidArgument(f"{text!r} is not a whole number of bytes")
    if size > _SIZE_MAX:
        raise InvalidArgument(f"{text!r} is larger than {_SIZE_MAX} bytes")
    return size


def format_size(size: int) -> str:
    """A size for people: ``1.50 GiB``, two decimals at most, exact where it is whole."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if round(value, 2) < 1024 or unit == "PiB":
            return f"{value:.0f} {unit}" if value == int(value) else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
