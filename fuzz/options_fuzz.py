#!/usr/bin/env python3
"""Fuzzes the NBD option parser and the whole handshake with what a client could send.

    fuzz/options_fuzz.py --seconds 20 [--seed N]

With atheris installed it is coverage-guided; otherwise inputs are mixed from well-formed pieces and
mutations of them, from a printed seed. A finding is any exception that a hostile client must not be
able to cause, a handshake that does not end, or an answer that is not made of whole frames.

What this does not do: open sockets or exports.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from pmemkit.errors import InvalidArgument, ProtocolError  # noqa: E402
from pmemkit.serve import nbd_protocol as nbd  # noqa: E402
from pmemkit.serve.channel import EndOfStream  # noqa: E402
from pmemkit.serve.export import Export, Exports  # noqa: E402
from pmemkit.serve.nbd_handshake import negotiate  # noqa: E402

OPTION_MAGIC = 0x49484156454F5054
REPLY_MAGIC = struct.pack(">Q", 0x3E889045565A9)
GREETING_SIZE = 18
INTERESTING = (0, 1, 3, 4, 5, 127, 255, 4096, 4097, 65535, 65536, 2**31, 2**32 - 1)


class MemoryChannel:
    """A client that has said all it will ever say."""

    def __init__(self, said: bytes) -> None:
        self.said = said
        self.at = 0
        self.heard = bytearray()

    async def read_exactly(self, size: int) -> bytes:
        """The next ``size`` bytes, or the end."""
        left = len(self.said) - self.at
        if size > left:
            raise EndOfStream(left, size)
        self.at += size
        return self.said[self.at - size : self.at]

    async def skip(self, size: int) -> None:
        """Drops bytes."""
        await self.read_exactly(size)

    async def write(self, data: bytes) -> None:
        """Keeps what the server said."""
        self.heard += data

    def leftover(self) -> bytes:
        """What was not read."""
        return self.said[self.at :]

    def detach(self) -> Any:
        """Never called here."""
        raise AssertionError("a handshake does not detach")


class Source:
    """A device that only says what it is."""

    def channel(self, *, read_only: bool = False) -> Any:
        """What it offers."""
        caps = {"multi_conn"} if read_only else {"write", "flush", "fua", "zero", "fast_zero"}
        return SimpleNamespace(
            size=1 << 30,
            caps=frozenset(caps),
            block_size_min=512,
            block_size_preferred=4096,
            payload_size_max=32 << 20,
        )


EXPORTS = Exports(
    [Export("disk", Source(), description="a disk"), Export("é", Source(), read_only=True)]
)


def check_handshake(said: bytes) -> str:
    """Runs one handshake to its end and checks the answer's shape."""
    channel = MemoryChannel(said)
    coroutine = negotiate(channel, EXPORTS)
    try:
        # Nothing in memory waits, so one step is the whole handshake.
        coroutine.send(None)
    except StopIteration as end:
        result = end.value
    except ProtocolError:
        result = "protocol"
    else:
        raise AssertionError("the handshake waits for something")
    heard = bytes(channel.heard[GREETING_SIZE:])
    while heard.startswith(REPLY_MAGIC):
        option, kind, size = struct.unpack_from(">III", heard, 8)
        data = heard[20 : 20 + size]
        assert len(data) == size, f"option {option}: a reply of {size} bytes was cut"
        if kind >= 1 << 31:
            assert 0 < size <= nbd.ERROR_TEXT_SIZE_MAX, f"an error text of {size} bytes"
            data.decode()
        heard = heard[20 + size :]
    assert len(heard) in (0, 10, 10 + nbd.EXPORT_NAME_PAD_SIZE), f"{len(heard)} bytes unframed"
    if result is None or result == "protocol":
        return str(result)
    assert result.export in list(EXPORTS)
    assert result.structured or result.allocation_context is None
    assert len(result.leftover) < len(said)
    return "negotiated"


def check_parsers(data: bytes) -> None:
    """Every parser takes any bytes, or refuses them in one of two ways."""
    for parse in (nbd.parse_info_request, nbd.parse_meta_context_request, nbd.parse_export_name):
        try:
            parse(data)
        except InvalidArgument as refusal:
            assert refusal.message, "a refusal says why"


def check(data: bytes) -> str:
    """One input, as both fuzzers call it."""
    check_parsers(data[:70000])
    return check_handshake(data)


def _text(rng: random.Random) -> bytes:
    raw = rng.choice(
        [b"", b"disk", "é".encode(), b"base:", b"base:allocation", b"x" * 4096, b"\xff"]
    )
    size = len(raw) if rng.random() < 0.9 else rng.choice(INTERESTING)
    return struct.pack(">I", size) + raw


def _option(rng: random.Random) -> bytes:
    number = rng.choice([*range(12), rng.choice(INTERESTING)])
    if number in (6, 7):
        count = rng.randrange(6)
        data = _text(rng) + struct.pack(f">{count + 1}H", count, *(rng.choices(range(5), k=count)))
    elif number in (9, 10):
        count = rng.randrange(4)
        data = _text(rng) + struct.pack(">I", count) + b"".join(_text(rng) for _ in range(count))
    elif rng.random() < 0.7:
        data = rng.choice([b"", b"", b"disk", b"\0"])
    else:
        data = rng.randbytes(rng.choice([1, 17, 4097, 65537]))
    size = len(data) if rng.random() < 0.95 else rng.choice(INTERESTING)
    return struct.pack(">QII", OPTION_MAGIC, number, size) + data


def _mutate(rng: random.Random, data: bytes) -> bytes:
    body = bytearray(data)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 8])):
        at = rng.randrange(len(body) + 1)
        match rng.randrange(4):
            case 0:
                del body[at : at + rng.randrange(1, 9)]
            case 1:
                body[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 2:
                body[at : at + 4] = struct.pack(">I", rng.choice(INTERESTING))
            case _:
                body[at : at + 1] = rng.randbytes(1)
    return bytes(body)


def make_input(rng: random.Random) -> bytes:
    """A session of well-formed and mutated pieces."""
    flags = struct.pack(">I", rng.choice([0, 1, 2, 3, 3, 3, 3, 4]))
    options = b"".join(_option(rng) for _ in range(rng.choice([1, 2, 4, 8, 120])))
    return _mutate(rng, flags + options)


def run_random(seconds: float, seed: int) -> dict[str, int]:
    """Fuzzes until time is up; gives how often each outcome came up."""
    outcomes: dict[str, int] = {}
    stop_at = time.monotonic() + seconds
    number = 0
    while time.monotonic() < stop_at:
        said = make_input(random.Random(f"{seed}/{number}"))
        try:
            outcome = check(said)
        except BaseException:
            print(f"finding: seed {seed} input {number}: {said.hex()}", file=sys.stderr)
            raise
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        number += 1
    return outcomes


def run_atheris(seconds: float, seed: int) -> None:
    """Coverage-guided, where atheris is installed. It ends the process itself."""
    import atheris

    atheris.instrument_all()
    arguments = [sys.argv[0], f"-max_total_time={int(seconds)}", f"-seed={seed}"]
    atheris.Setup(arguments, check)
    atheris.Fuzz()


def main() -> int:
    """Runs for the time asked for."""
    parser = argparse.ArgumentParser(description="Fuzz the NBD option parser.")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    if importlib.util.find_spec("atheris"):
        run_atheris(options.seconds, seed)
        return 0
    print(f"no atheris here: random sessions from seed {seed}", flush=True)
    outcomes = run_random(options.seconds, seed)
    print(f"{sum(outcomes.values())} inputs: {outcomes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
