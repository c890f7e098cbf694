"""A region as a block device: opening, layers, reading and writing, copying."""

from pmemkit.storage.device import BlockDevice, Extent
from pmemkit.storage.layers import LAYERS, LayerKind, parse_layer
from pmemkit.storage.region import Region, open_region

__all__ = [
    "LAYERS",
    "BlockDevice",
    "Extent",
    "LayerKind",
    "Region",
    "open_region",
    "parse_layer",
]
