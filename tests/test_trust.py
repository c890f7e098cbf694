"""Files that decide what root does: who may write them, and that opening one never waits."""

import os
import socket
from pathlib import Path

import pytest

from pmemkit.errors import InvalidArgument, SystemFailure
from pmemkit.trust import read_trusted

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
OTHER = 1234


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "etc" / "file"
    path.parent.mkdir(mode=0o755)
    path.write_bytes(b"0123456789")
    path.chmod(0o644)
    return path


def refused(path, **options) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as refusal:
        read_trusted(str(path), 100, check=True, **options)
    return refusal.value


@AS_ROOT
def test_what_only_root_can_write_is_read(file):
    assert read_trusted(str(file), 100, check=True) == b"0123456789"


def test_no_more_than_the_limit_and_one_byte_is_read(file):
    assert read_trusted(str(file), 4, check=False) == b"01234"
    assert read_trusted(str(file), 10, check=False) == b"0123456789"


@AS_ROOT
@pytest.mark.parametrize("mode", [0o664, 0o646, 0o622, 0o602, 0o777])
def test_what_group_or_others_can_write_is_refused(file, mode):
    file.chmod(mode)
    refusal = refused(file, op="declare")
    assert str(refusal) == (
        f"{file}: others than root can write it, so root does not apply it: "
        f"{file} has mode {mode:04o}: chmod go-w {file}"
    )
    assert (refusal.errno, refusal.op) == (1, "declare")
    assert read_trusted(str(file), 100, check=False)


@AS_ROOT
@pytest.mark.parametrize("mode", [0o400, 0o444, 0o644])
def test_what_belongs_to_another_is_refused_even_if_it_is_read_only(file, mode):
    os.chown(file, OTHER, 0)
    file.chmod(mode)
    assert f"{file} belongs to user {OTHER}: chown root {file}" in str(refused(file))


@AS_ROOT
def test_a_directory_where_others_can_put_another_file_is_refused(file):
    os.chown(file.parent, OTHER, 0)
    assert f"chown root {file.parent}" in str(refused(file))
    os.chown(file.parent, 0, 0)
    file.parent.chmod(0o775)
    assert f"chmod go-w {file.parent}" in str(refused(file))
    file.parent.chmod(0o1777)
    assert read_trusted(str(file), 100, check=True)


@AS_ROOT
def test_a_link_is_followed_and_its_target_is_what_counts(file, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(file)
    os.chown(link, OTHER, OTHER, follow_symlinks=False)
    assert read_trusted(str(link), 100, check=True)
    os.chown(file, OTHER, 0)
    refusal = refused(link)
    assert str(refusal).startswith(f"{link}: ")
    assert f"chown root {file}" in str(refusal)


def test_a_link_to_nothing_and_a_loop_of_links(tmp_path):
    (tmp_path / "a").symlink_to("b")
    with pytest.raises(SystemFailure, match="No such file"):
        read_trusted(str(tmp_path / "a"), 100, check=True)
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(SystemFailure, match="symbolic links"):
        read_trusted(str(tmp_path / "a"), 100, check=True)


@pytest.mark.timeout(20)
def test_a_fifo_that_nobody_writes_to_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    refusal = refused(tmp_path / "fifo", what="a machine file")
    assert str(refusal) == f"{tmp_path}/fifo: is a FIFO; a machine file is a regular file"


def test_what_is_no_regular_file_is_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert "is a socket" in str(refused(tmp_path / "socket"))
    assert "is a directory" in str(refused(tmp_path))
    assert "is a directory" in str(refused("/"))
    assert "is a character device" in str(refused("/dev/zero"))


def test_a_path_that_is_none():
    assert "NUL byte" in str(refused("a\0b"))


def test_a_link_that_is_put_in_place_of_the_file_is_not_followed(file, tmp_path, monkeypatch):
    """Between the look at the name and its opening."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    look = os.stat

    def exchange(path, *arguments, **options):
        found = look(path, *arguments, **options)
        if path == file.name:
            file.unlink()
            file.symlink_to(secret)
        return found

    monkeypatch.setattr(os, "stat", exchange)
    with pytest.raises(SystemFailure):
        read_trusted(str(file), 100, check=True)


@pytest.mark.timeout(20)
def test_a_fifo_that_is_put_in_place_of_the_file_is_not_waited_for(file, monkeypatch):
    look = os.stat

    def exchange(path, *arguments, **options):
        found = look(path, *arguments, **options)
        if path == file.name:
            file.unlink()
            os.mkfifo(file)
        return found

    monkeypatch.setattr(os, "stat", exchange)
    assert "is a FIFO" in str(refused(file))
