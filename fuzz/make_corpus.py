"""Writes the seeds under fuzz/corpus/: a few well-formed inputs of every command and flag.

The seeds are small and committed; what a fuzzer finds beside them stays under build/fuzz/.
"""

import struct
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
MAGIC = 0x25609513
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16


def request(
    command: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 7
) -> bytes:
    """One request header as it stands on the wire."""
    return struct.pack(">IHHQQI", MAGIC, flags, command, cookie, offset, length)


def parser_session(size: int, *, flags: int = 0x0FFF & ~2, shift: int = 0) -> bytes:
    """The 16 bytes that request_parser takes a session from."""
    return struct.pack(">HBBQI", flags, 3, shift, size, 32 << 20)


def write(target: str, name: str, data: bytes) -> None:
    """Writes one seed."""
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


COMMANDS = {
    "read": request(READ, 4096, 512, DF),
    "write": request(WRITE, 4096, 64, FUA),
    "flush": request(FLUSH),
    "trim": request(TRIM, 0, 4096, FUA),
    "cache": request(CACHE, 0, 65536),
    "zero": request(WRITE_ZEROES, 512, 1024, NO_HOLE | FAST_ZERO),
    "status": request(BLOCK_STATUS, 0, 65536, REQ_ONE),
    "past_the_end": request(READ, 65536, 1),
    "wrap": request(WRITE_ZEROES, 2**64 - 512, 1024),
    "unknown": request(99, 0, 512, 1 << 15),
}


def program(base: int, *steps: tuple[int, int, int, int], sealed: bool = False) -> bytes:
    """A program of formats_fuzz: ``(what, place, other place, value)`` for each change."""
    body = b"".join(struct.pack("<BHHB", *step) for step in steps)
    return bytes([base, sealed]) + body


def format_seeds() -> None:
    """For each format: valid images, and each kind of change, sealed and not."""
    for target, bases in (("labels", 6), ("btt", 3), ("infoblock", 6)):
        for base in range(bases):
            write(f"formats_{target}", f"valid_{base}", program(base))
        for field in range(0, 24, 2):
            for value in (0, 24):
                changed = program(field % bases, (0, field, 0, value), sealed=True)
                write(f"formats_{target}", f"field_{field}_{value}", changed)
        write(f"formats_{target}", "flipped", program(0, (2, 3, 0, 1)))
        write(f"formats_{target}", "anywhere", program(1, (3, 0, 80, 255), sealed=True))
        write(f"formats_{target}", "copied", program(2, (4, 0, 1, 0), (4, 30, 2, 0), sealed=True))


def main() -> None:
    """Writes every seed."""
    format_seeds()
    for name, header in COMMANDS.items():
        write("request_parser", name, parser_session(65536) + header)
        payload = bytes(range(64)) if name == "write" else b""
        for mode in range(4):
            write("connection", f"{name}_{mode}", bytes([mode, 0]) + header + payload)
    everything = b"".join(COMMANDS.values())
    write("request_parser", "all_read_only", parser_session(1 << 40, flags=3, shift=9) + everything)
    batch = request(WRITE, 0, 8, cookie=1) + b"12345678" + request(READ, 0, 8, cookie=2)
    write("connection", "batch", bytes([3, 40]) + batch + request(FLUSH) + request(DISC))


if __name__ == "__main__":
    main()
