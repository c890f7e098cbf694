"""The conformance suite of providers of memory: inherit, and say how yours is made.

    class TestMine(ProviderSuite):
        @pytest.fixture
        def provider(self):
            with MyProvider(size=self.SIZE) as made:
                yield made

What this does not do: time anything.
"""

import threading

import pytest

from pmemkit.errors import Closed, InvalidArgument, NoSpace, NotSupported, OutOfRange
from pmemkit.memory.provider import Block, Provider

__all__ = ["ProviderSuite"]


class ProviderSuite:
    """What holds of every provider with room for :attr:`SIZE` bytes."""

    SIZE = 8 << 20

    @pytest.fixture
    def provider(self) -> Provider:
        """The provider under test, empty."""
        raise NotImplementedError

    def test_it_is_a_provider(self, provider: Provider) -> None:
        """It has every method."""
        assert isinstance(provider, Provider)
        assert provider.name

    def test_bytes_come_out_as_they_went_in(self, provider: Provider) -> None:
        """At every offset, in every order, and nothing beside them changes."""
        with Block(provider, 100_000) as block:
            block.copy_in(bytes(100_000))
            block.copy_in(b"start")
            block.copy_in(b"end", 99_997)
            block.copy_in(b"", 100_000)
            block.copy_in(b"middle", 50_001)
            assert block.copy_out(0, 6) == b"start\0"
            assert block.copy_out(99_996) == b"\0end"
            assert block.copy_out(50_000, 8) == b"\0middle\0"
            assert block.copy_out(100_000) == b""
            assert block.copy_out().count(b"\0") == 100_000 - 14

    def test_blocks_are_apart(self, provider: Provider) -> None:
        """No block has bytes of another."""
        blocks = [Block(provider, size) for size in (1, 17, 4096, 5000, 70_000)]
        for number, block in enumerate(blocks):
            block.copy_in(bytes([number + 1]) * block.nbytes)
        for number, block in enumerate(blocks):
            assert block.copy_out() == bytes([number + 1]) * block.nbytes

    def test_room_is_counted_and_comes_back(self, provider: Provider) -> None:
        """What is too much is refused, and what was released can be had again."""
        before = provider.used()
        half = self.SIZE // 2
        first = Block(provider, half)
        assert provider.used() >= before + half
        with pytest.raises(NoSpace):
            Block(provider, self.SIZE)
        second = Block(provider, half)
        with pytest.raises(NoSpace):
            Block(provider, half)
        first.release()
        first.release()
        del second
        assert provider.used() == before
        Block(provider, self.SIZE).release()

    def test_ranges_outside_are_refused(self, provider: Provider) -> None:
        """By the same error everywhere."""
        with Block(provider, 100) as block:
            for offset, length in ((0, 101), (100, 1), (-1, 1), (5, -1), (1 << 63, 1)):
                with pytest.raises(OutOfRange):
                    block.copy_out(offset, length)
            with pytest.raises(OutOfRange):
                block.copy_in(b"12", 99)
        with pytest.raises(Closed):
            block.copy_out(0, 1)
        with pytest.raises(InvalidArgument):
            Block(provider, 0)

    def test_copies_to_peers(self, provider: Provider) -> None:
        """Between two blocks, in parts larger than any buffer on the way."""
        size = self.SIZE // 4 + 5
        content = bytes(range(256)) * (size // 256 + 1)
        with Block(provider, size) as source, Block(provider, size) as target:
            source.copy_in(content[:size])
            target.copy_in(bytes(size))
            source.copy_to(target, offset=3, peer_offset=7, length=size - 10)
            assert target.copy_out() == bytes(7) + content[3 : size - 7] + bytes(3)
            with pytest.raises(OutOfRange):
                source.copy_to(target, offset=1, peer_offset=1, length=size)

    def test_views_are_the_bytes_or_are_refused(self, provider: Provider) -> None:
        """As the provider says of itself."""
        with Block(provider, 5000) as block:
            if not provider.cpu_addressable:
                with pytest.raises(NotSupported, match="no address"):
                    block.view()
                return
            view = block.view()
            view[10:14] = b"seen"
            assert block.copy_out(10, 4) == b"seen"

    def test_threads(self, provider: Provider) -> None:
        """Each finds its own bytes."""
        wrong = []

        def churn(number: int) -> None:
            for length in range(1, 60):
                with Block(provider, length * 100) as block:
                    block.copy_in(bytes([number]) * block.nbytes)
                    if block.copy_out() != bytes([number]) * block.nbytes:
                        wrong.append(number)

        threads = [threading.Thread(target=churn, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
