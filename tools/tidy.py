#!/usr/bin/env python3
"""Checks the habits of this repository that no other linter knows.

    tools/tidy.py [ROOT]     prints ``path:line: rule: what to do`` and exits 1 when there is any

Rules: see `RULES`, which is also what `--rules` prints. A habit may be broken where it makes the
code worse: an entry ``rule path reason`` in ``tools/tidy-allow.txt`` lets it pass. An entry without
a reason, or one that nothing needs, is itself a finding.

What this does not do: format, type-check, or judge anything that a person should.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

__all__ = ["RULES", "Finding", "check", "main"]

RULES = {
    "import-direction": "src/pmemkit packages import downwards only",
    "module-doc": "a module opens with what it is",
    "invariants": "an engine module lists its invariants",
    "file-length": "a file has at most 700 lines before its tests",
    "function-length": "a function has at most 70 lines",
    "line-length": "a line has at most 100 columns",
    "synonym": "one word per thing; docs/glossary.md has the list",
    "cpu-port": "core::arch and asm! stand in media/port* only",
    "one-pyo3": "exactly one Cargo.toml knows Python",
    "system-calls": "libc calls stand in sys.rs, guard.rs, error.rs and files named after a call",
    "no-page-map": "the storage path does not know page frames",
    "architecture": "ARCHITECTURE.md names every package",
    "unfinished": "no marks for work that was not done",
    "machine-path": "no path of one machine, no address of a registry",
    "glue-length": "a glue function has at most 25 lines",
    "allowlist": "an exception has a reason and is needed",
}

FILE_LINES = 700
FUNCTION_LINES = 70
GLUE_LINES = 25
LINE_COLUMNS = 100
ENGINE_LINES = 80
"""An engine module shorter than this before its tests needs no list of invariants."""

ALLOWLIST = "tools/tidy-allow.txt"
GLOSSARY = "docs/glossary.md"
PACKAGE = "src/pmemkit/"
CORE = "rust/pmemkit-core/src/"
GLUE = "rust/pmemkit-native/"
ENGINES = (
    "media",
    "block",
    "nbd",
    "cache",
    "btt",
    "frames",
    "memory",
    "vhost",
    "fuse",
    "fault",
    "direct",
    "remote",
)
STORAGE_PATH = ("media", "block", "nbd", "cache", "btt", "vhost", "fuse", "sg", "place")
SYSTEM_FILES = ("sys.rs", "guard.rs", "error.rs", "membarrier.rs", "uffd.rs")

# Who stands on whom. A package may import those with a smaller rank; packages of one rank do not
# know each other.
RANKS = {
    "errors": 0,
    "_native": 0,
    "files": 1,
    "units": 1,
    "trust": 1,
    "formats": 2,
    "media": 3,
    "bus": 4,
    "namespace": 5,
    "dax": 5,
    "storage": 6,
    "memory": 6,
    "policy": 7,
    "sg": 7,
    "fault": 7,
    "serve": 8,
    "": 9,
    "bench": 10,
    "cli": 11,
    "__main__": 12,
    "testing": 13,
}
FREE = ("", "testing", "bench")
"""May import anything: the package's own ``__init__``, the suites and the benchmarks."""

# Split, so that this file does not find itself.
_UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
_MACHINE = re.compile(
    r"(?<![\w.~-])/(?:wo" r"rk|ro" r"ot)/|py" r"pi\.org|pythonho" r"sted\.org|crat" r"es\.io"
)
_SKIPPED_DIRS = {".git", ".venv", "target", "build", "__pycache__", "node_modules"}
_LOCK_FILES = ("Cargo.lock",)


@dataclass(frozen=True, order=True)
class Finding:
    """One broken habit."""

    path: str
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.message}"


class Source:
    """One tracked file and what can be known of it, worked out once."""

    def __init__(self, root: Path, path: str) -> None:
        self.path = path
        self.suffix = PurePosixPath(path).suffix
        self.bytes = (root / path).read_bytes()

    @cached_property
    def text(self) -> str:
        """The text, or nothing for a binary file."""
        try:
            return "" if b"\0" in self.bytes else self.bytes.decode()
        except UnicodeDecodeError:
            return ""

    @cached_property
    def lines(self) -> list[str]:
        """The lines, without their ends."""
        return self.text.split("\n")

    @cached_property
    def tree(self) -> ast.Module | None:
        """The syntax tree of a Python file, or ``None`` where it has a syntax error."""
        try:
            return ast.parse(self.text)
        except SyntaxError:
            return None

    @cached_property
    def code(self) -> str:
        """Rust code with comments and literals blanked; lines stay where they are."""
        return blank_rust(self.text)

    @cached_property
    def lines_before_tests(self) -> int:
        """Lines of a file up to Rust's inline tests; none of a module of tests."""
        if PurePosixPath(self.path).name == "tests.rs":
            return 0
        for number, line in enumerate(self.lines):
            if self.suffix == ".rs" and line.startswith("#[cfg(test)]"):
                return number
        return len(self.lines)

    def at(self, position: int) -> int:
        """The line number of a position in `text` or `code`."""
        return self.code.count("\n", 0, position) + 1

    def find(self, rule: str, line: int, message: str) -> Finding:
        """A finding in this file."""
        return Finding(self.path, line, rule, message)


