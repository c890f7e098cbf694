"""What owners declare of their hardware: which dimms and regions it fits, and what is refused."""

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemkit.bus import declarations
from pmemkit.bus.declarations import (
    Declaration,
    declared_evidence,
    load_declarations,
    parse_declarations,
)
from pmemkit.bus.evidence_kernel import KernelDimm, KernelRegion
from pmemkit.bus.machine import DimmSpec, Machine, to_toml
from pmemkit.bus.nature import judge
from pmemkit.errors import InvalidArgument, SystemFailure

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

QEMU_FIRST = KernelDimm(dev="nmem0", id="8680-56341200", serial=0x56341200, handle=1)
"""The first NVDIMM of a QEMU machine, as Linux 6.1 has it in sysfs: serial 0x123456 of the NFIT."""
QEMU_SECOND = KernelDimm(dev="nmem1", id="8680-57341200", serial=0x57341200, handle=2)
CXL = KernelDimm(dev="mem0", serial=0x77)


def region(*dimms, dev="region1"):
    return KernelRegion(dev=dev, dimms=dimms)


def declared(text, of):
    """The verdict by declarations alone."""
    return judge(declared_evidence(parse_declarations(text, "m.toml"), of))


# --- what fits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        "serial = 0x123456",
        "serial = 0x56341200",
        "handle = 1",
        'id = "8680-56341200"',
        'region = "region1"',
        'serial = 0x123456\nhandle = 1\nid = "8680-56341200"\nregion = "region1"',
        'path = "a.img"',
        'path = "a.img"\nserial = 0x123456',
    ],
)
def test_a_dimm_is_found_by_each_of_its_names(names):
    text = f'[[dimm]]\n{names}\nnature = "memory"\n'
    verdict = declared(text, region(QEMU_FIRST))
    assert (verdict.nature, verdict.because) == ("memory", "m.toml:1 says nature memory")


@pytest.mark.parametrize(
    "names",
    [
        "serial = 0x123457",
        "handle = 2",
        'id = "8680-57341200"',
        'region = "region2"',
        # All of it has to fit.
        "serial = 0x123456\nhandle = 2",
        'id = "8680-56341200"\nregion = "region2"',
        'path = "a.img"\nslot = 1',
        'path = "a.img"\nserial = 5',
    ],
)
def test_what_fits_nothing_declares_nothing(names):
    text = f'[[dimm]]\n{names}\nnature = "memory"\n'
    assert declared_evidence(parse_declarations(text, "m.toml"), region(QEMU_FIRST)) == []


def test_an_id_may_be_written_in_capitals():
    dimm = KernelDimm(dev="nmem0", id="8089-a2-1837-00000be8")
    text = '[[dimm]]\nid = "8089-A2-1837-00000BE8"\nnature = "memory"\n'
    assert declared(text, region(dimm)).nature == "memory"


def test_a_dimm_without_a_serial_number_is_not_found_by_one():
    dimm = KernelDimm(dev="nmem0")
    text = '[[dimm]]\nserial = 0\nnature = "memory"\n'
    assert declared(text, region(dimm)).evidence == ()


def test_a_cxl_device_is_found_by_its_serial_number():
    text = '[[dimm]]\nserial = 0x77\nnature = "memory"\n'
    assert declared(text, region(CXL)).nature == "memory"
    long = KernelDimm(dev="mem0", serial=1 << 63)
    text = f'[[dimm]]\nserial = {(1 << 64) - 1}\nnature = "memory"\n'
    assert declared(text, region(long)).evidence == ()


@pytest.mark.parametrize("dev", ["region0", "hmem.0", "hmem_platform.0", "dax_region0"])
def test_a_whole_region_is_declared_by_its_name_and_needs_no_dimms(dev):
    text = f'[[dimm]]\nregion = "{dev}"\nnature = "memory"\nendurance = "1P"\n'
    verdict = declared(text, region(dev=dev))
    assert (verdict.nature, verdict.wears, verdict.endurance) == ("memory", True, 1 << 50)
    assert declared(text, region(QEMU_FIRST, QEMU_SECOND, dev=dev)).endurance == 1 << 50


