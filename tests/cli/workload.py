"""Work as people have it, in a directory: unpack and build, databases, blocks of a large file.

The same amount of it leaves the same bytes wherever it runs: two directories can be compared.
"""

import compileall
import mmap
import os
import random
import shutil
import sqlite3
import sysconfig
import tarfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode

from mount_run import run

BLOCK = 4096
MIB = 1 << 20
SOURCE = """
#include <stdint.h>
uint64_t step_{n}(uint64_t seed) {{
    for (int i = 0; i < {n} + 3; i++) seed = seed * {odd}u + (seed >> 7) + i;
    return seed;
}}
"""


@dataclass(frozen=True)
class Amount:
    """How much of everything."""

    packages: tuple[str, ...]
    """Of the standard library; nothing named is all of it."""
    sources: int
    transactions: int
    blocks: int
    file_size: int = 4 * MIB


SMALL = Amount(("json", "email", "logging"), 4, 60, 400)
FULL = Amount((), 60, 3000, 20_000, 64 * MIB)


def make_tarball(path, amount):
    """A tarball of Python sources."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib"}
    roots = [library / name for name in amount.packages] or [library]
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for file in sorted(each for root in roots for each in root.rglob("*.py")):
            inside = file.relative_to(library)
            if not left_out.intersection(inside.parts) and not file.is_symlink():
                archive.add(file, inside)


def unpack_and_build(directory, tarball, amount):
    """Unpacks sources, compiles all of them, and builds and runs a program where there is gcc."""
    tree = directory / "tree"
    with tarfile.open(tarball) as archive:
        archive.extractall(tree, filter="data")
    mode = PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(tree, quiet=2, stripdir=str(directory), invalidation_mode=mode)
    if shutil.which("gcc") is not None:
        program(directory, amount.sources)


def program(directory, count):
    names = []
    for number in range(count):
        names.append(f"step_{number}.c")
        (directory / names[-1]).write_text(SOURCE.format(n=number, odd=2 * number + 6_364_135))
    calls = "".join(f"seed = step_{number}(seed);" for number in range(count))
    declared = "".join(f"uint64_t step_{number}(uint64_t);" for number in range(count))
    (directory / "main.c").write_text(
        f"#include <stdio.h>\n#include <stdint.h>\n{declared}\n"
        f'int main(void) {{ uint64_t seed = 1; {calls} printf("%lx\\n", seed); }}\n'
    )
    objects = []
    for name in [*names, "main.c"]:
        run("gcc", "-O2", "-c", name, cwd=directory)
        objects.append(name.replace(".c", ".o"))
    run("gcc", "-o", "program", *objects, cwd=directory)
    seed = 1
    for number in range(count):
        for step in range(number + 3):
            seed = (seed * (2 * number + 6_364_135) + (seed >> 7) + step) % (1 << 64)
    assert run(directory / "program").stdout == f"{seed:x}\n"


def databases(directory, amount):
    """Two databases that sync each transaction: with a rollback journal, and with a log."""
    for journal in ("delete", "wal"):
        rng = random.Random(journal)
        path = directory / f"{journal}.db"
        # None: transactions begin where they are begun.
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute(f"pragma journal_mode={journal}")
            database.execute("pragma synchronous=full")
            database.execute("create table account (number integer primary key, sum, note blob)")
            for number in range(amount.transactions):
                database.execute("begin")
                row = (number, 0, rng.randbytes(rng.choice([20, 300])))
                database.execute("insert into account values (?, ?, ?)", row)
                for _ in range(3):
                    # Few are used much.
                    chosen = int(number * rng.random() ** 4)
                    words = "update account set sum = sum + ? where number = ?"
                    database.execute(words, (rng.randrange(1000), chosen))
                database.execute("commit")
            assert database.execute("pragma integrity_check").fetchone() == ("ok",)


def blocks(directory, amount):
    """Overwrites random blocks of two files, one of them past the page cache; reads them back."""
    for name, flags in (("buffered", 0), ("direct", os.O_DIRECT)):
        rng = random.Random(name)
        content = bytearray(amount.file_size)
        fd = os.open(directory / name, os.O_RDWR | os.O_CREAT | flags)
        with mmap.mmap(-1, MIB) as buffer:
            for at in range(0, amount.file_size, MIB):
                os.pwrite(fd, buffer, at)
            os.fsync(fd)
            view = memoryview(buffer)
            for number in range(amount.blocks):
                at = int(amount.file_size // BLOCK * rng.random() ** 3) * BLOCK
                content[at : at + BLOCK] = rng.randbytes(BLOCK)
                view[:BLOCK] = content[at : at + BLOCK]
                assert os.pwrite(fd, view[:BLOCK], at) == BLOCK
                if number % 16 == 15:
                    os.fsync(fd)
            os.fsync(fd)
            for at in range(0, amount.file_size, MIB):
                assert os.preadv(fd, [buffer], at) == MIB
                assert bytes(buffer) == content[at : at + MIB], (name, at)
            view.release()
        os.close(fd)


def work(directory, tarball, amount):
    """All of it."""
    unpack_and_build(directory, tarball, amount)
    databases(directory, amount)
    blocks(directory, amount)
