"""Providers: a region of a pool and bytes in another process pass one suite."""

import os
import signal

import pytest

from pmemkit import MemoryPool
from pmemkit.errors import Closed, NotSupported
from pmemkit.memory import Block, ProcessProvider
from pmemkit.testing import ProviderSuite

MIB = 1 << 20


class TestRegion(ProviderSuite):
    @pytest.fixture
    def provider(self):
        with MemoryPool(["anonymous:8M"], block_size="8M") as pool:
            yield pool.provider("anonymous:8M")


class TestProcess(ProviderSuite):
    @pytest.fixture
    def provider(self):
        with ProcessProvider(self.SIZE, "elsewhere") as made:
            yield made


def test_a_pool_with_a_member_that_has_no_address():
    with MemoryPool(["anonymous:8M", ProcessProvider(4 * MIB, "gpu")], block_size="8M") as pool:
        assert pool.regions() == ["anonymous:8M", "gpu"]
        for call in (
            lambda: pool.empty(10, region="gpu"),
            lambda: pool.alloc(10, region="gpu"),
            lambda: pool.zeros(10, region="gpu"),
        ):
            with pytest.raises(NotSupported, match="region gpu has no address in this process"):
                call()
        here, there = pool.block(MIB), pool.block(MIB, region="gpu")
        here.view()[:] = b"7" * MIB
        here.copy_to(there)
        assert there.copy_out() == b"7" * MIB
        there.copy_in(b"back", 5)
        there.copy_to(here)
        assert bytes(here.view()[4:10]) == b"7back7"
        members = {each["name"]: each for each in pool.stat()["providers"]}
        assert members["gpu"] == {"name": "gpu", "cpu_addressable": False, "used": MIB}
        pool.remove("gpu")
        assert pool.regions() == ["anonymous:8M"]
        with pytest.raises(Closed):
            there.copy_out(0, 1)


def test_a_process_that_dies_is_an_error():
    with ProcessProvider(MIB) as provider:
        block = Block(provider, 100)
        os.kill(provider._child.pid, signal.SIGKILL)
        with pytest.raises(Closed, match="ended"):
            block.copy_out()
