"""File systems made and mounted, with programs that only record, and devices that are files."""

import errno

import pytest
from fake_kernel import FakeKernel, Session

from pmemkit.errors import Busy, Corrupt, InvalidArgument, NotSupported, SystemFailure
from pmemkit.policy import kernel_actions
from pmemkit.policy.model import Entry, Step

MIB = 1 << 20


class Files(FakeKernel):
    """namespace0.0 on pmem0; ``mount`` and ``umount`` change the fake's mountinfo."""

    def __post_init__(self):
        super().__post_init__()
        self.tree.device("nd", "platform/ndbus0", provider="ACPI.NFIT")
        self.tree.device("nd", "platform/ndbus0/region0", driver="nd_region", size=64 * MIB)
        self.tree.device(
            "nd",
            "platform/ndbus0/region0/namespace0.0",
            driver="nd_pmem",
            size=64 * MIB,
            mode="raw",
            block__pmem0__size=1,
        )
        self.tree.disk("pmem0", "259:0")
        self.device = self.tree.dev / "pmem0"
        self.device.write_bytes(bytes(4 * MIB))
        self.mounted = {}
        for program in ("mkfs.ext4 -q", "mount -t", "mkfs.xfs -q"):
            self.handlers[program] = getattr(self, program.split()[0].split(".")[0])
        self.inside = []

    def run(self, argv, *, timeout_seconds=60, given=b""):
        if argv[0] == "umount":
            self.ran.append(" ".join(argv))
            self.fail(" ".join(argv))
            del self.mounted[argv[1]]
            self.show()
            return b""
        return super().run(argv, timeout_seconds=timeout_seconds, given=given)

    def mkfs(self, words, _given):
        data = bytearray(self.device.read_bytes())
        data[0x438:0x43A] = b"\x53\xef"
        uuid = words[words.index("-U") + 1] if "-U" in words else words[2].split("uuid=")[1]
        data[0x468:0x478] = bytes.fromhex(uuid.replace("-", ""))
        self.device.write_bytes(data)

    def mount(self, words, _given):
        options = words[words.index("-o") + 1] if "-o" in words else "rw"
        self.mounted[words[-1]] = (words[0], options)
        for name in self.inside:
            self.tree.put(self.tree.root / words[-1].lstrip("/") / name, "")
        self.show()

    def show(self):
        lines = [
            f"{number} 1 259:0 / {path} {options} - {kind} /dev/pmem0 rw"
            for number, (path, (kind, options)) in enumerate(self.mounted.items())
        ]
        self.tree.put(self.tree.proc / "self/mountinfo", "\n".join(lines))


@pytest.fixture
def kernel(tmp_path):
    return Files(tmp_path)


@pytest.fixture
def session(kernel):
    return Session(kernel)


def test_a_file_system_is_made_once(kernel, session):
    made = session.do("mkfs", "namespace0.0", filesystem="ext4")
    uuid = session.entries[0].kept["uuid"]
    assert kernel.ran == [f"mkfs.ext4 -q -F -b 4096 -U {uuid} {kernel.device}"]
    assert made["filesystem_uuid"] == uuid


def test_xfs_goes_together_with_dax(kernel, session):
    session.do("mkfs", "namespace0.0", filesystem="xfs")
    assert "mkfs.xfs -q -f -m reflink=0,uuid=" in kernel.ran[0]


def test_nothing_is_made_over_something(kernel, session):
    kernel.device.write_bytes(b"LUKS\xba\xbe\0\x01" + bytes(4 * MIB))
    with pytest.raises(InvalidArgument, match="carries a LUKS volume; nothing is made over it"):
        session.do("mkfs", "namespace0.0", filesystem="ext4")
    assert kernel.ran == []
    session.do("mkfs", "namespace0.0", filesystem="ext4", destroys=("a LUKS volume",))
    assert len(kernel.ran) == 1


def test_a_file_system_without_files_goes_again(kernel, session):
    session.do("mkfs", "namespace0.0", filesystem="ext4")
    assert session.undo() == "namespace0.0 has no file system, as before"
    assert kernel.device.read_bytes() == bytes(4 * MIB)
    assert "is gone already" in session.undo()


def test_files_are_not_lost_without_force(kernel, session):
    session.do("mkfs", "namespace0.0", filesystem="ext4")
    kernel.handlers["mount -t"] = lambda words, given: (
        kernel.mount(words, given),
        (session.runtime / "look" / "thesis.tex").write_text("years"),
    )[0]
    with pytest.raises(Corrupt, match=r"there are files in the file system .*: thesis\.tex"):
        session.undo()
    assert kernel.mounted == {}
    session.undo(force=True)
    assert kernel.device.read_bytes() == bytes(4 * MIB)


