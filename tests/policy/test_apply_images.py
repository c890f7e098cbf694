"""Policies on real images: applied, killed anywhere, applied again, and taken back to the byte."""

import itertools
import os
import random
import signal
from pathlib import Path

import pytest
from policy_images import add, digest_of_images, namespaces_of, put_on

from pmemkit.namespace.images import Images
from pmemkit.policy.apply import apply, undo
from pmemkit.policy.image_actions import ImageActions
from pmemkit.policy.image_changes import Rehearsal
from pmemkit.policy.journal import Journal, Writer
from pmemkit.policy.model import Policy
from pmemkit.policy.schema import parse_policy
from pmemkit.storage.region import create_file

MIB = 1 << 20
POLICY = """
[[rule]]
name = "both"
match = { name = "region0" }
[[rule.share]]
size = "50%"
personality = "storage"
mode = "sector"
name = "log"
[[rule.share]]
size = "rest"
personality = "dax"
mode = "devdax"
name = "data"

[[rule]]
name = "whole"
match = { name = "region1" }
want = { personality = "dax", mode = "fsdax", name = "fs" }

[[rule]]
name = "new"
match = { name = "region2" }
want = { personality = "storage", mode = "sector", name = "disk" }
"""
WANTED = {
    ("region0", "sector", 32 * MIB, "log"),
    ("region0", "devdax", 32 * MIB, "data"),
    ("region1", "fsdax", 32 * MIB, "fs"),
    ("region2", "sector", 32 * MIB, "disk"),
}


@pytest.fixture
def wanted() -> Policy:
    return parse_policy(POLICY, "policy.toml")


@pytest.fixture
def machine(tmp_path) -> Path:
    """Three dimms: one with two namespaces to be replaced, one to be reconfigured, one blank."""
    path = tmp_path / "vm.toml"
    rows = []
    for number, size in enumerate((64, 32, 32)):
        create_file(tmp_path / f"{number}.img", size * MIB + (128 << 10))
        rows.append(f'[[dimm]]\npath = "{number}.img"\nlabel_size = "128K"\n')
    path.write_text("\n".join(rows))
    choose = random.Random(1)
    for region, mode, size in ((0, "raw", 16), (0, "fsdax", 16), (1, "sector", 32)):
        dev = add(path, f"region{region}", mode=mode, size=size * MIB)
        put_on(path, dev, choose.randbytes(MIB))
    return path


def is_as_wanted(machine: Path) -> bool:
    return {(r, mode, size, name) for r, _, mode, size, _, name in namespaces_of(machine)} == WANTED


def undo_all(machine: Path, journal: Journal) -> None:
    while (outcome := undo(ImageActions([machine]), journal)).run is not None:
        assert outcome.error is None, outcome.error


class Mine:
    """Kills the process at the nth thing that it does: a record, before or after it is written, or
    a group of writes to an image."""

    def __init__(self, count: int) -> None:
        self.count = count

    def step(self) -> None:
        self.count -= 1
        if self.count < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def lay(self) -> None:
        put, carry_out, mine = Writer.put, Images.carry_out, self

        def mined_put(writer, record, **more):
            mine.step()
            put(writer, record, **more)
            mine.step()

        def mined_carry_out(images, dimm, groups, **more):
            if isinstance(images, Rehearsal):
                return carry_out(images, dimm, groups, **more)
            for group in groups:
                for each in group:
                    mine.step()
                    carry_out(images, dimm, [[each]], **more)
            return None

        Writer.put = mined_put
        Images.carry_out = mined_carry_out


def killed(count: int, act) -> bool:
    """Runs something in a process that is killed at its nth step; False where it ended before."""
    child = os.fork()
    if child == 0:
        try:
            Mine(count).lay()
            act()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def counts(scale) -> itertools.count:
    """Every place, or every few of them."""
    return itertools.count(0, scale(7, 1))


def test_forth_and_back(machine, wanted, tmp_path) -> None:
    before, journal = digest_of_images(machine), Journal(tmp_path / "journal")
    actions = ImageActions([machine])
    outcome = apply(actions, wanted, journal)
    assert outcome.converged, outcome.error
    assert is_as_wanted(machine)
    assert apply(actions, wanted, journal).run is None
    undo_all(machine, journal)
    assert digest_of_images(machine) == before


@pytest.mark.parametrize("then", ["apply", "undo"])
def test_killed_anywhere_in_apply(machine, wanted, tmp_path, then, scale) -> None:
    """Apply again converges; undo brings every byte of the images back, labels, info blocks and
    contents."""
    before, actions = digest_of_images(machine), ImageActions([machine])
    for count in counts(scale):
        journal = Journal(tmp_path / str(count))
        dead = killed(count, lambda journal=journal: apply(actions, wanted, journal))
        if then == "apply":
            outcome = apply(actions, wanted, journal)
            assert outcome.converged, (count, outcome.error)
            assert is_as_wanted(machine)
        undo_all(machine, journal)
        assert digest_of_images(machine) == before, count
        if not dead:
            break
    assert count > 50


def test_killed_anywhere_in_undo(machine, wanted, tmp_path, scale) -> None:
    """Undo again goes on where it was."""
    before, actions = digest_of_images(machine), ImageActions([machine])
    for count in counts(scale):
        journal = Journal(tmp_path / str(count))
        assert apply(actions, wanted, journal).converged
        dead = killed(count, lambda journal=journal: undo_all(machine, journal))
        if count % 2:
            dead = killed(count // 2, lambda journal=journal: undo_all(machine, journal)) or dead
        undo_all(machine, journal)
        assert digest_of_images(machine) == before, count
        if not dead:
            break
    assert count > 50


def test_killed_in_undo_and_applied_again(machine, wanted, tmp_path, scale) -> None:
    before, actions = digest_of_images(machine), ImageActions([machine])
    journal = Journal(tmp_path / "journal")
    for count in range(3, 60, scale(19, 3)):
        assert apply(actions, wanted, journal).converged
        killed(count, lambda: undo(actions, journal))
        assert apply(actions, wanted, journal).converged
        assert is_as_wanted(machine)
    undo_all(machine, journal)
    assert digest_of_images(machine) == before
