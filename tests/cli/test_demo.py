"""The demo: its choice of files, and the whole of it on a small tree."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.demo import Tree, choose_tree  # noqa: E402


@pytest.fixture
def top(tmp_path):
    top = tmp_path / "usr"
    for name, size in (("bin/a", 3000), ("lib/small/b", 2000), ("lib/large/c", 90_000)):
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))
    (top / "bin" / "link").symlink_to("a")
    os.mkfifo(top / "bin" / "pipe")
    return top


def test_directories_are_chosen_until_there_is_enough(top):
    tree = choose_tree(top, 6000)
    assert tree.tops == [top / "bin", top / "lib" / "small"]
    assert tree.size_bytes == 5000


def test_special_files_are_left_out(top):
    tree = Tree()
    tree.add(top / "bin")
    assert [path.name for path in tree.files] == ["a"]
    assert [path.name for path in tree.links] == ["link"]


def test_differences_are_found(top, tmp_path):
    tree = choose_tree(top, 200_000)
    copy = tmp_path / "copy"
    tree.copy_to(copy)
    assert tree.differences(copy) == []
    below = copy / top.relative_to("/")
    (below / "lib" / "large" / "c").write_bytes(b"other")
    (below / "lib" / "small" / "b").unlink()
    (below / "bin" / "link").unlink()
    found = " ".join(tree.differences(copy))
    assert "c has other bytes" in found
    assert "b is missing" in found
    assert "link points elsewhere" in found


@pytest.mark.peer("mkfs.ext4", "nbdcopy", "qemu-img", "debugfs")
def test_all_of_it_on_a_small_tree(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "demo.py", "--size", "24M", "--directory", tmp_path],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "everything compared equal" in done.stdout
    assert "Images are identical" in done.stdout
    assert "its exit status is 0" in done.stdout
    assert not any(tmp_path.iterdir())


def test_too_little_room_is_said(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "demo.py", "--size", "1E", "--directory", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, "of room are needed" in done.stderr) == (1, True)