def test_an_unfinished_file_system_is_taken_back(kernel, session):
    def half(words, given):
        kernel.device.write_bytes(b"half" + kernel.device.read_bytes()[4:])
        raise SystemFailure("mkfs.ext4 failed: I/O error")

    kernel.handlers["mkfs.ext4 -q"] = half
    with pytest.raises(SystemFailure):
        session.do("mkfs", "namespace0.0", filesystem="ext4")
    session.undo()
    assert kernel.device.read_bytes() == bytes(4 * MIB)


def test_mount_makes_its_directory_and_takes_it_away(kernel, session, tmp_path):
    path = tmp_path / "a" / "b"
    session.do("mount", "namespace0.0", filesystem="ext4", path=str(path), options="dax=always")
    assert kernel.ran == [f"mount -t ext4 -o dax=always /dev/pmem0 {path}"]
    assert path.is_dir()
    session.do("mount", "namespace0.0", filesystem="ext4", path=str(path))
    assert len(kernel.ran) == 1
    assert "is unmounted again" in session.undo(0)
    assert not (tmp_path / "a").exists()
    assert kernel.mounted == {}


def test_a_mount_that_fails_leaves_no_directory(kernel, session, tmp_path):
    kernel.failing["mount .*"] = SystemFailure("mount failed")
    with pytest.raises(SystemFailure):
        session.do("mount", "namespace0.0", filesystem="ext4", path=str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    assert "is unmounted again" in session.undo()


def test_umount_and_mount_again_as_it_was(kernel, session, tmp_path):
    path = str(tmp_path / "data")
    session.do("mount", "namespace0.0", filesystem="xfs", path=path, options="noatime")
    session.do("umount", "namespace0.0", filesystem="xfs", path=path)
    assert kernel.mounted == {}
    session.undo()
    assert kernel.mounted == {path: ("xfs", "noatime")}


def test_who_keeps_it_from_being_unmounted(kernel, session, tmp_path):
    path = str(tmp_path / "data")
    session.do("mount", "namespace0.0", filesystem="xfs", path=path)
    kernel.tree.process(70, "vim", opened=f"{path}/file")
    kernel.failing["umount .*"] = Busy("umount failed: target is busy")
    with pytest.raises(Busy, match=r"because it is in use by vim \(70\)"):
        session.do("umount", "namespace0.0", filesystem="xfs", path=path)


@pytest.mark.parametrize("path", ["relative", "/", "/a/../b", "/a\nb", ""])
def test_paths_that_are_none(kernel, session, path):
    with pytest.raises(InvalidArgument, match="is no mount point"):
        session.do("mount", "namespace0.0", filesystem="ext4", path=path)
    assert kernel.ran == []


@pytest.mark.parametrize("options", ["-o x", "a b", "rw;reboot", "--bind", "a\n"])
def test_options_that_are_none(kernel, session, tmp_path, options):
    with pytest.raises(InvalidArgument, match="are no mount options"):
        path = str(tmp_path / "m")
        session.do("mount", "namespace0.0", filesystem="ext4", path=path, options=options)
    assert kernel.ran == []


def test_a_link_is_no_mount_point(kernel, session, tmp_path):
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(InvalidArgument, match="is no directory"):
        session.do("mount", "namespace0.0", filesystem="ext4", path=str(tmp_path / "link"))


def test_file_systems_that_are_not_made(kernel, session):
    with pytest.raises(NotSupported, match="'btrfs' is no file system that is made: ext4 or xfs"):
        session.do("mkfs", "namespace0.0", filesystem="btrfs")


def test_nothing_is_begun_without_root(kernel, session, monkeypatch):
    monkeypatch.setattr(kernel_actions.os, "geteuid", lambda: 1000)
    with pytest.raises(SystemFailure, match="needs root") as caught:
        session.do("mkfs", "namespace0.0", filesystem="ext4")
    assert caught.value.errno == errno.EPERM
    with pytest.raises(SystemFailure, match="needs root"):
        session.undo()
    assert kernel.ran == []


def test_a_verb_that_there_is_not(session):
    step = Step(number=1, verb="format", target="x", region="r", why="")
    with pytest.raises(NotSupported, match="format is nothing that can be done here"):
        session.actions.perform(step, lambda what: None, {})
    with pytest.raises(NotSupported):
        session.actions.reverse(Entry(step=step, state="done"))