def test_of_a_set_every_dimm_has_to_be_declared_memory():
    one = '[[dimm]]\nhandle = 1\nnature = "memory"\n'
    both = one + '[[dimm]]\nhandle = 2\nnature = "memory"\n'
    of = region(QEMU_FIRST, QEMU_SECOND)
    assert declared(one, of).nature == "storage"
    assert (
        declared(both, of).because == "m.toml:1 says nature memory and m.toml:4 says nature memory"
    )
    assert declared(both.replace("memory", "storage", 1), of).nature == "storage"


def test_endurance_of_a_dimm_counts_for_each_of_a_set():
    text = '[[dimm]]\nhandle = 1\nendurance = "20P"\n'
    verdict = declared(text, region(QEMU_FIRST, QEMU_SECOND))
    assert (verdict.nature, verdict.wears, verdict.endurance) == ("storage", True, 40 << 50)


def test_an_unknown_nature_says_nothing():
    text = '[[dimm]]\nhandle = 1\nnature = "unknown"\n'
    assert declared(text, region(QEMU_FIRST)).evidence == ()


def test_a_machine_file_of_images_declares_the_dimms_of_its_guest(tmp_path):
    specs = [
        DimmSpec(path="a.img", nature="memory", label_size=131072, numa_node=1),
        DimmSpec(path="b.img", nature="storage", endurance=20 << 50),
    ]
    text = to_toml(Machine.of(specs), tmp_path)
    first, second = (declared(text, region(each)) for each in (QEMU_FIRST, QEMU_SECOND))
    assert (first.nature, first.wears) == ("memory", False)
    assert (second.nature, second.wears, second.endurance) == ("storage", True, 20 << 50)
    assert "nature storage" in second.because


# --- what is refused ------------------------------------------------------------------------------

