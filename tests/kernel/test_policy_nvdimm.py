"""Steps of policy and their reverses on two NVDIMMs in a real kernel, without the command line."""

from pathlib import Path

import pytest
from tools.guest import Dimm, Guest

pytestmark = pytest.mark.soak
"""test_policy_cli.py has the usual way by default."""

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
LABEL_SIZE = 128 << 10
SIZE = 512 * MIB
START = "from policy_driver import *\nstorage, memory = region_of(1), region_of(2)\n"
AUTO_ONLINE = "memhp_default_state=online"
"""As on Debian's newer kernels, where it is the default."""


def python(script, offline_seconds=60):
    """A step of the guest; the driver is in /in."""
    return (
        f"export PYTHONPATH=/in OFFLINE_SECONDS={offline_seconds}\n"
        f"python3 - <<'END'\n{START}{script}\nreport()\nEND"
    )


def events(result, name):
    return result[name].json()["events"]


def seen(found, name):
    """The last thing that was seen under this name."""
    return [each["value"] for each in found if each.get("see") == name][-1]


def run(guest, dimms, steps, **more):
    files = {"policy_driver.py": (HERE / "policy_driver.py").read_bytes()}
    return guest.run(dimms, steps, python=True, files=files, timeout_seconds=400, **more)


@pytest.fixture
def dimms(blank, python_layers):
    images = [blank(f"{name}.img", SIZE + LABEL_SIZE) for name in ("storage", "memory")]
    return [
        Dimm(path, label_size_bytes=LABEL_SIZE, node=node) for node, path in enumerate(images, 1)
    ]


# --- storage -------------------------------------------------------------------------------------

STORAGE = """
do("init-labels", storage)
do("create-namespace", storage, mode="sector", size=128 * MIB, name="data", sector_size=4096)
do("mkfs", "@2", filesystem="ext4")
do("mount", "@2", filesystem="ext4", path="/mnt/data", options="noatime")
open("/mnt/data/file", "w").write("precious" * 1000)
see_region(storage)
namespace = made[2]["dev"]
do("destroy-namespace", namespace)
do("umount", "@2", filesystem="ext4", path="/mnt/data")
do("destroy-namespace", namespace)
see("gone", as_plain(machine().region(storage)))
undo(6)
undo(5)
see("file", open("/mnt/data/file").read() == "precious" * 1000)
do("umount", "@2", filesystem="ext4", path="/mnt/data")
undo(2)
"""
OVERWRITTEN = """
namespace = machine().region(storage).namespaces[0].dev
do("destroy-namespace", namespace)
do("create-namespace", storage, mode="sector", size=128 * MIB, name="other")
see("labels", shell("ndctl list -N"))
undo(0)
undo(1)
undo(0)
undo(0, force=True)
see_region(storage)
"""
RECONFIGURED = """
do("create-namespace", storage, mode="fsdax", size=128 * MIB, map="mem", name="dax")
namespace = made[1]["dev"]
do("mkfs", "@1", filesystem="ext4")
do("reconfigure-namespace", namespace, mode="devdax", map="mem", name="dax")
see_region(storage)
other = next(each.dev for each in machine().region(storage).namespaces if each.name == "data")
do("mount", other, filesystem="ext4", path="/mnt/data")
undo(2)
undo()
undo(2)
see_region(storage)
undo(1)
undo(0)
see_region(storage)
"""
PERSISTENT = """
see_region(storage)
do("mount", machine().region(storage).namespaces[0].dev, filesystem="ext4", path="/mnt/data")
see("file", open("/mnt/data/file").read() == "precious" * 1000)
undo()
"""


def test_storage_is_made_mounted_kept_and_brought_back(guest: Guest, dimms):
    steps = {"storage": python(STORAGE)}
    result = run(guest, dimms, steps)
    found = events(result, "storage")
    done = [each for each in found if "verb" in each]
    assert [each.get("error") for each in done] == [None] * 4 + ["busy", None, None, None]
    assert done[4]["message"].endswith("because it is in use: mounted on /mnt/data")
    (namespace,) = seen(found, found[4]["see"])["namespaces"]
    assert (namespace["mode"], namespace["sector_size"]) == ("sector", 4096)
    assert namespace["content"]["name"] == "ext4"
    assert namespace["mounts"] == ["/mnt/data"]
    assert "namespaces" not in seen(found, "gone")
    undone = [each for each in found if "undo" in each]
    assert undone[0]["text"].endswith("is back as sector, with its contents")
    assert undone[1]["text"] == "/mnt/data is mounted again"
    assert seen(found, "file")
    assert undone[2]["error"] == "corrupt"
    assert "there are files in the file system" in undone[2]["message"]

    second = run(guest, dimms, {"again": python(PERSISTENT), "over": python(RECONFIGURED)})
    assert seen(events(second, "again"), "file")
    found = events(second, "over")
    busy, _, back, *_ = [each for each in found if "undo" in each]
    assert busy["error"] == "busy"  # All of the region has to be disabled for its labels.
    assert "cannot be disabled, because it is in use: mounted on /mnt/data" in busy["message"]
    assert back["text"].endswith("is back as fsdax, with its contents")
    states = [each["value"]["namespaces"] for each in found if "see" in each]
    modes = [[(each["name"], each["mode"]) for each in each_state] for each_state in states]
    assert modes[0] == [("data", "sector"), ("dax", "devdax")]
    assert modes[1] == [("data", "sector"), ("dax", "fsdax")]
    assert modes[2] == [("data", "sector")]
    assert states[1][1]["content"]["name"] == "ext4"


