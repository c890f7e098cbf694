"""Machine files: what they say, what is refused and where."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemkit.bus.machine import DimmSpec, Machine, load_machine, to_toml
from pmemkit.errors import InvalidArgument

MIB = 1 << 20


def load(tmp_path: Path, text: str) -> Machine:
    path = tmp_path / "machine.toml"
    path.write_text(text)
    return load_machine(path)


def test_every_key_but_the_path_has_the_value_of_qemu(tmp_path) -> None:
    machine = load(tmp_path, '[[dimm]]\npath = "a.img"\n[[dimm]]\npath = "b.img"\n')
    first, second = machine.dimms
    assert first.path == str(tmp_path / "a.img")
    assert (first.slot, first.handle, first.serial_number) == (0, 1, 0x123456)
    assert (second.slot, second.handle, second.serial_number) == (1, 2, 0x123457)
    assert (first.label_size, first.align, first.nature) == (0, 2 * MIB, "unknown")
    assert first.id == "8680-56341200"
    assert machine.sets == ((0,), (1,))


def test_a_file_that_says_everything(tmp_path) -> None:
    text = """
    [[dimm]]
    path = "/images/a"
    label_size = "128K"
    align = 4096
    slot = 3
    serial = 0x11223344
    vendor_id = 0x1234
    manufacturing_date = 0x0102
    manufacturing_location = 3
    nature = "storage"
    numa_node = 1
    endurance = "20P"
    unarmed = true
    [[dimm]]
    path = "b"
    region_offset = 512
    [[region]]
    dimms = [1, 0]
    """
    machine = load(tmp_path, text)
    first = machine.dimms[0]
    assert first.path == "/images/a"
    assert first.label_size == 131072
    assert first.endurance == 20 << 50
    assert first.unarmed
    assert first.id == "3412-03-0201-44332211"
    assert machine.sets == ((1, 0),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no [[dimm]]"),
        ("[[dimm]]\n", "dimm 0 has no path"),
        ("[[dimm]]\npath = 3\n", "dimm 0 has no path"),
        ("nonsense", "is no TOML"),
        ('[[dimm]]\npath = "a"\ncolour = 3\n', "dimm 0: 'colour' is not one of"),
        ('[dim]\npath = "a"\n', "'dim' is not known; there are [[dimm]] and [[region]]"),
        ('[[dimm]]\npath = "a"\nslot = "1"\n', "dimm 0: slot = '1' is no int"),
        ('[[dimm]]\npath = "a"\nslot = true\n', "dimm 0: slot = True is no int"),
        ('[[dimm]]\npath = "a"\nunarmed = 1\n', "dimm 0: unarmed = 1 is no bool"),
        ('[[dimm]]\npath = "a"\nslot = 256\n', "slot = 256 is more than 255"),
        ('[[dimm]]\npath = "a"\nserial = -1\n', "serial = -1 is out of range"),
        ('[[dimm]]\npath = "a"\nserial = 4294967296\n', "serial = 4294967296 is more than"),
        ('[[dimm]]\npath = "a"\nnature = "ram"\n', "nature 'ram' is none of"),
        ('[[dimm]]\npath = "a"\nalign = 5000\n', "align 5000 is no power of two from 4096 on"),
        ('[[dimm]]\npath = "a"\nlabel_size = 1026\n', "1026 bytes is no multiple of 4"),
        ('[[dimm]]\npath = "a"\nlabel_size = "many"\n', "many"),
        ('[[dimm]]\npath = "a"\n[[region]]\ndimms = [1]\n', "dimm 1 of a region is not there"),
        ('[[dimm]]\npath = "a"\n[[region]]\ndimms = [0, 0]\n', "or is in two regions"),
        ('[[dimm]]\npath = "a"\n[[region]]\nways = 2\n', "[[region]] has dimms = [numbers]"),
        ('[[dimm]]\npath = "a"\nslot = 1\n[[dimm]]\npath = "b"\n', "have the same handle: [2, 2]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, text, message) -> None:
    with pytest.raises(InvalidArgument) as refused:
        load(tmp_path, text)
    assert message in str(refused.value)


SPECS = st.builds(
    DimmSpec,
    path=st.just("/images/some.img"),
    label_size=st.integers(0, 1 << 20).map(lambda n: 4 * n),
    align=st.integers(12, 30).map(lambda n: 1 << n),
    serial=st.none() | st.integers(0, 0xFFFFFFFF),
    vendor_id=st.integers(0, 0xFFFF),
    nature=st.sampled_from(["storage", "memory", "unknown"]),
    numa_node=st.integers(0, 9),
    endurance=st.none() | st.integers(0, 1 << 62),
    latency_ns=st.none() | st.integers(1, 1 << 31),
    bandwidth=st.none() | st.integers(1, 1 << 62),
    distance=st.none() | st.integers(1, 255),
    unarmed=st.booleans(),
    address=st.none() | st.integers(0, 1 << 52),
    region_offset=st.integers(0, 1 << 40),
)


@given(st.lists(SPECS, min_size=1, max_size=4))
def test_what_is_written_is_read_back(tmp_path_factory, dimms) -> None:
    machine = Machine.of(dimms)
    path = tmp_path_factory.mktemp("machine") / "machine.toml"
    path.write_text(to_toml(machine, "/elsewhere"))
    assert load_machine(path).dimms == machine.dimms


def test_images_below_the_machine_file_are_named_relative_to_it(tmp_path) -> None:
    machine = Machine.of([DimmSpec(path=str(tmp_path / "sub" / 'a "b".img'))])
    text = to_toml(machine, str(tmp_path))
    assert 'path = "sub/a \\"b\\".img"' in text
    assert load(tmp_path, text).dimms == machine.dimms


def test_sizes_and_addresses_follow_qemu() -> None:
    """The region is cut to the alignment; each dimm begins behind the one before it."""
    plain = DimmSpec(path="a", label_size=128 << 10)
    assert plain.region_size(128 * MIB) == 134086656
    assert replace(plain, align=2 * MIB).region_size(128 * MIB) == 132120576
    assert plain.region_size(4096) == 0
    two = Machine.of([plain, replace(plain, path="b")])
    assert two.addresses([64 * MIB] * 2) == [0x100000000, 0x103FE0000]
    aligned = Machine.of([replace(plain, align=2 * MIB), replace(plain, path="b", align=2 * MIB)])
    assert aligned.addresses([64 * MIB] * 2) == [0x100000000, 0x103E00000]