WRONG = [
    ("", "m.toml: there is no [[dimm]]"),
    ("dimm = 3", "m.toml: there is no [[dimm]]"),
    ("dimm = [3]", "m.toml, dimm 0: dimm 0 is no table"),
    ("[[dimm]", "m.toml: is no TOML: "),
    ("[[rule]]", "m.toml: 'rule' is not known; there are [[dimm]] and [[region]]"),
    ("[[dimm]]", "m.toml:1: names nothing that it is of: serial, handle, id, region"),
    ("[[dimm]]\nhandle = 1", "m.toml:1: says nothing: nature, endurance"),
    ('\n[[dimm]]\nnature = "memory"', "m.toml:2: names nothing"),
    ("[[dimm]]\ncolour = 1", "m.toml:1: 'colour' is none of a dimm without a path: "),
    ("[[dimm]]\nhandle = 1\nnuma_node = 1", "'numa_node' is none of a dimm without a path"),
    ('[[dimm]]\npath = "a"\nid = "b"', "m.toml:1: 'id' is none of a dimm with a path: "),
    ('[[dimm]]\npath = "a"\nslot = 256', "slot = 256 is not between 0 and 255"),
    ('[[dimm]]\nhandle = 1\nnature = "ram"', "nature 'ram' is none of storage, memory, unknown"),
    ("[[dimm]]\nhandle = 1\nnature = 3", "nature = 3 is no text"),
    ("[[dimm]]\nhandle = true", "handle = True is no whole number"),
    ("[[dimm]]\nhandle = 1.5", "handle = 1.5 is no whole number"),
    ("[[dimm]]\nhandle = -1", "handle = -1 is not between 0 and 4294967295"),
    ('[[dimm]]\nserial = "0x12"', "serial = '0x12' is no whole number"),
    ("[[dimm]]\nserial = 0x10000000000000000", "is not between 0 and 18446744073709551615"),
    ('[[dimm]]\nid = ""', "id = '' is no text"),
    ('[[dimm]]\nregion = "all"', "region 'all' is no name of a region, such as region0"),
    ('[[dimm]]\nhandle = 1\nendurance = "much"', "m.toml:1: endurance: 'much' is not a size"),
    ("[[dimm]]\nhandle = 1\nendurance = 0", 'endurance = 0 is no count of bytes, such as "20P"'),
    ("[[dimm]]\nhandle = 1\nendurance = true", "endurance = True is no count of bytes"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_cannot_be_understood_is_refused_with_its_place(text, message):
    with pytest.raises(InvalidArgument) as refusal:
        parse_declarations(text, "m.toml")
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("m.toml")


def test_the_second_of_two_is_refused_with_its_own_line():
    text = "[[dimm]]\nhandle = 1\nendurance = 5\n\n  [[ dimm ]] # two\nhandle = 2\n"
    with pytest.raises(InvalidArgument, match=r"^m\.toml:5: says nothing"):
        parse_declarations(text, "m.toml")


def test_dimms_in_a_list_are_called_by_their_numbers():
    text = 'dimm = [{ handle = 1, nature = "memory" }, { handle = 2, endurance = 5 }]'
    assert parse_declarations(text, "m.toml") == (
        Declaration(source="m.toml, dimm 0", handle=1, nature="memory"),
        Declaration(source="m.toml, dimm 1", handle=2, endurance=5),
    )


VALUES = st.one_of(
    st.integers(-2, 1 << 65).map(str),
    st.sampled_from(['"memory"', '"20P"', '"region0"', "true", "1.5", "[]", "{}", "nan"]),
    st.text(alphabet='ab"\\\n]', max_size=6).map(repr),
)
KEYS = st.sampled_from(["serial", "handle", "id", "region", "nature", "endurance", "path", "slot"])


@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_whatever_a_dimm_says_it_is_declarations_or_refused_at_its_line(pairs):
    text = "[[dimm]]\n" + "".join(f"{key} = {value}\n" for key, value in pairs.items())
    try:
        (found,) = parse_declarations(text, "m.toml")
    except InvalidArgument as refusal:
        assert re.match(r"m\.toml(:1)?: \S", str(refusal))
    else:
        assert found.source == "m.toml:1"
        assert found.of_dimms or found.region is not None


@given(st.text(max_size=200))
def test_any_text_is_declarations_or_refused(text):
    try:
        assert parse_declarations(text, "m.toml")
    except InvalidArgument as refusal:
        assert str(refusal).startswith("m.toml: ")


# --- the file -------------------------------------------------------------------------------------


@pytest.fixture
def machine_file(tmp_path):
    path = tmp_path / "etc" / "machine.toml"
    path.parent.mkdir(mode=0o755)
    path.write_text('[[dimm]]\nhandle = 1\nnature = "memory"\n')
    path.chmod(0o644)
    return path


def test_a_machine_need_not_declare_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(declarations, "DECLARATIONS", str(tmp_path / "absent"))
    assert load_declarations() == ()
    with pytest.raises(SystemFailure, match=r"absent: No such file"):
        load_declarations(str(tmp_path / "absent"))


def test_the_file_of_the_machine_is_read_where_there_is_one(machine_file, monkeypatch):
    monkeypatch.setattr(declarations, "DECLARATIONS", str(machine_file))
    (found,) = load_declarations()
    assert (found.source, found.nature) == (f"{machine_file}:1", "memory")


def test_a_link_to_nothing_is_not_taken_for_a_machine_without_declarations(tmp_path, monkeypatch):
    link = tmp_path / "machine.toml"
    link.symlink_to(tmp_path / "absent")
    monkeypatch.setattr(declarations, "DECLARATIONS", str(link))
    with pytest.raises(SystemFailure, match="No such file"):
        load_declarations()


def test_a_file_that_is_too_long_or_no_text(machine_file):
    machine_file.write_bytes(b"# \xff\n")
    with pytest.raises(InvalidArgument, match=r"machine\.toml: is no UTF-8: .* at byte 2"):
        load_declarations(str(machine_file))
    with machine_file.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidArgument, match="is longer than 1048576 bytes"):
        load_declarations(str(machine_file))


@AS_ROOT
def test_root_does_not_follow_what_others_can_write(machine_file):
    machine_file.chmod(0o664)
    with pytest.raises(InvalidArgument, match="others than root can write it"):
        load_declarations(str(machine_file))


def test_who_is_not_root_may_try_any_file(machine_file, monkeypatch):
    machine_file.chmod(0o666)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert len(load_declarations(str(machine_file))) == 1
