#!/usr/bin/env python3
"""Named NumPy arrays that live in a mapping: opened again, they are there, without being read.

    array_store.py pool.img put temperatures 1000x24
    array_store.py pool.img list
    array_store.py pool.img add temperatures 1.5

Layout: a redo log, a directory of fixed records, the arrays one behind the other. A new array is
zeroed first and then enters the directory in one transaction, so no failure leaves half of one.
What is stored to an array is durable after ``sync``.
"""

import sys

import numpy as np

import pmemkit

LOG = (0, 64 << 10)
DIRECTORY = 64 << 10
ENTRIES = 256
DATA = 1 << 20
ENTRY = np.dtype(
    [("name", "S32"), ("dtype", "S16"), ("ndim", "<u8"), ("shape", "<u8", (4,)), ("offset", "<u8")]
)


class ArrayStore:
    """Arrays by name in one mapping."""

    def __init__(self, path, size="64M"):
        self.mapping = pmemkit.map(path, create_size=size)
        self.log = self.mapping.log(*LOG)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.mapping.close()

    def _entries(self):
        size = ENTRIES * ENTRY.itemsize
        return np.frombuffer(self.mapping.read(DIRECTORY, size), ENTRY)

    def names(self):
        """The names there are, in the order in which they came."""
        return [bytes(each["name"]).decode() for each in self._entries() if each["name"]]

    def create(self, name, dtype, shape):
        """A new array of zeroes."""
        entries, dtype = self._entries(), np.dtype(dtype)
        if name in self.names():
            raise KeyError(f"there is {name} already")
        used = [each for each in entries if each["name"]]
        if len(used) == ENTRIES or len(shape) > 4:
            raise ValueError("there is no room for it in the directory")
        end = max((int(each["offset"]) + self._size(each) for each in used), default=DATA)
        offset = -(-end // 4096) * 4096
        self.mapping.set_persist(offset, dtype.itemsize * int(np.prod(shape)), 0)
        padded = (*shape, *(0,) * (4 - len(shape)))
        entry = np.array((name.encode(), dtype.str.encode(), len(shape), padded, offset), ENTRY)
        with self.mapping.transaction() as tx:
            tx.write(DIRECTORY + len(used) * ENTRY.itemsize, entry.tobytes())
        return self[name]

    @staticmethod
    def _shape(entry):
        return tuple(int(each) for each in entry["shape"][: int(entry["ndim"])])

    def _size(self, entry):
        return np.dtype(entry["dtype"].decode()).itemsize * int(np.prod(self._shape(entry)))

    def __getitem__(self, name):
        for entry in self._entries():
            if entry["name"] == name.encode():
                dtype, offset = entry["dtype"].decode(), int(entry["offset"])
                return self.mapping.array(dtype, self._shape(entry), offset)
        raise KeyError(name)

    def sync(self):
        """What was stored to arrays is durable when this returns."""
        self.mapping.sync()


def main(path, verb, *words):
    """One verb of the command line."""
    with ArrayStore(path) as store:
        if verb == "put":
            name, shape = words
            store.create(name, "<f8", tuple(int(each) for each in shape.split("x")))
        elif verb == "add":
            name, number = words
            array = store[name]
            array += float(number)
            store.sync()
            del array
        for name in store.names():
            array = store[name]
            print(name, array.dtype, array.shape, "sum", float(array.sum()))
            del array


if __name__ == "__main__":
    main(*sys.argv[1:])