_RUST_BLANK = re.compile(
    r"""//[^\n]*|/\*.*?\*/"""
    r"""|b?r(?P<h>\#*)".*?"(?P=h)|[bc]?"(?:\\.|[^"\\])*\""""
    r"""|b?'(?:\\[^\n]{1,8}?|[^'\\\n])'""",
    re.DOTALL,
)


def blank_rust(text: str) -> str:
    """Rust text with comments, strings and characters replaced by blanks of the same length."""
    return _RUST_BLANK.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def rust_functions(code: str) -> Iterator[tuple[str, int, int]]:
    """``(name, start, end)`` of every function with a body in blanked code, as positions."""
    for match in re.finditer(r"\bfn\s+(\w+)", code):
        depth = 0
        body = None
        for position in range(match.end(), len(code)):
            letter = code[position]
            if letter in "([":
                depth += 1
            elif letter in ")]":
                depth -= 1
            elif letter == ";" and depth == 0 and body is None:
                break
            elif letter == "{":
                if depth == 0 and body is None:
                    body = position
                depth += 1
            elif letter == "}":
                depth -= 1
                if depth == 0 and body is not None:
                    yield match.group(1), match.start(), position
                    break


# --- Python ---------------------------------------------------------------------------------------


def _package_of(path: str) -> str:
    """The name in `RANKS` of a file under `PACKAGE`: its top-level package or module."""
    first = PurePosixPath(path.removeprefix(PACKAGE)).parts[0]
    name = first.removesuffix(".pyi").removesuffix(".py")
    return "" if name == "__init__" else name


def _imported(node: ast.AST, path: str) -> Iterator[str]:
    """The names in `RANKS` that an import statement reaches."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            parts = alias.name.split(".")
            if parts[0] == "pmemkit":
                yield parts[1] if len(parts) > 1 else ""
    elif isinstance(node, ast.ImportFrom):
        module = (node.module or "").split(".") if node.module else []
        if node.level:
            here = list(PurePosixPath(path.removeprefix("src/")).parts[:-1])
            module = here[: len(here) - node.level + 1] + module
        if module[:1] != ["pmemkit"]:
            return
        if len(module) > 1:
            yield module[1]
            return
        for alias in node.names:
            yield alias.name if alias.name in RANKS else ""


def check_imports(source: Source) -> Iterator[Finding]:
    """Imports of a file of the package, wherever they stand in it."""
    is_python = source.suffix in (".py", ".pyi")
    if not source.path.startswith(PACKAGE) or not is_python or source.tree is None:
        return
    own = _package_of(source.path)
    if own not in RANKS:
        text = f"{own} has no place among the layers; give it one in tools/tidy.py"
        yield source.find("import-direction", 1, text)
        return
    if own in FREE:
        return
    for node in ast.walk(source.tree):
        for other in _imported(node, source.path):
            if other == own:
                continue
            if RANKS.get(other, 99) >= RANKS[own]:
                text = f"{own} must not import {other or 'pmemkit itself'}: it does not lie below"
                yield source.find("import-direction", getattr(node, "lineno", 1), text)


def _python_functions(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """``(name, line, length)`` of every function; its docstring is not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                doc = node.body[0]
                length -= (doc.end_lineno or doc.lineno) - doc.lineno + 1
            yield node.name, node.lineno, length


def check_python(source: Source) -> Iterator[Finding]:
    """Module doc and function length of a Python file."""
    if source.suffix != ".py" or source.tree is None:
        return
    in_tests = source.path.startswith("tests/")
    if not in_tests and source.text.strip() and ast.get_docstring(source.tree) is None:
        yield source.find("module-doc", 1, "open with a docstring that says what this module is")
    for name, line, length in _python_functions(source.tree):
        if length > FUNCTION_LINES:
            text = f"{name} has {length} lines; split it ({FUNCTION_LINES} at most)"
            yield source.find("function-length", line, text)


def _python_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every name that a Python file defines: names of other people's APIs are only used."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


