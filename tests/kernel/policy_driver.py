"""Runs inside the guest: does steps of policy and takes them back, and tells in JSON what happened.

A script of a step begins with ``from policy_driver import …`` and ends with ``report()``.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from pmemkit.errors import PmemError
from pmemkit.policy.kernel_actions import KernelActions
from pmemkit.policy.model import Entry, Step, as_plain

MIB = 1 << 20
POLICY = "/sys/devices/system/memory/auto_online_blocks"

said = []
events = []
entries = []
made = {}
actions = KernelActions(
    progress=said.append, offline_seconds=float(os.environ.get("OFFLINE_SECONDS", "60"))
)


def do(verb, target, **params):
    """One step; its error is an event, too."""
    number = len(entries) + 1
    step = Step(number=number, verb=verb, target=target, region="", why="", params=params)
    kept = {}
    entry = Entry(step=step, state="started", kept=kept)
    started = time.monotonic()
    event = {"verb": verb, "target": target}
    try:
        made[number] = actions.perform(step, kept.update, made)
        entry = Entry(step=step, state="done", kept=kept, made=made[number])
        event["made"] = made[number]
    except PmemError as failure:
        event |= {"error": failure.kind, "message": failure.message}
    event["seconds"] = time.monotonic() - started
    entries.append(entry)
    events.append(event)
    return made.get(number)


def undo(number=-1, force=False):
    """Takes a step back."""
    entry = entries[number]
    event = {"undo": entry.step.verb}
    try:
        event["text"] = actions.reverse(entry, force=force)
    except PmemError as failure:
        event |= {"error": failure.kind, "message": failure.message}
    events.append(event)


def see(name, value):
    """Something else worth telling."""
    events.append({"see": name, "value": value})


def machine():
    """The machine as policy sees it."""
    return actions.observe()


def see_region(dev):
    """A region as policy sees it."""
    see(dev, as_plain(machine().region(dev)))


def region_of(node):
    """The region whose memory is on a node."""
    return next(each.dev for each in machine().regions if each.target_node == node)


def text_of(path):
    """What an attribute says."""
    return Path(path).read_text().strip()


def shell(command):
    """What a command prints; it has to succeed."""
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stdout}{done.stderr}")
    return done.stdout


HOLDER = """
import ctypes, mmap, os, sys, time

class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]

held = mmap.mmap(-1, 16 << 20)
for page in range(0, len(held), 4096):
    held[page] = 1
if sys.argv[1] == "pipe":  # Its pages cannot be moved while they are in the pipe.
    base = ctypes.addressof(ctypes.c_char.from_buffer(held))
    vector = Vector(base, 16 * 4096)
    _, sender = os.pipe()
    assert ctypes.CDLL(None).vmsplice(sender, ctypes.byref(vector), 1, 0) == 16 * 4096
if sys.argv[1] == "files":  # Neither can what the kernel itself allocated for a process.
    os.makedirs("/run/held")
    for number in range(10000):
        open(f"/run/held/{number}", "w").close()
print("ready", flush=True)
time.sleep(1000)
"""


def hold(node, how):
    """A process that keeps memory of a node from going away, until it is killed."""
    command = ["numactl", f"--membind={node}", sys.executable, "-c", HOLDER, how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def report():
    """The end of a script."""
    json.dump({"events": events, "said": said}, sys.stdout)
