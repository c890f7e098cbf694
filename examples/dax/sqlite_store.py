#!/usr/bin/env python3
"""An SQLite database that is kept in a mapping, for databases that fit into memory.

    sqlite_store.py pool.img "create table t (x)" "insert into t values (1)" "select * from t"

SQLite works on a copy in memory (``Connection.deserialize``). ``save`` stores all of it into the
half of the mapping that is not in use, and then one transaction says that this half counts: a
failure leaves the database of the save before. It costs the whole database each time; for a large
one use a file system: ``pmem mount``, or ``-o dax``.
"""

import sqlite3
import sys
import zlib

import numpy as np

import pmemkit

LOG = (0, 4096)
STATE = 4096
DATA = 1 << 20
STATE_OF = np.dtype([("half", "<u8"), ("length", "<u8"), ("crc", "<u8")])


class SqliteStore:
    """One database; ``connection`` is an ordinary one."""

    def __init__(self, path, size="64M"):
        self.mapping = pmemkit.map(path, create_size=size)
        self.log = self.mapping.log(*LOG)
        self.connection = sqlite3.connect(":memory:")
        state = self._state()
        if state["length"]:
            data = self.mapping.read(self._place(int(state["half"])), int(state["length"]))
            if zlib.crc32(data) != state["crc"]:
                raise ValueError("the database in the mapping is damaged")
            self.connection.deserialize(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()
        self.mapping.close()

    def _state(self):
        return np.frombuffer(self.mapping.read(STATE, STATE_OF.itemsize), STATE_OF)[0]

    def _half_size(self):
        return (len(self.mapping) - DATA) // 2 // 4096 * 4096

    def _place(self, half):
        return DATA + half * self._half_size()

    def save(self):
        """What was committed is durable when this returns."""
        data = self.connection.serialize()
        if len(data) > self._half_size():
            raise ValueError(f"{len(data)} bytes do not fit into {self._half_size()}")
        half = 1 - int(self._state()["half"])
        self.mapping.copy_persist(self._place(half), data)
        state = np.array((half, len(data), zlib.crc32(data)), STATE_OF)
        with self.mapping.transaction() as tx:
            tx.write(STATE, state.tobytes())


def main(path, *statements):
    """Runs statements and saves."""
    with SqliteStore(path) as store:
        for statement in statements:
            with store.connection:
                for row in store.connection.execute(statement):
                    print(*row)
            store.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
