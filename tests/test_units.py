"""Sizes as people write them, and as they read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemkit.errors import InvalidArgument
from pmemkit.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("512M", 512 << 20),
        ("1G", 1 << 30),
        ("1g", 1 << 30),
        (" 1 GiB ", 1 << 30),
        ("1GB", 1 << 30),
        ("1.5G", 3 << 29),
        ("0.5k", 512),
        ("2TiB", 2 << 40),
        ("7E", 7 << 60),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a size"),
        ("G", "is not a size"),
        ("-1", "is not a size"),
        ("1 2", "is not a size"),
        ("1e9", "is not a size"),
        ("0x10", "is not a size"),
        ("1Z", "is not a size"),
        ("\N{ARABIC-INDIC DIGIT ONE}", "is not a size"),
        ("9" * 5000, "is not a size"),
        ("0.3", "whole number of bytes"),
        ("1.0001k", "whole number of bytes"),
        ("8E", "is larger than"),
        ("9223372036854775808", "is larger than"),
    ],
)
def test_what_is_no_size_is_refused_with_the_text_in_it(text, reason):
    with pytest.raises(InvalidArgument, match=reason) as refused:
        parse_size(text)
    assert repr(text) in refused.value.message


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.50 KiB"),
        (1 << 30, "1 GiB"),
        ((1 << 20) - 1, "1 MiB"),
        ((1 << 20) - 10240, "1014 KiB"),
        (3 << 29, "1.50 GiB"),
        (1 << 62, "4096 PiB"),
    ],
)
def test_sizes_for_people(size, text):
    assert format_size(size).replace(".00", "") == text


@given(st.integers(0, 2**63 - 1))
def test_a_plain_number_is_itself(size):
    assert parse_size(str(size)) == size


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text):
    try:
        size = parse_size(text)
    except InvalidArgument:
        return
    assert 0 <= size < 2**63
