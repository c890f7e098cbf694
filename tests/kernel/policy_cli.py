"""Runs inside the guest: calls of ``pmem`` and of other programs, and what each of them said, as
JSON.

A script begins with ``from policy_cli import *``. Every call of pmem is a process of its own,
forked from one that has imported it: that alone takes two seconds here.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pmemkit.policy.apply
import pmemkit.policy.image_actions
import pmemkit.policy.kernel_actions
import pmemkit.policy.plan
import pmemkit.policy.report
import pmemkit.policy.schema  # noqa: F401
from pmemkit.cli import main

JOURNAL = "/var/lib/pmemkit"

calls = {}


def begin(*words):
    """Starts pmem; ``end`` waits for it."""
    places = [tempfile.mkstemp()[1] for _ in range(2)]
    child = os.fork()
    if child == 0:
        for number, place in enumerate(places, start=1):
            os.dup2(os.open(place, os.O_WRONLY), number)
        os._exit(_main(words))
    return child, [Path(each) for each in places], time.monotonic()


def _main(words):
    try:
        return main(list(words))
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def end(name, process):
    """What came of it."""
    child, places, started = process
    _, status = os.waitpid(child, 0)
    calls[name] = {
        "status": os.waitstatus_to_exitcode(status),
        "out": places[0].read_text(),
        "errors": places[1].read_text(),
        "seconds": round(time.monotonic() - started, 1),
    }
    return calls[name]


def pmem(name, *words):
    """Runs pmem."""
    return end(name, begin(*words))


def sh(name, command):
    """Runs a shell command."""
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    calls[name] = {"status": done.returncode, "out": done.stdout, "errors": done.stderr}
    return calls[name]


def install(policy, machine=None):
    """Puts the policy of the machine, and its machine file, where root alone can write them."""
    Path("/etc/pmemkit").mkdir(mode=0o755, exist_ok=True)
    for name, text in (("policy.toml", policy), ("machine.toml", machine)):
        if text is not None:
            path = Path("/etc/pmemkit") / name
            path.write_text(text)
            path.chmod(0o644)


def wait_for(true):
    """Until something is true."""
    deadline = time.monotonic() + 60
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit("it did not come true")
        time.sleep(0.02)


@atexit.register
def report():
    """What was called, also where the script itself failed."""
    json.dump(calls, sys.stdout)