# --- Rust -----------------------------------------------------------------------------------------


def check_rust(source: Source) -> Iterator[Finding]:
    """Module doc, function lengths and the walls between Rust modules."""
    if source.suffix != ".rs":
        return
    if not source.text.lstrip().startswith("//!"):
        yield source.find("module-doc", 1, "open with //! and say what this module is")
    limit, rule = FUNCTION_LINES, "function-length"
    if source.path.startswith(GLUE):
        limit, rule = GLUE_LINES, "glue-length"
    for name, start, end in rust_functions(source.code):
        length = source.at(end) - source.at(start) + 1
        if length > limit:
            text = f"{name} has {length} lines; split it ({limit} at most)"
            yield source.find(rule, source.at(start), text)
    if source.path.startswith(CORE):
        yield from _check_core(source)


def _check_core(source: Source) -> Iterator[Finding]:
    inside = PurePosixPath(source.path.removeprefix(CORE))
    top = inside.parts[0].removesuffix(".rs")
    is_port = top == "media" and any(part.startswith("port") for part in inside.parts)
    # The two doors to the machine may say what they need instead of what they keep.
    is_door = is_port or inside.name == "sys.rs"
    said = "Invariants:" in source.text or (is_door and "Preconditions:" in source.text)
    if top in ENGINES and source.lines_before_tests > ENGINE_LINES and not said:
        word = "Preconditions:" if is_door else "Invariants:"
        yield source.find("invariants", 1, f'list the "{word}" of this module in its head')
    if not is_port:
        for match in re.finditer(r"\b(?:core|std)::arch\b|\b(?:global_)?asm!", source.code):
            text = f"{match.group()} belongs into media/port*"
            yield source.find("cpu-port", source.at(match.start()), text)
    if inside.name not in SYSTEM_FILES and not is_port:
        before_tests = "\n".join(source.code.split("\n")[: source.lines_before_tests])
        pattern = r"\blibc::[a-z]\w*\s*\(|\buse\s+libc::[^;]*;|\bextern\s+\w*\s*\{"
        for match in re.finditer(pattern, before_tests):
            words = " ".join(match.group().split())
            text = f"{words!r}: calls of the system belong into this module's sys.rs"
            yield source.find("system-calls", source.at(match.start()), text)
    if top in STORAGE_PATH:
        for match in re.finditer(r"\b(?:crate|super)::(?:\{[^;]*\b)?frames\b", source.code):
            text = "storage has no page map and must not know about frames"
            yield source.find("no-page-map", source.at(match.start()), text)


_RUST_DEFINITION = re.compile(
    r"\b(?:fn|const|static(?:\s+mut)?|struct|enum|mod|trait|type)\s+([A-Za-z_]\w*)"
    r"|\blet(?:\s+mut)?\s+([a-z_]\w*)"
    r"|(?<![:\w])([a-z_]\w*)\s*:(?!:)"
)


def _rust_names(source: Source) -> Iterator[tuple[str, int]]:
    for match in _RUST_DEFINITION.finditer(source.code):
        yield match[match.lastindex or 1], source.at(match.start())


# --- every file -----------------------------------------------------------------------------------


def check_text(source: Source) -> Iterator[Finding]:
    """Lengths, unfinished work and traces of one machine in any text file."""
    if source.suffix in (".py", ".rs"):
        if source.lines_before_tests > FILE_LINES:
            text = f"{source.lines_before_tests} lines; split the file ({FILE_LINES} at most)"
            yield source.find("file-length", 1, text)
        for number, line in enumerate(source.lines, 1):
            if len(line) > LINE_COLUMNS:
                text = f"{len(line)} columns ({LINE_COLUMNS} at most)"
                yield source.find("line-length", number, text)
    for number, line in enumerate(source.lines, 1):
        if match := _UNFINISHED.search(line):
            text = f"{match.group()}: finish it, or write an issue"
            yield source.find("unfinished", number, text)
        if PurePosixPath(source.path).name in _LOCK_FILES:
            continue
        if match := _MACHINE.search(line):
            text = f"{match.group()!r} names one machine or a registry"
            yield source.find("machine-path", number, text)


def synonyms(glossary: str) -> dict[str, str]:
    """Banned word -> replacement, from the glossary's table ``| word | meaning | not |``."""
    banned = {}
    for line in glossary.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3:
            for word in re.findall(r"`(\w+)`", cells[2]):
                banned[word] = re.sub(r"[`*]", "", cells[0])
    return banned


_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_PREFIXES = {"max": "_max", "min": "_min", "num": "_count"}


