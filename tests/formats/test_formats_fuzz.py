"""The fuzzer of the formats: it runs, and it notices what it is there to notice."""

import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pmemkit.bus import scan as scanner
from pmemkit.formats import btt, infoblock
from pmemkit.formats import labels as formats
from pmemkit.namespace import advice
from pmemkit.namespace import create as verbs
from pmemkit.namespace.images import Images

FUZZ = Path(__file__).resolve().parents[2] / "fuzz"


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    path, least = list(sys.path), (advice.SIZE_MIN, btt.ARENA_SIZE_MIN)
    spec = importlib.util.spec_from_file_location("formats_fuzz", FUZZ / "formats_fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["formats_fuzz"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules["formats_fuzz"]
    advice.SIZE_MIN, btt.ARENA_SIZE_MIN = least


def inputs(fuzz: ModuleType, count: int) -> list[bytes]:
    return [fuzz.make_input(random.Random(f"1/{number}")) for number in range(count)]


@pytest.mark.parametrize("target", ["labels", "btt", "infoblock"])
def test_the_committed_programs_pass(fuzz: ModuleType, target: str) -> None:
    seeds = sorted((FUZZ / "corpus" / f"formats_{target}").iterdir())
    assert len(seeds) >= 20
    outcomes = {fuzz.check(target, path.read_bytes()) for path in seeds}
    assert "changed" in outcomes


@pytest.mark.parametrize("target", ["labels", "btt", "infoblock"])
def test_half_of_the_programs_make_the_checksums_right_again(fuzz: ModuleType, target) -> None:
    sealed = 0
    programs = [each for each in inputs(fuzz, 200) if len(each) > 2]
    for program in programs[:60]:
        spec, image, _ = fuzz.build(target, program)
        base = next(each for each in fuzz.bases(target) if each.spec == spec)
        assert len(image) == len(base.image)
        sealed += program[1] & 1
    assert 15 < sealed < 45


def test_programs_for_labels_reach_every_outcome(fuzz: ModuleType) -> None:
    outcomes = {fuzz.check("labels", program) for program in inputs(fuzz, 150)}
    assert {"looked", "damaged", "changed"} <= outcomes


def find(fuzz: ModuleType, target: str, count: int = 300) -> None:
    for program in inputs(fuzz, count):
        fuzz.check(target, program)


def test_a_reader_that_trusts_the_number_of_slots_is_found(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz.bases("labels")

    def trusting(header, block, division, number):
        yield from formats.IndexHeader.basic_faults(block)

    monkeypatch.setattr(formats, "_index_faults", trusting)
    with pytest.raises((AssertionError, KeyError, IndexError, PermissionError, OSError)):
        find(fuzz, "labels", 600)


def test_a_reader_that_trusts_the_data_offset_is_found(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz.bases("infoblock")
    monkeypatch.setattr(infoblock, "_use_faults", lambda info, size, start: iter(()))
    with pytest.raises(AssertionError):
        find(fuzz, "infoblock")


def test_a_verb_that_changes_damaged_labels_is_found(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz.bases("labels")
    monkeypatch.setattr(verbs, "require_sound", lambda region, op: None)
    with pytest.raises(AssertionError, match="changed an image with damaged labels"):
        find(fuzz, "labels")


def test_a_verb_that_writes_before_it_refuses_is_found(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz.bases("labels")
    require = verbs._require_single

    def planted(region):
        require(region)

    def hasty(self, dimm, groups):
        self.medium(dimm).write(0, b"hasty")
        raise verbs.Corrupt("too late")

    monkeypatch.setattr(verbs, "_require_single", planted)
    monkeypatch.setattr(Images, "write_labels", hasty)
    with pytest.raises(AssertionError, match="stored something and then refused"):
        find(fuzz, "labels")


def test_an_exception_that_is_not_of_the_package_is_found(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz.bases("labels")
    refusal = scanner._refusal

    def fragile(region, span, label):
        assert label.position // label.nlabel >= 0
        return refusal(region, span, label)

    monkeypatch.setattr(scanner, "_refusal", fragile)
    with pytest.raises(ZeroDivisionError):
        find(fuzz, "labels", 600)
