"""Threads that store self-describing content into arrays for as long as they are told, and look."""

import threading

import numpy as np


class Fire:
    """Writers; each has arrays of its own and checks every store that it made.

    Every word of an array says which array, which place and which round it is of; a store that was
    lost, torn or made elsewhere is a word that does not fit.
    """

    def __init__(self, arrays, writers: int = 4) -> None:
        self.arrays = arrays
        self.rounds = 0
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(index, writers)) for index in range(writers)
        ]

    def __enter__(self) -> "Fire":
        for index, array in enumerate(self.arrays):
            array[:] = self._content(index, 0, len(array))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self.wrong == []

    @staticmethod
    def _content(index: int, round_: int, length: int):
        return np.arange(length, dtype=np.uint64) + np.uint64(index << 48 | round_ << 24)

    def _write(self, first: int, step: int) -> None:
        places = {len(array): np.arange(len(array), dtype=np.uint64) for array in self.arrays}
        equal = {length: np.empty(length, bool) for length in places}
        round_ = 0
        while not self._stop.is_set():
            round_ += 1
            for index in range(first, len(self.arrays), step):
                array = self.arrays[index]
                mark = np.uint64(index << 48 | round_ << 24)
                # Half of it at once, half in parts that end inside pages.
                half = len(array) // 2
                where = places[len(array)]
                np.add(where[:half], mark, out=array[:half])
                for start in range(half, len(array), 5003):
                    np.add(where[start : start + 5003], mark, out=array[start : start + 5003])
                good = np.equal(array - mark, where, out=equal[len(array)])
                if not good.all():
                    place = int(np.flatnonzero(~good)[0])
                    text = f"array {index} round {round_} word {place}: {int(array[place]):#x}"
                    self.wrong.append(text)
                    return
        self.rounds += round_