def test_what_was_written_over_is_said_to_be_lost(guest: Guest, dimms):
    prepare = "do('init-labels', storage)\ndo('create-namespace', storage, mode='sector', "
    prepare += "size=128 * MIB, name='first')\nshell('echo contents > /dev/pmem0s')"
    steps = {"prepare": python(prepare.replace("/dev/pmem0s", "/dev/$(ls /dev | grep pmem.*s)"))}
    steps["over"] = python(OVERWRITTEN)
    result = run(guest, dimms, steps)
    found = [each for each in events(result, "over") if "undo" in each]
    assert found[0]["error"] == "corrupt"
    assert "has taken its space" in found[0]["message"]
    assert found[1]["text"].endswith("is destroyed again")
    assert found[2]["error"] == "corrupt"
    assert "was written over since" in found[2]["message"]
    assert "is back as sector, without its contents" in found[3]["text"]


# --- memory --------------------------------------------------------------------------------------

MEMORY = """
do("init-labels", memory)
do("create-namespace", memory, mode="devdax", size=512 * MIB, map="dev", align=4096)
see("policy", text_of(POLICY))
do("reconfigure-device", "@2", mode="system-ram", online="movable")
see("after", text_of(POLICY))
see("memory", as_plain(machine().region(memory)))
before = machine()
see("dram", [before.dram, before.block_size])
free = lambda: int(shell("grep MemFree /sys/devices/system/node/node2/meminfo").split()[3])
before = free()
shell("numactl --membind=2 dd if=/dev/zero of=/run/held bs=1M count=16 2> /dev/null")
see("used", before - free())
shell("rm /run/held")
undo()
see("back", as_plain(machine().region(memory)))
do("reconfigure-device", "@2", mode="system-ram", online="kernel")
see("kernel", as_plain(machine().region(memory)))
do("reconfigure-device", "@2", mode="system-ram", online="movable")
see("moved", as_plain(machine().region(memory)))
undo()
undo(3)
undo(1)
see("end", as_plain(machine().region(memory)))
see("last", text_of(POLICY))
"""
TOOLS = "daxctl reconfigure-device -m system-ram $(basename /dev/dax*) 2>&1 || true"


def dax_of(region):
    return region["namespaces"][0]["dax"]


@pytest.mark.parametrize("policy", ["online", "offline", "online_movable"])
def test_memory_on_its_own_node_whatever_the_kernel_onlines(guest: Guest, dimms, policy):
    steps = {"memory": python(MEMORY)}
    if policy == "online":
        # The pain: what the tools say of such a machine.
        prepare = "do('init-labels', memory)\ndo('create-namespace', memory, mode='devdax', "
        prepare += "size=512 * MIB)"
        steps = {"prepare": python(prepare), "tools": TOOLS, **steps}
        steps["memory"] = steps["memory"].replace(
            START, START + "shell('ndctl destroy-namespace -f all')\n"
        )
    result = run(guest, dimms, steps, kernel_arguments=f"memhp_default_state={policy}")
    found = events(result, "memory")
    assert [each for each in found if "error" in each] == []
    if policy == "online":
        assert "kernel policy will auto-online memory, aborting" in result["tools"].text
    assert [seen(found, name) for name in ("policy", "after", "last")] == [policy] * 3
    dax = dax_of(seen(found, "memory"))
    assert (dax["mode"], dax["target_node"], dax["zone"]) == ("system-ram", 2, "movable")
    assert dax["blocks"] == dax["online"] == 3
    assert seen(found, "used") >= 16 << 10
    dram, block = seen(found, "dram")
    assert block == 128 * MIB
    assert dram <= 1 << 30
    assert dax_of(seen(found, "back"))["mode"] == "devdax"
    assert dax_of(seen(found, "kernel"))["zone"] == "kernel"
    assert dax_of(seen(found, "moved"))["zone"] == "movable"
    assert "namespaces" not in seen(found, "end")
    assert "dax" in result["memory"].json()["said"][0]


