"""A namespace of mode sector that Linux would take for a raw one, or write to: it is refused with
what is wrong, read by its backup info block on request, and repaired."""

import pytest

from pmemkit.bus import machine_of, observe
from pmemkit.cli import main
from pmemkit.errors import Corrupt, InvalidArgument, MediaError, ReadOnly
from pmemkit.formats.btt import BttInfo
from pmemkit.media.badblocks import BadRun, note
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels
from pmemkit.storage.region import open_region

MIB = 1 << 20
LABEL_SIZE = 128 << 10
DATA = bytes(range(256)) * 64


class Damaged:
    """An image with one namespace of mode sector that holds :data:`DATA`."""

    def __init__(self, path, version):
        self.path = path
        with path.open("wb") as file:
            file.truncate(32 * MIB + (LABEL_SIZE if version else 0))
        machine = machine_of([path], label_size=LABEL_SIZE) if version else machine_of([path])
        with open_images(machine) as images:
            if version:
                init_labels(images, 0, version=version)
            create(images, None, Wish(mode="sector", sector_size=512))
        with self.opened() as region:
            region.device().write(0, DATA)
        here = observe(machine_of([path])).namespace("namespace0.0")
        assert isinstance(here.claim.info, BttInfo)
        self.info = here.claim.info
        self.start = here.offset + (0 if self.info.major == 2 else 4096)

    def opened(self, **options):
        return open_region(f"{self.path}:namespace0.0", **options)

    def put(self, offset, data):
        """Into the arena."""
        with self.path.open("r+b") as file:
            file.seek(self.start + offset)
            file.write(data)

    def flag(self):
        """Sets the error flag in both info blocks, as the kernel would have."""
        block = bytearray(self.info.sealed())
        block[48] |= 1
        for offset in (0, self.info.info2off):
            self.put(offset, BttInfo.seal(bytes(block)))


@pytest.fixture(params=[(1, 2), (1, 1), None], ids=["v1.2", "v1.1", "label-less"])
def damaged(request, tmp_path):
    return Damaged(tmp_path / "a.img", request.param)


def pmem(capsys, *words):
    status = main([str(word) for word in words])
    return status, capsys.readouterr()


def test_a_bad_info_block_is_refused_and_nothing_is_written(damaged):
    damaged.put(64, b"\xff" * 64)
    before = damaged.path.read_bytes()
    for options in ({}, {"read_only": True}):
        with pytest.raises(Corrupt) as caught, damaged.opened(**options):
            pass
        said = str(caught.value)
        assert "its info block is bad" in said
        assert "checksum" in said
        assert "check-namespace" in said
        assert "--repair" in said
        assert "--backup-info-block" in said
    assert damaged.path.read_bytes() == before


def test_one_that_is_gone_is_missed_where_a_label_names_it(damaged, request):
    damaged.put(0, bytes(4096))
    named = "v1.2" in request.node.name
    if named:
        with pytest.raises(Corrupt, match="its info block is bad"):
            damaged.opened()
    elif damaged.path.stat().st_size > 32 * MIB:
        # A label of version 1.1 does not say what its namespace is: Linux makes a raw one of it.
        with damaged.opened() as region:
            assert region.mode == "raw"
    with damaged.opened(read_only=True, backup_info_block=True) as region:
        assert region.device().read(0, len(DATA)) == DATA


def test_the_copy_reads_what_was_written_and_lets_nobody_write(damaged):
    damaged.put(0, b"\xff" * 4096)
    before = damaged.path.read_bytes()
    with damaged.opened(read_only=True, backup_info_block=True) as region:
        device = region.device()
        assert region.mode == "sector"
        assert device.read(0, len(DATA)) == DATA
        assert region.validate() == []
        with pytest.raises(ReadOnly):
            device.write(0, DATA)
    assert damaged.path.read_bytes() == before
    with pytest.raises(InvalidArgument, match="open it read-only"):
        damaged.opened(backup_info_block=True)


def test_bad_media_under_the_info_block_are_as_bad(damaged, capsys):
    note(str(damaged.path), "inject", BadRun(damaged.start // 512 + 3, 1))
    with pytest.raises(MediaError, match="check-namespace"), damaged.opened() as region:
        region.device()
    with damaged.opened(read_only=True, backup_info_block=True) as region:
        assert region.device().read(0, len(DATA)) == DATA
    assert pmem(capsys, "check-namespace", damaged.path, "namespace0.0")[0] == 12
    assert pmem(capsys, "check-namespace", damaged.path, "namespace0.0", "--repair")[0] == 0
    with damaged.opened() as region:
        assert region.device().read(0, len(DATA)) == DATA


def test_a_repair_makes_it_what_it_was(damaged, capsys):
    damaged.put(64, b"\xff" * 64)
    assert pmem(capsys, "check-namespace", damaged.path, "namespace0.0", "--repair")[0] == 0
    with damaged.opened() as region:
        assert region.device().read(0, len(DATA)) == DATA
        region.device().write(0, DATA[::-1])


def test_without_a_good_copy_it_is_refused_all_the_same(damaged):
    for offset in (0, damaged.info.info2off):
        damaged.put(offset + 64, b"\xff" * 64)
    with pytest.raises(Corrupt, match="there is no copy of it"):
        damaged.opened()
    with pytest.raises(Corrupt, match="no copy of an info block"):
        damaged.opened(read_only=True, backup_info_block=True)


def test_a_block_that_promises_an_arena_that_is_not_there_is_refused(damaged):
    block = bytearray(damaged.info.sealed())
    block[80:88] = (damaged.info.info2off + 4096).to_bytes(8, "little")
    damaged.put(0, BttInfo.seal(bytes(block)))
    with pytest.raises(Corrupt, match=r"nextoff.*its copy at byte"):
        damaged.opened()
    with damaged.opened(read_only=True, backup_info_block=True) as region:
        assert region.device().read(0, len(DATA)) == DATA


def test_other_namespaces_have_no_backup(tmp_path):
    path = tmp_path / "raw.img"
    path.write_bytes(bytes(16 * MIB))
    with pytest.raises(Corrupt, match="no copy of an info block"):
        open_region(f"{path}:namespace0.0", read_only=True, backup_info_block=True)
    with pytest.raises(InvalidArgument, match="say PATH:namespace"):
        open_region(path, read_only=True, backup_info_block=True)


def test_an_arena_with_the_error_flag_is_read_only_with_the_reason(damaged, capsys):
    damaged.flag()
    before = damaged.path.read_bytes()
    with damaged.opened() as region:
        device = region.device()
        assert device.read(0, len(DATA)) == DATA
        with pytest.raises(ReadOnly, match="arena 0 carries the error flag: a write failed"):
            device.write(0, DATA)
        with pytest.raises(ReadOnly, match="error flag"):
            device.zero(0, 512)
        assert region.read_only_because == "arena 0 carries the error flag: a write failed there"
    assert damaged.path.read_bytes() == before
    status, said = pmem(capsys, "info", f"{damaged.path}:namespace0.0")
    assert status == 0
    assert "carries the error flag" in said.out
