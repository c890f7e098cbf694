"""tidy finds each kind of broken habit, planted one at a time in a tree that is otherwise clean."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tidy = _load("tidy")

DOC = '"""What this is."""\n'
ENGINE = "//! What this is.\n//!\n//! Invariants:\n//! 1. One.\n"
CORE = "rust/pmemkit-core/src/"

CLEAN = {
    "ARCHITECTURE.md": "formats media bus namespace storage memory dax policy serve cli\n",
    "docs/glossary.md": "| Word | Meaning | Not |\n|---|---|---|\n| source | whence | `src` |\n",
    "src/pmemkit/__init__.py": DOC + "from pmemkit.serve import export\n",
    "src/pmemkit/errors.py": DOC,
    "src/pmemkit/units.py": DOC + "from pmemkit.errors import PmemError\n",
    "src/pmemkit/formats/__init__.py": DOC + "from pmemkit import errors, units\n",
    "src/pmemkit/storage/__init__.py": DOC + "from pmemkit import _native, formats\n",
    "src/pmemkit/memory/__init__.py": DOC,
    "src/pmemkit/serve/__init__.py": DOC + "def export(): ...\n",
    "src/pmemkit/cli/__init__.py": DOC + "from ..serve import export\nfrom . import common\n",
    "src/pmemkit/cli/common.py": DOC,
    "rust/pmemkit-core/Cargo.toml": '[dependencies]\nlibc = "0.2"\n',
    "rust/pmemkit-native/Cargo.toml": '[dependencies]\npyo3 = "0.30"\n',
    CORE + "media/port_x86_64.rs": "//! The port.\nuse core::arch::x86_64::*;\n",
    CORE + "block/sys.rs": "//! Calls.\nfn f() { unsafe { libc::close(3) }; }\n",
    CORE + "block/mod.rs": ENGINE + "fn f() -> i32 { libc::EIO } // libc::close(3)\n" + "\n" * 90,
    CORE + "nbd/tests.rs": "//! Tests.\nfn f() { unsafe { libc::close(3) }; }\n" + "\n" * 90,
    "rust/pmemkit-native/src/lib.rs": "//! Glue.\nfn f() {\n}\n",
    "src/pmemkit/_native.abi3.so": "built, and not ours to judge",
    "tests/test_one.py": "def test_one():\n    assert True\n",
}


def _write(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")


def _rules(root: Path) -> set[tuple[str, str]]:
    return {(finding.rule, finding.path) for finding in tidy.check(root)}


def test_a_clean_tree_has_no_findings(tmp_path):
    _write(tmp_path, CLEAN)
    assert tidy.check(tmp_path) == []


PLANTED = [
    ("import-direction", "src/pmemkit/formats/a.py", DOC + "import pmemkit.media\n"),
    ("import-direction", "src/pmemkit/formats/a.py", DOC + "from pmemkit import open_region\n"),
    ("import-direction", "src/pmemkit/storage/a.py", DOC + "from pmemkit import memory\n"),
    ("import-direction", "src/pmemkit/storage/a.py", DOC + "from ..serve import export\n"),
    ("import-direction", "src/pmemkit/units.py", DOC + "from pmemkit.formats import x\n"),
    ("import-direction", "src/pmemkit/cli/a.py", DOC + "import pmemkit.testing\n"),
    (
        "import-direction",
        "src/pmemkit/storage/a.py",
        DOC + "def lazy():\n    from pmemkit.policy import plan\n",
    ),
    ("import-direction", "src/pmemkit/newcomer.py", DOC),
    ("module-doc", "src/pmemkit/formats/a.py", "import os\n"),
    ("module-doc", CORE + "sg.rs", "fn f() {}\n"),
    ("invariants", CORE + "nbd/mod.rs", "//! What this is.\n" + "\n" * 90),
    ("invariants", CORE + "nbd/sys.rs", "//! What this is.\n" + "\n" * 90),
    ("file-length", "src/pmemkit/formats/a.py", DOC + "\n" * 700),
    ("file-length", CORE + "sg.rs", "//! X.\n" + "\n" * 700 + "#[cfg(test)]\n"),
    ("function-length", "tests/test_two.py", "def f():\n" + "    pass\n" * 70),
    ("function-length", CORE + "sg.rs", '//! X.\nfn f() {\n"}";' + "\n" * 70 + "}\n"),
    ("line-length", "tests/test_two.py", "#" * 101 + "\n"),
    ("synonym", "tests/test_two.py", "def copy(src): ...\n"),
    ("synonym", "tests/test_two.py", "max_size = 1\n"),
    ("synonym", CORE + "sg.rs", "//! X.\nfn copy(src: u8) {}\n"),
    ("synonym", CORE + "sg.rs", "//! X.\nfn f() { let mut num_pages = 1; }\n"),
    ("cpu-port", CORE + "block/a.rs", "//! X.\nuse std::arch::x86_64::_mm_sfence;\n"),
    ("cpu-port", CORE + "media/a.rs", '//! X.\nfn f() { unsafe { asm!("nop") } }\n'),
    ("one-pyo3", "rust/pmemkit-other/Cargo.toml", '[dependencies]\npyo3 = "0.30"\n'),
    ("system-calls", CORE + "block/a.rs", "//! X.\nfn f() { unsafe { libc::close(3) }; }\n"),
    ("system-calls", CORE + "block/a.rs", "//! X.\nuse libc::{close, EIO};\n"),
    ("system-calls", CORE + "block/a.rs", '//! X.\nextern "C" {\n    fn close(fd: i32);\n}\n'),
    ("no-page-map", CORE + "block/a.rs", "//! X.\nuse crate::frames::Pool;\n"),
    ("no-page-map", CORE + "sg.rs", "//! X.\nuse crate::{error::Kind, frames::Pool};\n"),
    ("unfinished", "docs/notes.md", "TO" + "DO: write\n"),
    ("unfinished", CORE + "sg.rs", "//! X.\n// FIX" + "ME\n"),
    ("machine-path", "docs/notes.md", "see /wo" + "rk/main\n"),
    ("machine-path", "docs/notes.md", "from py" + "pi.org\n"),
    ("glue-length", "rust/pmemkit-native/src/a.rs", "//! X.\nfn f() {" + "\n" * 25 + "}\n"),
    ("allowlist", "tools/tidy-allow.txt", "line-length tests/test_one.py\n"),
    ("allowlist", "tools/tidy-allow.txt", "line-length tests/test_one.py not needed at all\n"),
]


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_a_planted_violation_is_found(tmp_path, rule, path, text):
    _write(tmp_path, CLEAN | {path: text})
    assert _rules(tmp_path) == {(rule, path)}


def test_every_rule_is_planted():
    planted = {rule for rule, _, _ in PLANTED}
    assert planted | {"architecture"} == set(tidy.RULES)


def test_a_package_that_the_map_leaves_out_is_found(tmp_path):
    _write(tmp_path, CLEAN | {"ARCHITECTURE.md": "storage memory cli\n"})
    assert _rules(tmp_path) == {("architecture", "ARCHITECTURE.md")}
    assert {finding.message for finding in tidy.check(tmp_path)} == {
        "say what formats is for",
        "say what serve is for",
    }


def test_an_exception_with_a_reason_lets_its_finding_pass(tmp_path):
    long_line = {"tests/test_two.py": "#" * 101 + "\n"}
    allowed = {"tools/tidy-allow.txt": "line-length tests/test_two.py a table reads better wide\n"}
    _write(tmp_path, CLEAN | long_line | allowed)
    assert tidy.check(tmp_path) == []


def test_the_replacement_is_named(tmp_path):
    _write(tmp_path, CLEAN | {"tests/test_two.py": "src_path = 1\n"})
    (finding,) = tidy.check(tmp_path)
    assert finding.message == "src_path: say source, not src"


def test_names_of_other_peoples_apis_may_be_used(tmp_path):
    text = "import x\n\nx.run(max_examples=3, src=x.dst)\n"
    _write(tmp_path, CLEAN | {"tests/test_two.py": text})
    assert tidy.check(tmp_path) == []


def test_rust_text_is_blanked_without_moving_lines():
    code = "a // b\n/* c\nd */ \"e\\\"f\" r#\"g\"h\"# 'i' '\\n' fn k<'a>(x: &'a u8) {}\n"
    blank = tidy.blank_rust(code)
    assert len(blank) == len(code) and blank.count("\n") == code.count("\n")
    assert blank.split() == ["a", "fn", "k<'a>(x:", "&'a", "u8)", "{}"]


def test_this_repository_is_clean_of_unneeded_exceptions():
    findings = [f for f in tidy.check(ROOT) if f.rule == "allowlist"]
    assert findings == []
