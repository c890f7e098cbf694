"""A user-space driver for byte-addressable memory devices.

    import pmemkit

    with pmemkit.open("disk.img", create_size="1G") as region, region.device() as device:
        device.write(0, b"hello")
        device.flush()

Importing the package loads none of its parts: each name is loaded when it is first used.
"""


class _Static:
    """Stands in for ``typing``, whose import alone takes about as long as starting Python."""

    TYPE_CHECKING = False


if _Static.TYPE_CHECKING:
    from pmemkit.dax import Mapping
    from pmemkit.errors import PmemError
    from pmemkit.memory.named import open_arrays
    from pmemkit.memory.pool import MemoryPool
    from pmemkit.memory.regions import RegionSpec
    from pmemkit.storage.device import BlockDevice, Extent
    from pmemkit.storage.mapping import map_path as map
    from pmemkit.storage.region import Region
    from pmemkit.storage.region import open_region as open

__all__ = [
    "BlockDevice",
    "Extent",
    "Mapping",
    "MemoryPool",
    "PmemError",
    "Region",
    "RegionSpec",
    "__version__",
    "map",
    "open",
    "open_arrays",
]

__version__ = "0.1.0"

_HOMES = {
    "BlockDevice": ("pmemkit.storage.device", "BlockDevice"),
    "Extent": ("pmemkit.storage.device", "Extent"),
    "Mapping": ("pmemkit.dax.mapping", "Mapping"),
    "MemoryPool": ("pmemkit.memory.pool", "MemoryPool"),
    "PmemError": ("pmemkit.errors", "PmemError"),
    "Region": ("pmemkit.storage.region", "Region"),
    "RegionSpec": ("pmemkit.memory.regions", "RegionSpec"),
    "map": ("pmemkit.storage.mapping", "map_path"),
    "open": ("pmemkit.storage.region", "open_region"),
    "open_arrays": ("pmemkit.memory.named", "open_arrays"),
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(home[0]), home[1])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
