"""What regions, namespaces and dimms there are. Observation changes nothing.

One model, two sources: :func:`image_bus` takes files for a machine's devices, :func:`kernel_bus`
reads what the running kernel's sysfs says.
"""

from pmemkit.bus.image import ImageBus, machine_of, observe
from pmemkit.bus.kernel import kernel_bus
from pmemkit.bus.model import Bus, Dimm, Mapping, Namespace, Region
from pmemkit.bus.records import bus_record, image_bus
from pmemkit.bus.report import listing

__all__ = [
    "Bus",
    "Dimm",
    "ImageBus",
    "Mapping",
    "Namespace",
    "Region",
    "bus_record",
    "image_bus",
    "kernel_bus",
    "listing",
    "machine_of",
    "observe",
]
