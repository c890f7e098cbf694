"""The cache over devices of both modes: the conformance suite, failures below, memory, threads."""

from test_conformance import Native, Sectors

from pmemkit._native import block


class Cached:
    """Sizes so small that blocks are evicted all the time."""

    size = 5 * 4096
    mode = "writeback"

    def wrap(self, below):
        cache = block.cache(below, size=self.size, mode=self.mode, flush_age=0.05)
        self.resources.callback(lambda: self.check(cache))
        return cache.device

    def check(self, cache):
        assert cache.validate() == []

    def make_device(self):
        # What comes in by a back door the cache cannot see.
        return super().make_device()[0], None


class TestOverRaw(Cached, Native):
    pass


class TestOneBlockOverRaw(Cached, Native):
    size = 4096


class TestLargerThanTheDevice(Cached, Native):
    size = 1 << 20


class TestWriteThroughOverRaw(Cached, Native):
    mode = "writethrough"


class TestOverSectors(Cached, Sectors):
    pass


class TestWriteThroughOverSectors(Cached, Sectors):
    mode = "writethrough"
    size = 2 * 4096
