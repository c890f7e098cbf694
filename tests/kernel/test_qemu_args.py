"""``pmem qemu-args`` attaches exactly the dimms of a machine file."""

import json
import subprocess
import sys

from agreement import differences, kernels, ours
from tools.guest import Guest


def pmem(*words) -> str:
    command = [sys.executable, "-m", "pmemkit", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_guest_with_these_options_has_these_dimms(guest: Guest, tmp_path):
    machine = tmp_path / "two, dimms.toml"
    images = [tmp_path / "a, b.img", tmp_path / "c.img"]
    pmem("init-machine", machine, *images, "--create", "--size", "258M")
    pmem("init-labels", machine, "all", "-V", "1.2")
    pmem("create-namespace", machine, "-r", "region0", "-m", "fsdax", "-s", "128M", "-n", "one")
    pmem("create-namespace", machine, "-r", "region1", "-m", "sector", "-s", "64M", "-n", "two")
    words = json.loads(pmem("qemu-args", machine, "--json"))
    result = guest.run([], {"list": "ndctl list -DRNi"}, qemu_arguments=words)
    wrong = differences(kernels(result["list"].json()), ours([str(machine)]))
    assert not wrong, "\n".join(wrong)


def test_each_dimm_has_the_numa_node_of_the_machine_file(guest: Guest, tmp_path):
    machine = tmp_path / "nodes.toml"
    pmem("init-machine", machine, tmp_path / "a.img", "--create", "--size", "64M", "--numa-node", 1)
    words = json.loads(pmem("qemu-args", machine, "--json"))
    result = guest.run(
        [], {"list": "cat /sys/bus/nd/devices/region0/target_node"}, qemu_arguments=words
    )
    assert result["list"].check().text.strip() == "1"
