"""What the commands that serve regions share of the cache: options, and what is made of them.

What this does not do: decide where nothing was asked for (:mod:`pmemkit.storage.defaults`).
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from pmemkit.cli._common import size
from pmemkit.storage.caching import CACHE_MODES, describe
from pmemkit.storage.defaults import Client, Defaults, choose
from pmemkit.storage.device import BlockDevice
from pmemkit.storage.layers import Layer
from pmemkit.storage.region import Region

__all__ = ["Opened", "add_cache_options", "open_device"]


def add_cache_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Options of every command that puts a cache over regions."""
    parser.add_argument(
        "--cache",
        choices=CACHE_MODES,
        help="a double buffer in RAM for each region, which spares the media writes; without this "
        "option it depends on the region and on who uses it, and the choice is printed",
    )
    parser.add_argument(
        "--cache-size", type=size, metavar="SIZE", help="of each (an eighth of the free memory)"
    )


class Opened(NamedTuple):
    """A device, what it is of, and how its cache came about."""

    region: Region
    device: BlockDevice
    defaults: Defaults

    def traffic(self) -> str:
        """What its cache did, and what its media were given, on one line."""
        stored = f"{self.region.medium.stats()['bytes_stored']} bytes stored to media"
        stats = self.device.cache_stats
        return stored if stats is None else f"{stored}; cache: {describe(stats)}"


def open_device(
    region: Region, client: Client, options: argparse.Namespace, layers: Sequence[Layer]
) -> Opened:
    """The device of a region as the options and the region's nature have it."""
    defaults = choose(region, client, options.cache, options.levelling)
    device = region.device(
        layers=layers,
        read_only=options.read_only,
        cache=defaults.cache,
        cache_size=options.cache_size,
        levelling=defaults.levelling,
    )
    return Opened(region, device, defaults)
