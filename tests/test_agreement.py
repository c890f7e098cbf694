"""What Python and the Rust core both know is the same on both sides."""

import errno
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from pmemkit import _native, errors
from pmemkit.serve.nbd_protocol import TransmissionFlag

ROOT = Path(__file__).resolve().parents[1]

CLASSES = [
    getattr(errors, name)
    for name in errors.__all__
    if getattr(errors, name) is not errors.PmemError
]


def test_every_kind_has_one_class_and_every_class_one_kind():
    kinds = [kind for kind, _ in _native.error_kinds()]
    assert len(set(kinds)) == len(kinds)
    assert sorted(cls.kind for cls in CLASSES) == sorted(kinds)


def test_default_errnos_are_equal():
    ours = {cls.kind: cls.default_errno for cls in CLASSES}
    assert ours == dict(_native.error_kinds())


def test_exit_codes_tell_classes_apart():
    assert all(0 < cls.exit_code < 126 for cls in CLASSES)
    # A subclass and the two kinds of a wrong argument may share theirs.
    codes = {cls.exit_code for cls in CLASSES}
    assert len(codes) == len(CLASSES) - 2


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_tree_in_the_head_of_errors_is_true(cls):
    (row,) = re.findall(rf"─ {cls.__name__} +(of the call|E[A-Z]+) +(\d+)$", errors.__doc__, re.M)
    if row[0] != "of the call":
        assert getattr(errno, row[0]) == cls.default_errno
    assert int(row[1]) == cls.exit_code


def test_transmission_flags_are_equal():
    prefix = "NBD_FLAG_"
    core = {
        name.removeprefix(prefix): value
        for name, value in _native.constants().items()
        if name.startswith(prefix)
    }
    assert core
    assert core == {name: TransmissionFlag[name].value for name in core}


def test_constants_of_the_wire_are_those_of_the_protocol():
    constants = _native.constants()
    # From the NBD protocol text; no module on the Python side needs them.
    assert constants["NBD_REQUEST_MAGIC"] == 0x25609513
    assert constants["NBD_SIMPLE_REPLY_MAGIC"] == 0x67446698
    assert constants["NBD_STRUCTURED_REPLY_MAGIC"] == 0x668E33EF


def test_every_device_advertises_the_payload_limit_of_the_core():
    device = _native.block.raw(_native.media.map_anonymous(1 << 20))
    assert device.payload_size_max == _native.constants()["PAYLOAD_SIZE_MAX"]


def test_versions_are_equal():
    workspace = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))
    version = workspace["workspace"]["package"]["version"]
    assert _native.version() == version
    assert importlib.metadata.version("pmemkit") == version


def test_an_error_of_the_core_arrives_as_its_class():
    medium = _native.media.map_anonymous(4096)
    with pytest.raises(errors.OutOfRange) as raised:
        medium.read(4096, 1)
    assert (raised.value.errno, raised.value.offset) == (errno.EINVAL, 4096)
