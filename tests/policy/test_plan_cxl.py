"""CXL regions in a plan: which devices are members."""

from pmemkit.policy.model import CxlWant, MachineState, MemdevState, Policy
from pmemkit.policy.plan import plan

GIB = 1 << 30


def memdev(dev, *, serial, ram=0, pmem=0):
    sizes = {"ram_size": ram, "pmem_size": pmem, "ram_free": ram, "pmem_free": pmem}
    return MemdevState(dev=dev, serial=serial, decoders=("decoder0.0",), **sizes)


MACHINE = MachineState(
    bus="kernel",
    name="here",
    memdevs=(memdev("mem0", serial=1, ram=GIB), memdev("mem1", serial=2, pmem=GIB)),
    verbs=frozenset(("create-cxl-region",)),
)


def test_all_devices_are_those_that_have_such_a_part():
    wish = CxlWant(name="far", type="ram", members=("*",))
    (step,) = plan(MACHINE, Policy(cxl=(wish,))).steps
    assert step.params["members"] == ["mem0"]
    assert step.params["size"] == GIB


def test_a_device_without_such_a_part_is_named():
    wish = CxlWant(name="far", type="ram", members=("0x2",))
    (refusal,) = plan(MACHINE, Policy(cxl=(wish,))).refused
    assert refusal.why == "no CXL memory device with ram in it is 0x2"
