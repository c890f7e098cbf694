"""``pmem plan``, ``apply`` and ``undo`` on a machine with CXL memory, volatile and persistent."""

import json

import pytest
from policy_boots import MIB, boot, undone, verbs
from tools.guest import CXL_MODULES, CxlDevice, Guest

POLICY = """
[[cxl]]
name = "far"
type = "ram"
members = "all"

[[cxl]]
name = "kept"
type = "pmem"
members = 0x77

[[rule]]
name = "memory"
match = { type = "volatile", nature = "memory" }
want = { personality = "memory" }

[[rule]]
name = "files"
match = { type = "pmem" }
want = { mode = "fsdax", name = "files", map = "mem", filesystem = "ext4", mount = "/mnt/kept" }
"""
FIRST = """
from policy_driver import do, events
pmem("plan", "plan", "--json", P)
pmem("apply", "apply", "--yes", "--json", P)
pmem("again", "apply", "--yes", P)
pmem("list", "list", "-BRN")
pmem("explain", "explain", "--json")
sh("memory", "daxctl list -D")
sh("used", '''
    numactl --membind=1 dd if=/dev/zero of=/run/held bs=64K count=1 2> /dev/null
    rm /run/held
    echo precious > /mnt/kept/file
    sync''')
do("destroy-cxl-region", json.loads(sh("regions", "cxl list -R")["out"])[0]["region"])
do("destroy-cxl-region", json.loads(calls["regions"]["out"])[1]["region"])
calls["hazard"] = {"status": 0, "out": json.dumps(events), "errors": ""}
sh("kernel", "cat /sys/devices/system/memory/auto_online_blocks")
"""
SECOND = """
pmem("plan", "plan", "--json", P)
pmem("apply", "apply", "--yes", P)
sh("file", "cat /mnt/kept/file; rm /mnt/kept/file")
pmem("undo", "undo", "--yes")
sh("regions", "cxl list -R")
sh("kernel", "cat /sys/devices/system/memory/auto_online_blocks")
"""
MORE = """
pmem("gone", "undo", "--yes")
pmem("apply again", "apply", "--yes", P)
pmem("to release", "undo", "--yes", "--steps", "2")
pmem("first run", "undo", "--yes", "--run", "1", "--force")
pmem("rest", "undo", "--yes")
"""
MODULES = (*CXL_MODULES, "kmem")
"""As udev loads them on a real machine: kmem takes whatever memory comes."""


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cxl")
    for name, size in (("pmem", 256 * MIB), ("lsa", 256 << 10)):
        with (directory / name).open("wb") as image:
            image.truncate(size)
    persistent = CxlDevice(persistent=directory / "pmem", lsa=directory / "lsa", serial=0x77)
    return [CxlDevice(volatile=256 * MIB), persistent]


@pytest.fixture(scope="module")
def first(cxl_guest: Guest, python_layers: None, devices):
    return boot(cxl_guest, [], FIRST, policy=POLICY, cxl=devices, modules=MODULES)


@pytest.fixture(scope="module")
def second(cxl_guest: Guest, first, devices, scale):
    more = {"policy": POLICY, "journal": first.journal, "cxl": devices, "modules": MODULES}
    return boot(cxl_guest, [], scale(SECOND, SECOND + MORE), **more)


MAKE = ["create-cxl-region", "create-cxl-region"]


def test_regions_are_made_and_planned_for_in_the_next_round(first):
    plan = first["plan"].ok().json()
    assert verbs(plan) == MAKE
    done = first["apply"].ok().json()["done"]
    rest = ["create-namespace", "mkfs", "mount", "online-memory"]
    assert sorted(each["verb"] for each in done) == sorted(MAKE + rest)
    assert first["again"].ok().errors == "pmem: nothing is to be done\n"
    (bus,) = first["list"].ok().json()
    assert bus["provider"] == "CXL"
    assert bus["regions"][0]["namespaces"][0]["name"] == "files"
    natures = {each["because"].split()[-1]: each["nature"] for each in first["explain"].ok().json()}
    assert natures == {"ram": "memory", "pmem": "storage"}


def test_volatile_memory_is_movable_although_the_kernel_onlines_by_itself(first):
    (device,) = first["memory"].ok().json()
    assert (device["mode"], device["target_node"]) == ("system-ram", 1)
    assert device["online_memblocks"] == device["total_memblocks"] == 2
    assert device["movable"]
    first["used"].ok()
    assert first["kernel"].out == "online\n"


def test_a_region_in_use_is_not_destroyed(first):
    """``cxl destroy-region`` would do it, and the memory could not be had back until a reboot."""
    refused = json.loads(first["hazard"].out)
    assert [each["error"] for each in refused] == ["busy", "busy"]
    messages = sorted(each["message"] for each in refused)
    assert "2 memory blocks of dax0.0 are online" in " ".join(messages)
    assert "mounted on /mnt/kept" in " ".join(messages)


def test_after_a_boot_the_regions_are_made_again_and_the_files_are_there(second):
    assert verbs(second["plan"].ok().json()) == MAKE
    assert "4 steps done" in second["apply"].ok().errors
    assert second["file"].ok().out == "precious\n"


def test_undo_takes_memory_back_and_then_the_regions(second):
    told = undone(second["undo"].ok())
    assert sorted(each.split()[1] for each in told) == sorted([*MAKE, "mount", "online-memory"])
    assert second["regions"].ok().out.strip() == "[\n]"
    assert second["kernel"].out == "online\n"


@pytest.mark.soak
def test_undo_of_what_is_on_a_region_needs_the_region(second):
    gone = second["gone"].ok(2)
    assert "and with it what mount did" in gone.errors
    assert "bring it back first (pmem apply makes CXL regions again)" in gone.errors
    second["apply again"].ok()
    second["to release"].ok()
    told = undone(second["first run"].ok())
    assert [each.split()[1] for each in told] == ["mkfs", "create-namespace", *MAKE]
    assert all(each.endswith("is destroyed again") for each in told[1:])
    assert "2 steps" in second["rest"].ok().errors
