"""Python and pmemkit for the guest: further archives of the first file system, laid over it.

Two layers, each kept under ``build/guest`` by a digest of what went in: the running interpreter
with its standard library and pmemkit's dependencies, and pmemkit itself, so that a change of its
sources makes only the small one anew. In the guest there are then ``/bin/python3`` and
``/bin/pmem``.

Everything is compiled already, and the standard library comes without its sources: it is imported
from memory, and under TCG the seconds go into compiling and looking up, not into loading.

Invariants:
1. A layer of the cache is complete: it is written elsewhere and renamed.
2. Its name is a digest of everything that went into it.

What this does not do: build pmemkit's native module (`tools/build-native` does), or include NumPy,
tests, tkinter and what else no program in the guest needs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tools.guest_image import Archive
from tools.guest_packages import CACHE, ROOT, GuestUnavailableError, libraries

__all__ = ["layers"]

PREFIX = "python"
"""Where the interpreter is in the guest, from the root."""

PACKAGE = ROOT / "src" / "pmemkit"
NATIVE = "_native.abi3.so"

_VERSION = f"python{sys.version_info[0]}.{sys.version_info[1]}"
_LIBRARY = f"{PREFIX}/lib/{_VERSION}"
_LEFT_OUT = re.compile(
    r"(test|tests|idlelib|tkinter|turtledemo|turtle\.py|ensurepip|lib2to3|pydoc_data|__pycache__"
    r"|site-packages|dist-packages|config-.*|_test.*|_ctypes_test.*|_tkinter.*|xx.*|_xx.*|nis\..*"
    r"|_dbm\..*|_gdbm\..*|_curses.*|readline\..*|_sqlite3.*)"
)
"""Names in the standard library that the guest does without, at any depth."""

_LAUNCHER = f"""\
#!/{PREFIX}/bin/{_VERSION} -P
import sys

from pmemkit.cli import main

sys.exit(main())
"""


def _files(top: Path, left_out: re.Pattern[str]) -> Iterator[Path]:
    """Paths of the files under a directory, relative to it and in order."""
    for name, directories, files in os.walk(top):
        directories[:] = sorted(each for each in directories if not left_out.fullmatch(each))
        for each in sorted(files):
            if not left_out.fullmatch(each):
                yield (Path(name) / each).relative_to(top)


def _compiled(source: Path, shown: str, scratch: Path) -> bytes | None:
    """The bytecode of a source file, valid whatever the times are; ``None`` if it has none."""
    target = scratch / "compiled"
    try:
        py_compile.compile(
            str(source),
            str(target),
            dfile=shown,
            doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
    except (py_compile.PyCompileError, ValueError):
        return None
    return target.read_bytes()


def _kept(source: Path) -> bytes | None:
    """The bytecode that this interpreter keeps of a source file, if it is of this source."""
    kept = Path(importlib.util.cache_from_source(str(source)))
    try:
        data, found = kept.read_bytes(), source.stat()
    except OSError:
        return None
    times = b"".join(
        (value & 0xFFFFFFFF).to_bytes(4, "little") for value in (int(found.st_mtime), found.st_size)
    )
    plain = importlib.util.MAGIC_NUMBER + bytes(4)
    return data if data[:16] == plain + times else None


def _stripped(path: Path, scratch: Path) -> bytes:
    """A shared object without what only a debugger reads, where there is a ``strip``."""
    strip = shutil.which("strip")
    target = scratch / "stripped"
    if strip is not None:
        command = [strip, "--strip-unneeded", "-o", str(target), str(path)]
        if subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0:
            return target.read_bytes()
    return path.read_bytes()


# --- the interpreter -----------------------------------------------------------------------------


def _wanted() -> list[str]:
    """Distributions that pmemkit needs, from ``pyproject.toml``, with what those need."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        waiting = list(tomllib.load(file)["project"]["dependencies"])
    found: list[str] = []
    while waiting:
        requirement = waiting.pop()
        match = re.match(r"[\w.-]+", requirement)
        if match is None or "extra ==" in requirement or match[0].lower() in found:
            continue
        name = match[0].lower()
        try:
            waiting += importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError as missing:
            if ";" in requirement:
                continue  # Wanted under a condition, which does not hold here.
            raise GuestUnavailableError(f"the Python package {name} is missing") from missing
        found.append(name)
    return found


def _dependencies() -> dict[str, Path]:
    """Files of those distributions by their names below the standard library."""
    found = {}
    for name in _wanted():
        for path in importlib.metadata.distribution(name).files or []:
            inside = path.parts[0] != ".." and "__pycache__" not in path.parts
            if inside and ".dist-info" not in path.parts[0]:
                found[str(path)] = Path(str(path.locate()))
    return found


