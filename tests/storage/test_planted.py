"""A build in which one durability step does nothing is caught by the oracle; the same build with
nothing planted is not. `make planted` builds it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pmemkit._native import PLANTED_FAULTS

ROOT = Path(__file__).resolve().parents[2]
PLANTED = ROOT / "build" / "planted"
PROGRAM = Path(__file__).with_name("planted.py")


def run(plant):
    environment = dict(os.environ)
    environment.pop("PMEMKIT_PLANT", None)
    if plant is not None:
        environment["PMEMKIT_PLANT"] = plant
    if not PLANTED_FAULTS:
        if not (PLANTED / "pmemkit" / "_native.abi3.so").exists():
            pytest.skip("there is no build with planted faults: make planted")
        environment["PYTHONPATH"] = str(PLANTED)
    done = subprocess.run(
        [sys.executable, PROGRAM], env=environment, capture_output=True, text=True, timeout=100
    )
    return done.returncode, done.stdout + done.stderr


STEPS = ["flush", "fua", "fence", "commit"]
CACHE = ["cache-flush", "cache-eviction", "cache-fua"]


@pytest.mark.parametrize("plant", STEPS + CACHE)
def test_a_step_that_does_nothing_is_caught(plant):
    code, output = run(plant)
    assert code == 10, output
    assert "violation: " in output and "the word at byte" in output


def test_the_same_build_behaves_with_nothing_planted():
    code, output = run(None)
    assert code == 0, output
    assert "nothing found in " in output
