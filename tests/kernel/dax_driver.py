"""Runs inside the guest: maps a device DAX, files on DAX mounts and memory, stores, and says as
JSON what it found.

    python3 /in/dax_driver.py /dev/dax0.0 /mnt/ext4/pool
"""

import json
import sys
from pathlib import Path

import pmemkit
from pmemkit.errors import PmemError

MIB = 1 << 20
PLACES = {"copied": 4096, "stored": 3 * MIB + 10, "set": 5000, "both": 6 * MIB}
LOG = (7 * MIB, 64 << 10)


def refused(call):
    """Kind and text of the error of a call."""
    try:
        call()
    except PmemError as error:
        return [type(error).__name__, error.message]
    return None


def use(mapping, tag):
    """Stores in every way there is."""
    mapping.copy_persist(PLACES["copied"], b"copied " + tag)
    mapping.set_persist(PLACES["set"], 100, 0x55)
    with mapping.view() as view:
        text = b"stored " + tag
        view[PLACES["stored"] : PLACES["stored"] + len(text)] = text
        busy = refused(mapping.close)
        synced = mapping.sync()
    log = mapping.log(*LOG)
    with mapping.transaction() as tx:
        tx.write(PLACES["both"], b"both 1 " + tag)
        tx.write(PLACES["both"] + 4096, b"both 2 " + tag)
    mapping.deep_flush()
    return {
        "length": len(mapping),
        "unit": mapping.unit,
        "granularity": mapping.granularity,
        "map_sync": mapping.map_sync,
        "domain": mapping.persistence_domain,
        "tracker": mapping.tracker,
        "sees_stores": mapping.snapshot_sees_stores,
        "busy": busy,
        "synced": synced,
        "recovered": log.recovered,
    }


def device(path):
    """A device DAX: strict about offsets and lengths."""
    with pmemkit.open(path) as region:
        found = {
            "odd_offset": refused(lambda: region.map(4096)),
            "odd_length": refused(lambda: region.map(0, 4096)),
            "coarse": refused(lambda: region.map(granularity="byte")),
        }
        with region.map() as mapping:
            found |= use(mapping, b"device")
            copy = mapping.snapshot()
            found["copy"] = copy.read(PLACES["stored"], 13).decode()
    return found


def file(path):
    """A file on a DAX mount, blocks and all still to be allocated."""
    tag = Path(path).parent.name.encode()
    with pmemkit.map(path, create_size=8 * MIB, granularity="cacheline") as mapping:
        found = use(mapping, tag)
        mapping.snapshot(path + ".copy")
    with pmemkit.map(path + ".copy", read_only=True) as copy:
        found["copy"] = copy.read(PLACES["stored"], 7 + len(tag)).decode()
    return found


def memory():
    """What tracks stores to memory with this kernel."""
    with pmemkit.open("memfd:1M", granularity="cacheline") as region, region.map() as mapping:
        found = {"tracker": mapping.tracker, "sees_stores": mapping.snapshot_sees_stores}
        mapping.sync()
        with mapping.view() as view:
            view[5 * 4096] = view[99 * 4096] = 1
            found["synced"] = [mapping.sync(), mapping.sync()]
            if mapping.snapshot_sees_stores:
                copy = mapping.snapshot()
                view[5 * 4096] = 2
                found["copy"] = copy.read(5 * 4096, 1)[0]
    return found


if __name__ == "__main__":
    found = {"device": device(sys.argv[1]), "memory": memory()}
    print(json.dumps(found | {Path(each).parent.name: file(each) for each in sys.argv[2:]}))
