"""The journal of applied policies: what each run was about to do, what it replaced, what came of
it.

A directory holds one file a run, ``000001.jsonl`` and so on, one record a line:

    begin     what machine, which policy, which plan
    plan      the plan of a later round of the same run
    started   an entry: this step is about to be carried out
    kept      what the step is about to replace
    done      what came of it
    failed    why nothing came of it
    undoing   the entry is about to be taken back
    undone    it is taken back; in a sentence
    end       nothing more comes, and how it ended

Invariants:
1. A record is durable, with the file and the directory that hold it, before the call returns; so it
   is before the action it announces.
2. A record is never changed. A line that a power failure tore is the last one, and does not count:
   what it would have announced was not begun.
3. Every line has a checksum. Any other damage is :class:`Corrupt`, which names file and line.
4. Nobody but the owner may read it: what steps replaced is data of namespaces.
5. Who writes holds the lock; :meth:`Journal.lock` is :class:`Busy` for a second one.

States of an entry: started → done → undone, started → undone.

What this does not do: decide what to journal (:mod:`pmemkit.policy.apply`), or forget old runs.
"""

import base64
import fcntl
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pmemkit.errors import Busy, Corrupt, InvalidArgument, NoSpace
from pmemkit.files import sync_directory
from pmemkit.media.provider import failure_of
from pmemkit.policy.model import Entry, Plan, Step, as_plain
from pmemkit.policy.plain import from_plain

__all__ = ["Journal", "Run", "Writer"]

_RUN: Final = re.compile(r"(\d{6,})\.jsonl")
_BLOB_SIZE: Final = 64 << 10
"""Bytes from which on a value has a file of its own."""
_BYTES, _BLOB = "$bytes", "$blob"


@dataclass(slots=True)
class Run:
    """A run as its file tells it."""

    number: int
    begun: float
    """Seconds since 1970."""
    bus: str
    machine: str
    policy: str
    """A digest of the policy."""
    command: str = ""
    plans: list[Plan] = field(default_factory=list)
    """One a round."""
    entries: dict[int, Entry] = field(default_factory=dict)
    """Numbered from 1 on over all rounds."""
    errors: dict[int, str] = field(default_factory=dict)
    """Why entries failed, or could not be taken back."""
    undoing: int | None = None
    """The entry that was being taken back when the run was interrupted."""
    ended: str | None = None
    """How it ended; ``None``: it was interrupted, or is still at it."""

    @property
    def standing(self) -> list[int]:
        """The entries that are not undone, newest first."""
        return [n for n in sorted(self.entries, reverse=True) if self.entries[n].state != "undone"]

    @property
    def unsettled(self) -> int | None:
        """The entry of which nobody knows how far it came."""
        if self.undoing is not None:
            return self.undoing
        newest = max(self.entries, default=0)
        if newest and self.entries[newest].state == "started":
            return newest
        return None


