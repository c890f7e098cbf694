"""All-or-nothing changes of several ranges of a mapping, through a redo log in it.

What this does not do: keep other threads from seeing a change half made.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from pmemkit._native import dax as native
from pmemkit.errors import InvalidArgument, OutOfRange

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pmemkit.dax.mapping import Mapping

__all__ = ["Log", "Transaction"]


class Log:
    """The redo log of a mapping, in an area that its user set aside. Made by ``mapping.log``."""

    def __init__(self, mapping: Mapping, offset: int, length: int, *, create: bool = False) -> None:
        self._mapping = mapping
        self._native = native.Log(mapping, offset, length, create=create)
        self.offset = offset
        self.length = length

    def __repr__(self) -> str:
        return f"<Log of {self.length} bytes at {self.offset}>"

    @property
    def recovered(self) -> int:
        """How many ranges a crash had left to change, and were changed when it was opened."""
        return self._native.recovered

    @property
    def capacity(self) -> int:
        """Bytes that the changes of one transaction may have, 16 of them a range."""
        return self._native.capacity

    def transaction(self) -> Transaction:
        """A new transaction."""
        return Transaction(self._mapping, self._native)


class Transaction:
    """Changes that are made together when the ``with`` block ends, or not at all.

    ``tx[a:b] = data`` stages a change, ``tx[a:b]`` reads with the staged ones in place. Leaving the
    block commits; an exception in it leaves the mapping as it was.
    """

    def __init__(self, mapping: Mapping, log: native.Log) -> None:
        self._mapping = mapping
        self._log = log
        self._changes: list[tuple[int, bytes]] | None = []

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and self._changes is not None:
            self.commit()
        self._changes = None

    def write(self, offset: int, data: Buffer) -> None:
        """Stages a change."""
        copied = bytes(data)
        if offset < 0 or offset + len(copied) > len(self._mapping):
            text = f"{len(copied)} bytes at {offset} are outside the {len(self._mapping)} there are"
            raise OutOfRange(text, op="transaction", offset=max(offset, 0))
        self._staged().append((offset, copied))

    def read(self, offset: int, length: int) -> bytes:
        """A range as it will be."""
        found = bytearray(self._mapping.read(offset, length))
        for at, data in self._staged():
            first, end = max(at, offset), min(at + len(data), offset + length)
            if first < end:
                found[first - offset : end - offset] = data[first - at : end - at]
        return bytes(found)

    def __setitem__(self, where: slice, data: Buffer) -> None:
        start, length = self._range(where)
        copied = bytes(data)
        if len(copied) != length:
            raise InvalidArgument(f"{len(copied)} bytes for {length}", op="transaction")
        self.write(start, copied)

    def __getitem__(self, where: slice) -> bytes:
        return self.read(*self._range(where))

    def commit(self) -> None:
        """Makes the changes now; durable at return. The transaction has ended then."""
        changes, self._changes = self._staged(), None
        self._log.commit(changes)

    def abort(self) -> None:
        """Drops the changes; leaving the block does nothing more."""
        self._changes = None

    def _staged(self) -> list[tuple[int, bytes]]:
        if self._changes is None:
            raise InvalidArgument("the transaction has ended", op="transaction")
        return self._changes

    def _range(self, where: slice) -> tuple[int, int]:
        if not isinstance(where, slice) or where.step not in (None, 1):
            text = f"a range is start:end in bytes, not {where!r}"
            raise InvalidArgument(text, op="transaction")
        start, end, _ = where.indices(len(self._mapping))
        return start, max(end - start, 0)