def check_names(source: Source, banned: dict[str, str]) -> Iterator[Finding]:
    """Names that a file defines, against the glossary and the order of words in a name."""
    if source.suffix == ".rs":
        names: Iterable[tuple[str, int]] = _rust_names(source)
    elif source.suffix in (".py", ".pyi") and source.tree is not None:
        names = _python_names(source.tree)
    else:
        return
    seen = set()
    for name, line in names:
        if (name, line) in seen:
            continue
        seen.add((name, line))
        parts = [part.lower() for part in _PARTS.findall(name)]
        for part in parts:
            if part in banned:
                text = f"{name}: say {banned[part]}, not {part}"
                yield source.find("synonym", line, text)
        if len(parts) > 1 and parts[0] in _PREFIXES and "_" in name.strip("_"):
            text = f"{name}: qualifiers come last, as in {parts[1]}{_PREFIXES[parts[0]]}"
            yield source.find("synonym", line, text)


# --- the tree -------------------------------------------------------------------------------------


def check_tree(sources: dict[str, Source]) -> Iterator[Finding]:
    """What no single file can tell: who knows Python, what the one-page map leaves out."""
    knowing = [
        path
        for path, source in sources.items()
        if path.endswith("Cargo.toml") and re.search(r"^pyo3\b", source.text, re.MULTILINE)
    ]
    for path in sorted(knowing)[1:]:
        yield Finding(path, 1, "one-pyo3", f"{sorted(knowing)[0]} already knows Python")
    packages = {
        PurePosixPath(path.removeprefix(PACKAGE)).parts[0]
        for path in sources
        if path.startswith(PACKAGE) and "/" in path.removeprefix(PACKAGE)
    }
    page = sources.get("ARCHITECTURE.md")
    for package in sorted(packages):
        if page is None or not re.search(rf"\b{re.escape(package)}\b", page.text):
            yield Finding("ARCHITECTURE.md", 1, "architecture", f"say what {package} is for")


@dataclass
class Exceptions:
    """The allowlist: ``rule path reason``, one a line."""

    entries: dict[tuple[str, str], int]
    findings: list[Finding]

    @classmethod
    def read(cls, source: Source | None) -> Exceptions:
        """Reads the list; an entry that does not read is a finding."""
        entries: dict[tuple[str, str], int] = {}
        findings = []
        for number, line in enumerate(source.lines if source else [], 1):
            words = line.split(None, 2)
            if not words or line.startswith("#"):
                continue
            if len(words) < 3 or words[0] not in RULES:
                text = "write a known rule, a path and a reason"
                findings.append(Finding(ALLOWLIST, number, "allowlist", text))
                continue
            entries[words[0], words[1]] = number
        return cls(entries, findings)

    def filter(self, findings: Iterable[Finding]) -> Iterator[Finding]:
        """What is not allowed, and the entries that nothing needed."""
        used = set()
        for finding in findings:
            if (finding.rule, finding.path) in self.entries:
                used.add((finding.rule, finding.path))
            else:
                yield finding
        for key, number in self.entries.items():
            if key not in used:
                text = f"nothing needs {key[0]} {key[1]}; remove it"
                yield Finding(ALLOWLIST, number, "allowlist", text)
        yield from self.findings


def tracked(root: Path) -> list[str]:
    """Files under version control and new ones that are not ignored; all files without git."""
    command = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard"]
    if (root / ".git").exists():
        try:
            listed = subprocess.run(command, capture_output=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            pass
        else:
            names = {name for name in listed.decode().split("\0") if name}
            return sorted(name for name in names if (root / name).is_file())
    return sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and not _SKIPPED_DIRS & set(path.relative_to(root).parts)
    )


def check(root: Path) -> list[Finding]:
    """Every finding under `root`, in order."""
    sources = {path: Source(root, path) for path in tracked(root)}
    glossary = sources.get(GLOSSARY)
    banned = synonyms(glossary.text) if glossary else {}
    findings: list[Finding] = []
    for source in sources.values():
        findings.extend(check_text(source))
        findings.extend(check_python(source))
        findings.extend(check_imports(source))
        findings.extend(check_rust(source))
        findings.extend(check_names(source, banned))
    findings.extend(check_tree(sources))
    return sorted(Exceptions.read(sources.get(ALLOWLIST)).filter(findings))


def main(arguments: list[str] | None = None) -> int:
    """Prints the findings."""
    parser = argparse.ArgumentParser(description="Check the habits of this repository.")
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--rules", action="store_true", help="list the rules and stop")
    options = parser.parse_args(arguments)
    if options.rules:
        for rule, text in RULES.items():
            print(f"{rule:18} {text}")
        return 0
    findings = check(options.root)
    for finding in findings:
        print(finding)
    print(f"tidy: {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
