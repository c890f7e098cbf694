"""The option fuzzer itself: it runs, and it notices what it is there to notice."""

import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pmemkit.serve import nbd_handshake, nbd_protocol

SCRIPT = Path(__file__).resolve().parent.parent.parent / "fuzz" / "options_fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("options_fuzz", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


def inputs(fuzz: ModuleType, count: int) -> list[bytes]:
    return [fuzz.make_input(random.Random(f"1/{number}")) for number in range(count)]


def test_the_inputs_reach_every_outcome(fuzz: ModuleType) -> None:
    outcomes = {fuzz.check(said) for said in inputs(fuzz, 400)}
    assert outcomes == {"None", "protocol", "negotiated"}


def test_a_parser_that_trusts_a_length_is_found(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trusting(data: bytes) -> nbd_protocol.InfoRequest:
        size = int.from_bytes(data[:4], "big")
        return nbd_protocol.InfoRequest(data[4 : 4 + size].decode(), frozenset(data[4 + size :]))

    monkeypatch.setattr(nbd_protocol, "parse_info_request", trusting)
    with pytest.raises(UnicodeDecodeError):
        for said in inputs(fuzz, 400):
            fuzz.check(said)


def test_an_answer_that_is_cut_is_found(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(option: int, kind: int, text: str) -> bytes:
        return nbd_protocol.option_reply(option, kind, text.encode())[:-1]

    monkeypatch.setattr(nbd_handshake.nbd, "error_reply", cut)
    with pytest.raises(AssertionError):
        for said in inputs(fuzz, 400):
            fuzz.check(said)
