"""Mappings whose pages appear when they are touched: copies on write, loading on demand, extents
of several regions in one range of addresses.

    with fault.clone("disk.img") as copy:           # the image stays as it is
        copy.write(0, b"changed")
        copy.commit("changed.img")
    with fault.load("nbd://host/export") as data:   # only what is touched is fetched
        data.read(1 << 30, 4096)
    with fault.assemble(["a.img", "b.img"]) as both:
        memoryview(both)[: 1 << 20]                 # loads and stores on both images

Linux's userfaultfd does it; ``docs/fault-handler.md`` says what root can do and others cannot.

What this does not do: make bytes durable, except in :meth:`LazyMapping.commit`.
"""

from pmemkit._native import fault as native
from pmemkit.fault.mapping import LazyMapping, Provides, assemble, clone, lazy, load

__all__ = ["LazyMapping", "Provides", "assemble", "clone", "lazy", "load", "probe"]

probe = native.probe
