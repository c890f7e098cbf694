"""Nature: the strongest evidence decides, and what is not known is storage."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemkit.bus.image import observe
from pmemkit.bus.machine import DimmSpec, Machine
from pmemkit.bus.nature import Evidence, Statement, image_evidence, judge, stated_evidence

MIB = 1 << 20
PIB = 1 << 50

PIECES = st.builds(
    Evidence,
    source=st.sampled_from(["a file", "a table", "a device"]),
    value=st.sampled_from(["this", "that"]),
    says=st.sampled_from(["storage", "memory", None]),
    strength=st.sampled_from(["declared", "wear", "firmware", "hint"]),
    otherwise=st.sampled_from([None, "another table", "another device"]),
    endurance=st.none() | st.integers(1, PIB),
    life_used=st.none() | st.integers(0, 254),
)
EVIDENCE = st.lists(PIECES, max_size=6)
OTHER = {"storage": "memory", "memory": "storage"}


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


# --- whatever the evidence is ---------------------------------------------------------------------


@given(EVIDENCE.flatmap(lambda found: st.tuples(st.just(found), st.permutations(found))))
def test_the_order_of_the_evidence_does_not_matter(orders):
    first, second = orders
    assert judge(first) == judge(second)


@given(EVIDENCE)
def test_all_evidence_is_kept_strongest_first(found):
    shown = judge(found).evidence
    assert Counter(shown) == Counter(found)
    order = ["declared", "wear", "firmware", "hint"]
    assert [each.strength for each in shown] == sorted(
        (each.strength for each in found), key=order.index
    )


@given(EVIDENCE)
def test_memory_is_only_what_the_strongest_evidence_calls_so_with_one_voice(found):
    saying = [each for each in found if each.says is not None and each.strength != "hint"]
    strongest = next(
        (level for level in ("declared", "wear", "firmware") if level in voices(saying)), None
    )
    voice = voices(saying).get(strongest, set())
    assert (judge(found).nature == "memory") == (voice == {"memory"})


def voices(saying):
    """What the pieces of each strength say."""
    found = {}
    for each in saying:
        found.setdefault(each.strength, set()).add(each.says)
    return found


@given(EVIDENCE, st.lists(PIECES.map(lambda each: replace(each, strength="hint"))))
def test_no_hint_changes_a_verdict(found, hints):
    bare, more = judge(found), judge([*found, *hints])
    assert (bare.nature, bare.because, bare.wears) == (more.nature, more.because, more.wears)


@given(EVIDENCE)
def test_it_wears_where_something_says_so_whatever_the_verdict(found):
    wear = any(each.strength == "wear" and each.says == "storage" for each in found)
    assert judge(found).wears == wear


# --- what would change it -------------------------------------------------------------------------


@given(EVIDENCE)
def test_what_would_change_it_begins_with_a_declaration_of_the_other_nature(found):
    verdict = judge(found, declare="my.toml")
    other = OTHER[verdict.nature]
    declared = [each for each in found if each.strength == "declared" and each.says is not None]
    first = verdict.would_change[0]
    assert first.startswith(f'nature = "{other}" in ')
    assert first.endswith("my.toml") or declared
    if declared:
        found = [replace(each, says=other) if each in declared else each for each in found]
    else:
        found = [*found, Evidence("my.toml", f"nature {other}", other, "declared")]
    assert judge(found).nature == other


@given(EVIDENCE)
def test_without_the_word_that_decides_it_is_what_is_said_then(found):
    verdict = judge(found)
    for change in verdict.would_change:
        head, _, then = change.partition(" (then ")
        if not head.startswith("no word of it from "):
            continue
        sources = head.removeprefix("no word of it from ").split(" and ")
        rest = judge([each for each in found if each.source not in sources])
        assert rest.nature == OTHER[verdict.nature]
        assert then == f"{rest.because})"


def test_a_declaration_that_contradicts_the_firmware_says_what_it_hides():
    changes = judge([says("memory", "declared"), says("storage", "firmware")]).would_change
    assert changes == (
        'nature = "storage" in declared source',
        "no word of it from declared source (then firmware source says it is storage)",
    )


def test_memory_by_its_firmware_would_be_storage_with_wear():
    changes = judge([says("memory", "firmware")], declare="my.toml").would_change
    assert changes == (
        'nature = "storage" in my.toml',
        "endurance in my.toml, or a device that reports wear",
    )


def test_what_is_not_known_names_what_hints_know():
    hint = Evidence("command line", "emulated", None, "hint", "no memmap=64M!2G")
    assert judge([hint]).would_change[1:] == ("no memmap=64M!2G",)
    assert judge([]).would_change[1:] == (
        "firmware that describes the range as volatile, or as CXL ram",
    )


# --- what owners state ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("natures", "nature"),
    [
        (["memory", "memory"], "memory"),
        (["memory", None], "storage"),
        (["memory", "storage"], "storage"),
        (["storage", None], "storage"),
        ([None, None], "storage"),
    ],
)
def test_a_set_of_dimms_is_memory_only_where_each_of_them_is(natures, nature):
    found = stated_evidence([[Statement(f"dimm {n}", each)] for n, each in enumerate(natures)])
    assert judge(found).nature == nature


def test_what_is_said_of_some_dimms_only_is_shown_with_the_reason():
    (piece,) = stated_evidence([[Statement("dimm 0", "memory")], []])
    assert (piece.says, piece.strength) == (None, "declared")
    assert piece.value == "nature memory, but nothing is said of 1 of 2 dimms"


def test_a_set_lasts_as_long_as_its_weakest_dimm_lets_it():
    stated = [[Statement("a", endurance=20 * PIB)], [Statement("b", endurance=3 * PIB)]]
    verdict = judge(stated_evidence(stated))
    assert (verdict.endurance, verdict.wears, verdict.life_used) == (6 * PIB, True, None)


def test_of_several_dimms_the_most_used_counts():
    used = [Evidence(f"d{n}", "used", "storage", "wear", life_used=n) for n in (3, 120, 7)]
    assert judge(used).life_used == 120