class Journal:
    """A directory of runs. It is made when something is first written to it."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def __repr__(self) -> str:
        return f"<Journal {self.directory}>"

    # --- who is at it ----------------------------------------------------------------------------

    @contextmanager
    def lock(self, command: str = "pmem") -> Iterator[None]:
        """Holds the journal, and so the machine, for one writer. Raises :class:`Busy`, which says
        who has it."""
        path = self.directory / "lock"
        try:
            _make_directory(self.directory)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as cause:
            raise failure_of(cause, "lock", str(path)) from cause
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as cause:
                raise Busy(_holder(fd), op="lock", path=str(path)) from cause
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()} {command}\n".encode(), 0)
            yield
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)

    # --- reading ---------------------------------------------------------------------------------

    def numbers(self) -> list[int]:
        """The runs there are, oldest first."""
        try:
            names = [each.name for each in self.directory.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as cause:
            raise failure_of(cause, "read", str(self.directory)) from cause
        return sorted(int(match[1]) for name in names if (match := _RUN.fullmatch(name)))

    def runs(self, *, contents: bool = True) -> list[Run]:
        """Every run, oldest first; without ``contents`` not what steps replaced, which may be much.
        One of which not even the first record is whole did nothing and is left out."""
        found = (self._read(number, contents) for number in self.numbers())
        return [run for run in found if run is not None]

    def run(self, number: int) -> Run:
        """One run."""
        found = self._read(number, True) if number in self.numbers() else None
        if found is None:
            known = ", ".join(map(str, self.numbers())) or "none"
            text = f"there is no run {number}; there is {known}"
            raise InvalidArgument(text, op="journal", path=str(self.directory))
        return found

    def _read(self, number: int, contents: bool) -> Run | None:
        path = self._path(number)
        run: Run | None = None
        for line, record in _records(path):
            if not contents and record.get("record") == "kept":
                continue
            try:
                run = self._take(run, number, record)
            except (InvalidArgument, KeyError, TypeError, ValueError, AttributeError) as cause:
                text = f"line {line} is no record of a run: {cause!r}"
                raise Corrupt(text, op="journal", path=str(path)) from None
        return run

    def _take(self, run: Run | None, number: int, record: Mapping[str, Any]) -> Run:
        """A run with one more record."""
        kind = record["record"]
        if run is None:
            if kind != "begin":
                raise ValueError(f"the first record is {kind!r}")
            head = {key: record[key] for key in ("bus", "machine", "policy", "command")}
            plans = [from_plain(Plan, record["plan"])]
            return Run(number=number, begun=record["time"], plans=plans, **head)
        match kind:
            case "plan":
                run.plans.append(from_plain(Plan, record["plan"]))
            case "end":
                run.ended = record["how"]
            case "started":
                step = from_plain(Step, record["step"])
                run.entries[int(record["entry"])] = Entry(step=step, state="started")
            case _:
                self._take_entry(run, kind, int(record["entry"]), record)
        return run

    def _take_entry(self, run: Run, kind: str, at: int, record: Mapping[str, Any]) -> None:
        here = run.entries[at]
        state: Literal["started", "done", "undone"] = here.state
        kept, made = here.kept, here.made
        match kind:
            case "kept":
                kept = {**kept, **self._thaw(record["what"])}
            case "done":
                state, made = "done", self._thaw(record["made"])
            case "undone":
                state, run.undoing = "undone", None
            case "undoing":
                run.undoing, run.ended = at, None
            case "failed":
                run.errors[at] = record["error"]
                run.undoing = None
            case _:
                raise ValueError(f"{kind!r} is not known")
        run.entries[at] = Entry(step=here.step, state=state, kept=kept, made=made)

    # --- writing ---------------------------------------------------------------------------------

    def begin(
        self, *, bus: str, machine: str, policy: str, plan: Plan, command: str = ""
    ) -> "Writer":
        """A new run. Hold the lock."""
        number = max(self.numbers(), default=0) + 1
        writer = Writer(self, number)
        head = {"bus": bus, "machine": machine, "policy": policy, "command": command}
        writer.put("begin", time=time.time(), plan=as_plain(plan), **head)
        return writer

    def again(self, run: Run) -> "Writer":
        """Goes on with a run that is there. Hold the lock."""
        return Writer(self, run.number, run)

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:06}.jsonl"

    def _freeze(self, value: Any) -> Any:
        """A value for JSON; bytes as base64, or in a file of their own."""
        if isinstance(value, (bytes, bytearray, memoryview)):
            data = bytes(value)
            if len(data) > _BLOB_SIZE:
                return {_BLOB: self._store(data)}
            return {_BYTES: base64.b64encode(data).decode("ascii")}
        if isinstance(value, Mapping):
            return {str(key): self._freeze(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._freeze(each) for each in value]
        return value

    def _thaw(self, value: Any) -> Any:
        if isinstance(value, dict):
            if _BYTES in value:
                return base64.b64decode(value[_BYTES], validate=True)
            if _BLOB in value:
                return self._fetch(value[_BLOB])
            return {key: self._thaw(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self._thaw(each) for each in value]
        return value

    def _store(self, data: bytes) -> str:
        """Puts bytes into a file whose name is their digest, whole or not at all."""
        name = hashlib.sha256(data).hexdigest()
        path = self.directory / name
        if not path.exists():
            draft = path.with_suffix(".draft")
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.rename(path)
        sync_directory(self.directory)
        return name

    def _fetch(self, name: str) -> bytes:
        path = self.directory / name
        if not re.fullmatch("[0-9a-f]{64}", name):
            raise ValueError(f"{name!r} is no digest")
        try:
            data = path.read_bytes()
        except OSError as cause:
            raise failure_of(cause, "journal", str(path)) from cause
        if hashlib.sha256(data).hexdigest() != name:
            raise Corrupt("its content does not have its digest", op="journal", path=str(path))
        return data


class Writer:
    """Appends to the file of one run; made by :meth:`Journal.begin` and :meth:`Journal.again`."""

    def __init__(self, journal: Journal, number: int, run: Run | None = None) -> None:
        self.journal = journal
        self.number = number
        self._path = journal._path(number)
        self._entries = 0 if run is None else max(run.entries, default=0)
        if run is not None:
            _cut_torn(self._path)

    def put(self, record: str, **more: Any) -> None:
        """Appends a record; it is durable when this returns."""
        body = self.journal._freeze({"record": record, **more})
        line = _line_of(body).encode()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self._path, flags, 0o600)
            with os.fdopen(fd, "ab", buffering=0) as file:
                behind = os.fstat(fd).st_size
                try:
                    if file.write(line) != len(line):
                        raise NoSpace("a record was written in part", op="journal")
                except OSError:
                    # What comes next must not stand on the same line.
                    os.ftruncate(fd, behind)
                    raise
                os.fsync(fd)
            if record == "begin":
                sync_directory(self.journal.directory)
        except OSError as cause:
            raise failure_of(cause, "journal", str(self._path)) from cause

    def plan(self, plan: Plan) -> None:
        """The plan of one more round."""
        self.put("plan", plan=as_plain(plan))

    def started(self, step: Step) -> int:
        """A step is about to be carried out; gives the number of its entry."""
        self._entries += 1
        self.put("started", entry=self._entries, step=as_plain(step))
        return self._entries

    def kept(self, entry: int, what: Mapping[str, Any]) -> None:
        """What it is about to replace."""
        self.put("kept", entry=entry, what=what)

    def done(self, entry: int, made: Mapping[str, Any]) -> None:
        """What came of it."""
        self.put("done", entry=entry, made=made)

    def failed(self, entry: int, error: str) -> None:
        """Nothing came of it, or it could not be taken back."""
        self.put("failed", entry=entry, error=error)

    def undoing(self, entry: int) -> None:
        """It is about to be taken back."""
        self.put("undoing", entry=entry)

    def undone(self, entry: int, what: str) -> None:
        """It is taken back."""
        self.put("undone", entry=entry, what=what)

    def end(self, how: str) -> None:
        """Nothing more comes."""
        self.put("end", how=how, time=time.time())


def _line_of(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    checked = {**body, "crc": f"{zlib.crc32(text.encode()):08x}"}
    return json.dumps(checked, separators=(",", ":")) + "\n"


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and records. Raises :class:`Corrupt` for all damage but a torn end."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as cause:
        raise failure_of(cause, "journal", str(path)) from cause
    torn = lines.pop()
    for number, line in enumerate(lines, 1):
        # What the file system had given to the file and not yet filled reads as zeroes.
        if number == len(lines) and not torn and b"\0" in line:
            return
        yield number, _record_of(line, number, path)


def _record_of(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        body = json.loads(line)
        stored = body.pop("crc")
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        text = f"line {number} is damaged: it is no record"
        raise Corrupt(text, op="journal", path=str(path)) from None
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    crc = f"{zlib.crc32(text.encode()):08x}"
    if crc != stored:
        text = f"line {number} is damaged: its checksum is {stored}, its content gives {crc}"
        raise Corrupt(text, op="journal", path=str(path))
    return dict(body)


def _cut_torn(path: Path) -> None:
    """Drops what a power failure left behind the last whole line."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    last = data.rfind(b"\n", 0, max(0, end - 1)) + 1
    if end == len(data) and b"\0" in data[last:end]:
        end = last
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())


def _make_directory(path: Path) -> None:
    """Makes the directory, durably. One that somebody else owns or may write to is refused: what it
    says is done to the machine."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for each in missing:
        sync_directory(each.parent)
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        text = (
            f"belongs to user {status.st_uid} and has mode {status.st_mode & 0o7777:04o}; a "
            f"journal belongs to who uses it (user {os.geteuid()}), and nobody else may write to it"
        )
        raise InvalidArgument(text, op="journal", path=str(path))


def _holder(fd: int) -> str:
    """Who has the lock, as that one wrote into it."""
    words = os.pread(fd, 4096, 0).decode("utf-8", "replace").split(maxsplit=1)
    if not words:
        return "another process is changing this machine"
    command = words[1].strip() if len(words) > 1 else "an unknown command"
    return f"process {words[0]} is changing this machine ({command})"
