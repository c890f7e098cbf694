"""Nature: the strongest evidence decides, and what is not known is storage."""

import itertools

import pytest

from pmemkit.bus.image import observe
from pmemkit.bus.machine import DimmSpec, Machine
from pmemkit.bus.nature import Evidence, image_evidence, judge

MIB = 1 << 20


def says(nature, strength):
    return Evidence(f"{strength} source", f"it is {nature}", nature, strength)


def test_nothing_known_is_storage():
    verdict = judge([])
    assert (verdict.nature, verdict.evidence) == ("storage", ())
    assert "taken for storage" in verdict.because
    assert any("nature" in each for each in verdict.would_change)


@pytest.mark.parametrize("weaker", ["wear", "firmware", "hint"])
@pytest.mark.parametrize("nature", ["storage", "memory"])
def test_the_stronger_evidence_decides(nature, weaker):
    other = "memory" if nature == "storage" else "storage"
    for order in itertools.permutations([says(nature, "declared"), says(other, weaker)]):
        verdict = judge(order)
        assert verdict.nature == nature
        assert verdict.because == f"declared source says it is {nature}"
        assert len(verdict.evidence) == 2


def test_wear_beats_what_the_firmware_calls_it():
    assert judge([says("memory", "firmware"), says("storage", "wear")]).nature == "storage"


def test_of_equals_that_disagree_storage_wins():
    assert judge([says("memory", "firmware"), says("storage", "firmware")]).nature == "storage"


def test_hints_decide_nothing():
    assert judge([says("memory", "hint")]).nature == "storage"


@pytest.mark.parametrize(
    ("spec", "nature", "because"),
    [
        ({"nature": "memory"}, "memory", "nature memory"),
        ({"nature": "storage"}, "storage", "nature storage"),
        ({"nature": "memory", "endurance": 1 << 50}, "memory", "nature memory"),
        ({"endurance": 1 << 50}, "storage", "endurance 1 PiB"),
        ({}, "storage", "taken for storage"),
    ],
)
def test_a_machine_file_declares_it(tmp_path, spec, nature, because):
    path = tmp_path / "a.img"
    with path.open("wb") as image:
        image.truncate(16 * MIB)
    machine = Machine.of([DimmSpec(path=str(path), **spec)])
    verdict = judge(image_evidence(observe(machine).regions[0]))
    assert verdict.nature == nature
    assert because in verdict.because
