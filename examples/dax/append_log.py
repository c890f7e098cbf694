#!/usr/bin/env python3
"""An append-only log in a mapping: one ``copy_persist`` a record, found again without an index.

    append_log.py journal.img append < lines.txt     prints the number of each record once durable
    append_log.py journal.img read

A record is its number, its length, a CRC of both and of the text, and the text. A failure while one
is stored leaves a CRC that is wrong, and the log ends before it. Numbers go up by one, so that what
an earlier, longer log left behind does not count.
"""

import struct
import sys
import zlib

import pmemkit

HEADER = struct.Struct("<QII")
ALIGN = 64


class AppendLog:
    """Records one behind the other."""

    def __init__(self, path, size="16M"):
        self.mapping = pmemkit.map(path, create_size=size)
        self.end = self.count = 0
        for number, text in self._scan():
            self.count = number + 1
            self.end += self._room(len(text))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.mapping.close()

    @staticmethod
    def _room(length):
        return -(-(HEADER.size + length) // ALIGN) * ALIGN

    @staticmethod
    def _crc(number, text):
        return zlib.crc32(text, zlib.crc32(struct.pack("<QI", number, len(text))))

    def _scan(self):
        at = number = 0
        while at + HEADER.size <= len(self.mapping):
            found, length, crc = HEADER.unpack(self.mapping.read(at, HEADER.size))
            if found != number + 1 or at + HEADER.size + length > len(self.mapping):
                return
            text = self.mapping.read(at + HEADER.size, length)
            if crc != self._crc(found, text):
                return
            yield number, text
            at += self._room(length)
            number += 1

    def __iter__(self):
        return (text for _, text in self._scan())

    def append(self, text):
        """Durable when it returns the record's number."""
        if self.end + self._room(len(text)) > len(self.mapping):
            raise ValueError("the log is full")
        number = self.count + 1
        head = HEADER.pack(number, len(text), self._crc(number, text))
        self.mapping.copy_persist(self.end, head + text)
        self.end += self._room(len(text))
        self.count = number
        return number - 1


def main(path, verb):
    """One verb of the command line."""
    with AppendLog(path) as log:
        if verb == "append":
            for line in sys.stdin.buffer:
                print(log.append(line.rstrip(b"\n")), flush=True)
        else:
            for text in log:
                print(text.decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