HELD = """
do("init-labels", memory)
do("create-namespace", memory, mode="devdax", size=512 * MIB, map="dev", align=4096)
do("reconfigure-device", "@2", mode="system-ram", online="movable")
holder = hold(2, "pipe")
do("reconfigure-device", "@2", mode="devdax")
see("held", as_plain(machine().region(memory)))
see("pid", holder.pid)
undo()
holder.kill()
holder.wait()
do("reconfigure-device", "@2", mode="devdax")
see("free", as_plain(machine().region(memory)))
do("reconfigure-device", "@2", mode="system-ram", online="kernel")
holder = hold(2, "files")
do("reconfigure-device", "@2", mode="devdax")
see("kernel", as_plain(machine().region(memory)))
do("destroy-namespace", made[2]["dev"])
see("policy", text_of(POLICY))
"""


def test_memory_that_is_held_stays_whole_and_its_holders_are_named(guest: Guest, dimms):
    steps = {"held": python(HELD, offline_seconds=6)}
    result = run(guest, dimms, steps, kernel_arguments=AUTO_ONLINE)
    found = events(result, "held")
    done = [each for each in found if "verb" in each]
    kinds = [each.get("error") for each in done]
    assert kinds == [None, None, None, "busy", None, None, "busy", "busy"]
    pinned, kernel, used = done[3], done[6], done[7]
    assert f"process python3 ({seen(found, 'pid')})" in pinned["message"]
    assert "all blocks are as they were" in pinned["message"]
    assert "did not go offline" in pinned["message"]
    assert "zone" not in pinned["message"]
    dax = dax_of(seen(found, "held"))
    assert (dax["mode"], dax["blocks"], dax["online"], dax["zone"]) == (
        "system-ram",
        3,
        3,
        "movable",
    )
    assert dax_of(seen(found, "free"))["mode"] == "devdax"
    assert "in a zone of the kernel (Normal)" in kernel["message"]
    dax = dax_of(seen(found, "kernel"))
    assert (dax["online"], dax["zone"]) == (3, "kernel")
    assert used["message"].endswith("which is system RAM")
    assert seen(found, "policy") == "online"
    # Both attempts had an end: the time that was set, and what it takes to begin and to go back.
    assert pinned["seconds"] < 60
    assert kernel["seconds"] < 60


DIED = """
import os, signal
do("init-labels", memory)
do("create-namespace", memory, mode="devdax", size=512 * MIB, map="dev", align=4096)
child = os.fork()
if child == 0:
    def die(text):
        os.kill(os.getpid(), signal.SIGKILL)
    actions._live.progress = die
    do("reconfigure-device", "@2", mode="system-ram", online="movable")
os.waitpid(child, 0)
see("died", text_of(POLICY))
see("half", as_plain(machine().region(memory)))
do("reconfigure-device", "@2", mode="system-ram", online="movable")
see("policy", text_of(POLICY))
see("whole", as_plain(machine().region(memory)))
"""


def test_a_process_killed_between_two_blocks(guest: Guest, dimms):
    result = run(guest, dimms, {"died": python(DIED)}, kernel_arguments=AUTO_ONLINE)
    found = events(result, "died")
    assert seen(found, "died") == "offline"
    half = dax_of(seen(found, "half"))
    assert (half["mode"], half["blocks"], half["online"]) == ("system-ram", 3, 1)
    assert [each for each in found if "error" in each] == []
    assert seen(found, "policy") == "online"
    whole = dax_of(seen(found, "whole"))
    assert (whole["online"], whole["zone"]) == (3, "movable")


# --- emulated by the kernel ----------------------------------------------------------------------

EMULATED = """
dev = next(each.dev for each in machine().regions if not each.dimms)
see_region(dev)
namespace = machine().region(dev).namespaces[0].dev
do("init-labels", dev)
do("reconfigure-namespace", namespace, mode="sector", sector_size=512)
do("mkfs", namespace, filesystem="ext4")
do("mount", namespace, filesystem="ext4", path="/mnt/emulated")
see_region(dev)
undo()
undo(2)
undo(1)
do("reconfigure-namespace", namespace, mode="devdax", map="mem")
see_region(dev)
undo()
see_region(dev)
"""


def test_a_range_that_memmap_sets_aside(guest: Guest, python_layers: None):
    script = python(EMULATED).replace(START, "from policy_driver import *\n")
    steps = {"emulated": script}
    arguments = "memmap=256M!1G"
    result = run(guest, [], steps, memory="3G", kernel_arguments=arguments)
    found = events(result, "emulated")
    kinds = [each.get("error") for each in found if "verb" in each]
    assert kinds == ["not_supported", None, None, None, None]
    states = [each["value"] for each in found if "see" in each]
    assert not states[0]["labelled"]
    assert not states[0]["label_room"]
    (namespace,) = states[1]["namespaces"]
    assert (namespace["mode"], namespace["mounts"]) == ("sector", ["/mnt/emulated"])
    assert states[2]["namespaces"][0]["mode"] == "devdax"
    undone = [each for each in found if "undo" in each]
    # It was blank, and the kernel calls what has its page map already fsdax.
    assert undone[2]["text"].endswith("is back as fsdax, which was blank")
    assert undone[3]["text"].endswith("is back as fsdax, with its contents")
