"""Layers as text, and the table they come from."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pmemkit
from pmemkit.errors import InvalidArgument, PmemError
from pmemkit.storage.layers import LAYERS, layer_help, parse_layer


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("noop", "noop", {}),
        ("trace", "trace", {}),
        ("trace=capacity=10,file=x", "trace", {"capacity": 10, "file": "x"}),
        ("delay=ops=write,seconds=0.01", "delay", {"ops": "write", "seconds": 0.01}),
        (
            "fault=ops=read,nth=3,offset=1M,length=4K,errno=5",
            "fault",
            {"ops": "read", "nth": 3, "offset": 1 << 20, "length": 4096, "errno": errno.EIO},
        ),
        ("fault=ops=read+write,count=0", "fault", {"ops": "read,write", "count": 0}),
        ("fault=errno=enospc", "fault", {"errno": errno.ENOSPC}),
    ],
)
def test_a_layer_reads(text, name, options):
    layer = parse_layer(text)
    assert (layer.name, dict(layer.options)) == (name, options)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "'' is not a layer; layers are fault"),
        ("explode", "'explode' is not a layer"),
        ("fault=often", "'often' is not an option; it takes ops="),
        ("fault=when=now", "'when=now' is not an option"),
        ("fault=nth=1,nth=2", "nth is given twice"),
        ("fault=nth=-1", "nth: '-1' is not a count"),
        ("fault=offset=1Z", "offset: '1Z' is not a size"),
        ("fault=ops=read+explode", "ops: 'explode' is not an op"),
        ("fault=errno=EWHAT", "errno: 'EWHAT' is not an errno"),
        ("fault=errno=0", "errno: '0' is not an errno"),
        ("delay", "seconds= is missing"),
        ("delay=seconds=soon", "seconds: 'soon' is not a time"),
        ("delay=seconds=-1", "'-1' is not a time"),
        ("delay=seconds=inf", "'inf' is not a time"),
        ("trace=file=", "file: a path is missing"),
        ("noop=x=1", "it takes nothing"),
    ],
)
def test_a_layer_that_does_not_read_says_why(text, sentence):
    with pytest.raises(InvalidArgument) as refused:
        parse_layer(text)
    assert sentence in refused.value.message


@given(st.text(max_size=30) | st.from_regex(r"(fault|delay|trace)=[a-z]+=[0-9A-Za-z+]+"))
def test_any_text_is_a_layer_or_refused(text):
    try:
        layer = parse_layer(text)
    except InvalidArgument:
        return
    assert layer.name in LAYERS


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_of_the_table_can_be_added(name):
    text = {"delay": "delay=seconds=0"}.get(name, name)
    with pmemkit.open("anonymous:1M") as region, region.device(layers=[text]) as device:
        try:
            device.read(0, 1)
        except PmemError:
            assert name == "fault"


def test_the_help_has_every_option():
    text = layer_help()
    for name, kind in LAYERS.items():
        assert f"  {name}" in text
        assert all(option.what in text for option in kind.options.values())
