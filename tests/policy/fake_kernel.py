"""A kernel to be had in a directory: trees, and programs that change them as the real ones do.

Whatever is done to it is recorded; anything can be made to fail.
"""

import errno
import re
from dataclasses import dataclass, field
from pathlib import Path

from pmemkit.errors import Busy
from pmemkit.policy.kernel_actions import KernelActions
from pmemkit.policy.model import Entry, Step
from pmemkit.testing.sysfs_tree import Tree

MIB = 1 << 20
BLOCK = 128 * MIB
POLICY = "auto_online_blocks"
_HEALTH = ("ndctl list -DH", "cxl list -MH")
"""How devices are asked for their health; these have none to tell."""


@dataclass
class FakeKernel:
    """DAX devices and memory blocks, and the programs that reconfigure them."""

    root: Path
    ran: list[str] = field(default_factory=list)
    """Programs with their words, and writes as ``write NAME TEXT``."""
    failing: dict[str, Exception] = field(default_factory=dict)
    """By what is recorded: the error that it ends with."""
    handlers: dict = field(default_factory=dict)
    """By program and its verb: what it does with its words."""
    said: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.tree = Tree(self.root)
        self.memory = self.tree.sysfs / "devices/system/memory"
        self.tree.put(self.memory / "block_size_bytes", "8000000")
        self.tree.put(self.memory / POLICY, "offline")
        self.handlers["daxctl reconfigure-device"] = self.reconfigure

    # --- the two ways in ----------------------------------------------------------------------

    def run(self, argv, *, timeout_seconds=60, given=b""):
        words = " ".join(argv)
        if words in _HEALTH:
            return b""
        self.ran.append(words)
        self.fail(words)
        handler = self.handlers.get(" ".join(argv[:2]))
        if handler is None:
            raise AssertionError(f"nobody is there to run {words}")
        return handler(list(argv[2:]), given) or b""

    def write(self, path, text, timeout_seconds):
        name = f"{path.parent.name}/{path.name}"
        self.ran.append(f"write {name} {text}")
        self.fail(f"write {name} {text}")
        if path.name == "state":
            self.change_block(path.parent, text)
        else:
            self.tree.put(path, text)

    def fail(self, what):
        for pattern, failure in list(self.failing.items()):
            if re.fullmatch(pattern, what):
                raise failure

    # --- memory -------------------------------------------------------------------------------

    def policy(self):
        return (self.memory / POLICY).read_text().strip()

    def change_block(self, place, text):
        zones = {"online_movable": "Movable", "online_kernel": "Normal", "online": "Normal"}
        was = (place / "state").read_text().strip()
        if (text == "offline") == (was == "offline"):
            raise OSError(errno.EINVAL, "Invalid argument")
        state = "offline" if text == "offline" else "online"
        self.tree.put(place / "state", state)
        self.tree.put(place / "valid_zones", zones.get(text, "Normal Movable"))

    def add_dax(self, *, first=32, count=3, driver="device_dax", node=2):
        """dax1.0 of namespace1.0, with this many memory blocks in it."""
        place = "platform/ndbus0/region1/dax1.0"
        self.tree.device("nd", place, driver="dax_pmem", namespace="namespace1.0")
        self.dax = self.tree.device(
            "dax",
            f"{place}/dax1.0",
            driver=driver,
            size=count * BLOCK,
            align=4096,
            target_node=node,
            mapping0__start=hex(first * BLOCK),
            mapping0__end=hex((first + count) * BLOCK - 1),
        )
        self.numbers = range(first, first + count)
        return self.dax

    def reconfigure(self, words, _given):
        mode = words[words.index("--mode") + 1]
        if mode == "system-ram":
            if self.policy() != "offline":
                raise Busy("daxctl reconfigure-device failed: kernel policy will auto-online")
            for number in self.numbers:
                self.tree.block(number, "offline", "Normal Movable", node=2)
            self.tree.bind("dax", self.dax, "kmem")
            return
        if "online" in self.states():
            raise Busy("daxctl reconfigure-device failed: memory is online")
        for number in self.numbers:
            for each in sorted((self.memory / f"memory{number}").glob("*")):
                each.unlink()
        self.tree.bind("dax", self.dax, "device_dax")

    def become_memory(self, zone="Movable", state="online"):
        """As if it had been made system RAM before."""
        self.tree.bind("dax", self.dax, "kmem")
        for number in self.numbers:
            self.tree.block(number, state, zone, node=2)

    def states(self):
        """What each block is, as one word: ``Movable``, ``Normal``, or ``offline``."""
        found = []
        for number in self.numbers:
            place = self.memory / f"memory{number}"
            if (place / "state").exists():
                online = (place / "state").read_text().strip() == "online"
                found.append((place / "valid_zones").read_text().strip() if online else "offline")
        return found

    def mode(self):
        return (self.dax / "driver").resolve().name

    def writes(self):
        return [each.removeprefix("write ") for each in self.ran if each.startswith("write ")]


class Clock:
    """Time that passes only where something sleeps or writes."""

    def __init__(self):
        self.now = 0.0
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


class Session:
    """Steps done and taken back, with what they kept and made."""

    def __init__(self, kernel, **more):
        self.kernel = kernel
        tree = kernel.tree
        self.runtime = kernel.root / "run"
        self.actions = KernelActions(
            sysfs=tree.sysfs,
            proc=tree.proc,
            dev=tree.dev,
            runtime=self.runtime,
            run=kernel.run,
            write=kernel.write,
            progress=kernel.said.append,
            **more,
        )
        self.clock = Clock()
        self.actions._live.clock = self.clock
        self.actions._live.sleep = self.clock.sleep
        self.made = {}
        self.entries = []

    def do(self, verb, target, *, destroys=(), **params):
        number = len(self.entries) + 1
        step = Step(
            number=number,
            verb=verb,
            target=target,
            region="region1",
            why="",
            params=params,
            destroys=destroys,
        )
        kept = {}
        self.entries.append(Entry(step=step, state="started", kept=kept))
        self.made[number] = self.actions.perform(step, kept.update, self.made)
        self.entries[-1] = Entry(step=step, state="done", kept=kept, made=self.made[number])
        return self.made[number]

    def undo(self, number=-1, *, force=False):
        return self.actions.reverse(self.entries[number], force=force)


def refused(number):
    """What a write of sysfs ends with."""
    return OSError(number, f"[{errno.errorcode[number]}]")
