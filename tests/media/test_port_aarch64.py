"""The assembly of the aarch64 port is assembled here; the Rust around it is not built here."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "rust" / "pmemkit-core" / "src" / "media" / "port_aarch64.S"
ASSEMBLER = "aarch64-linux-gnu-as"
DUMPER = "aarch64-linux-gnu-objdump"


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for program in (ASSEMBLER, DUMPER):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: binutils-aarch64-linux-gnu)")
    target = tmp_path_factory.mktemp("aarch64") / "port.o"
    subprocess.run([ASSEMBLER, "--fatal-warnings", "-o", target, SOURCE], check=True)
    return target


def dump(assembled: Path, *options: str) -> str:
    command = [DUMPER, *options, str(assembled)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture(scope="module")
def listing(assembled: Path) -> str:
    return dump(assembled, "--disassemble", "--no-show-raw-insn")


def routine(listing: str, name: str) -> list[str]:
    """The instructions of one routine, each with single spaces."""
    found = re.search(rf"<{name}>:\n(.*?)(?:\n\n|\Z)", listing, re.DOTALL)
    assert found is not None, f"{name} is missing"
    lines = (line.split(":", 1)[1] for line in found[1].splitlines() if ":" in line)
    return [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize("point", ["cvap", "cvac"])
def test_lines_are_cleaned_to_the_point_asked_for(listing: str, point: str) -> None:
    code = routine(listing, f"pmemkit_flush_{point}")
    cleans = [line for line in code if line.startswith("dc ")]
    assert cleans == [f"dc {point}, x0"]
    assert "and x0, x0, #0xffffffffffffffc0" in code
    assert "add x0, x0, #0x40" in code


def test_the_fence_waits_for_cleaned_lines(listing: str) -> None:
    assert routine(listing, "pmemkit_fence")[:3] == ["dmb ishst", "dsb sy", "ret"]


def test_words_are_moved_by_one_instruction(listing: str) -> None:
    assert routine(listing, "pmemkit_load_u64")[0] == "ldr x1, [x0]"
    assert routine(listing, "pmemkit_store_u64")[0] == "str x1, [x0]"


def test_leaf_routines_use_no_stack_and_call_nothing(listing: str) -> None:
    start = listing.index("<pmemkit_copy>:")
    leaf = listing[start : listing.index("<pmemkit_fence>:")]
    assert not re.search(r"\bsp\b|\bbl\b|\bblr\b|\bx(19|2\d|30)\b", leaf)


def test_every_symbol_that_rust_declares_is_there(assembled: Path) -> None:
    rust = SOURCE.with_suffix(".rs").read_text()
    declared = set(re.findall(r"(?:static|fn) (pmemkit_\w+)", rust))
    table = dump(assembled, "--syms")
    defined = {line.split()[-1] for line in table.splitlines() if ".text" in line}
    assert len(declared) >= 9
    assert declared <= defined