def _standard_library() -> dict[str, Path]:
    """Files of the interpreter by their names below its standard library."""
    top = Path(sysconfig.get_path("stdlib"))
    found = {str(name): top / name for name in _files(top, _LEFT_OUT)}
    dynamic = Path(sysconfig.get_config_var("DESTSHARED") or top / "lib-dynload")
    for name in _files(dynamic, _LEFT_OUT):
        found[f"lib-dynload/{name}"] = dynamic / name
    return found


def _interpreter() -> Path:
    """The file of the running interpreter, whatever virtual environment it was started from."""
    executable = getattr(sys, "_base_executable", None) or sys.executable
    return Path(executable).resolve()


def _add_library(archive: Archive, files: dict[str, Path], scratch: Path) -> None:
    for name, path in sorted(files.items()):
        if path.suffix == ".py":
            data = _kept(path) or _compiled(path, name, scratch)
            if data is not None:
                # In the place of its source a file of bytecode is imported with fewest look-ups.
                archive.file(f"{_LIBRARY}/{name}c", data)
        elif path.suffix == ".so":
            archive.file(f"{_LIBRARY}/{name}", _stripped(path, scratch), 0o755)
        elif path.suffix not in (".pyi", ".a", ".o", ".exe"):
            archive.file(f"{_LIBRARY}/{name}", path.read_bytes())


def _interpreter_layer(files: dict[str, Path], scratch: Path) -> bytes:
    interpreter = _interpreter()
    archive = Archive()
    archive.file(f"{PREFIX}/bin/{_VERSION}", _stripped(interpreter, scratch), 0o755)
    for name in ("python3", "python", _VERSION):
        archive.link(f"bin/{name}", f"/{PREFIX}/bin/{_VERSION}")
    _add_library(archive, files, scratch)
    objects = [interpreter, *(path for path in files.values() if path.suffix == ".so")]
    for library in sorted(libraries(objects)):
        archive.file(str(library).lstrip("/"), _stripped(library, scratch), 0o755)
    return archive.bytes()


# --- pmemkit -------------------------------------------------------------------------------------


def _package_files(package: Path) -> dict[str, Path]:
    if not (package / NATIVE).is_file():
        raise GuestUnavailableError(f"pmemkit's {NATIVE} is not built (tools/build-native does)")
    left_out = re.compile(r"__pycache__|.*\.pyi|.*\.new|.*~|\..*")
    return {str(name): package / name for name in _files(package, left_out)}


def _package_layer(files: dict[str, Path], scratch: Path) -> bytes:
    archive = Archive()
    archive.file("bin/pmem", _LAUNCHER.encode(), 0o755)
    for name, path in sorted(files.items()):
        place = f"{_LIBRARY}/pmemkit/{name}"
        if path.suffix == ".so":
            archive.file(place, _stripped(path, scratch), 0o755)
            continue
        archive.file(place, path.read_bytes())
        if path.suffix == ".py":
            data = _compiled(path, f"/{place}", scratch)
            if data is not None:
                # Here the sources stay: a traceback of pmemkit shows its lines.
                archive.file(importlib.util.cache_from_source(place), data)
    # What the interpreter's layer has by another name is left to it.
    known = {path.name for path in libraries([_interpreter()])}
    for library in sorted(libraries([files[NATIVE]])):
        if library.name not in known:
            archive.file(str(library).lstrip("/"), _stripped(library, scratch), 0o755)
    return archive.bytes()


# --- the cache -----------------------------------------------------------------------------------


def _write(target: Path, data: bytes) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".new-", delete=False) as file:
        file.write(data)
    return Path(file.name).rename(target)


def _digest(words: Iterable[str]) -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for word in words:
        digest.update(word.encode() + b"\0")
    return digest.hexdigest()[:16]


def _times(files: dict[str, Path]) -> Iterator[str]:
    """For files of installed packages, which are many: those of one time and size are the same."""
    for name, path in sorted(files.items()):
        found = path.stat()
        yield f"{name} {path} {found.st_size} {found.st_mtime_ns}"


def _contents(files: dict[str, Path]) -> Iterator[str]:
    for name, path in sorted(files.items()):
        yield f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def layers(cache: Path | None = None, package: Path = PACKAGE) -> Sequence[Path]:
    """The archives to lay over the guest's; made unless the cache has them.

    `GuestUnavailableError` says what is missing here.
    """
    cache = (cache or CACHE) / "python"
    package_files = _package_files(package)
    files = {**_standard_library(), **_dependencies()}
    identity = [sys.version, *_times({**files, "": _interpreter()})]
    base = cache / f"interpreter-{_digest(identity)}.cpio"
    own = cache / f"pmemkit-{_digest([sys.version, *_contents(package_files)])}.cpio"
    with tempfile.TemporaryDirectory(prefix="pmemkit-guest-") as scratch:
        if not base.exists():
            _write(base, _interpreter_layer(files, Path(scratch)))
        if not own.exists():
            _write(own, _package_layer(package_files, Path(scratch)))
    return [base, own]
