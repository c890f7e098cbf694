"""``pmem qemu-args``: the options with which QEMU attaches exactly these dimms."""

import argparse
import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pmemkit.cli._common import make_parser, print_json, size
from pmemkit.cli._namespaces import add_machine_options, seen_bus
from pmemkit.errors import InvalidArgument

if TYPE_CHECKING:
    from pmemkit.bus.image import ImageBus, ImageDimm

__all__ = ["run"]

_EXAMPLES = """\
  pmem qemu-args vm.toml
  pmem qemu-args disk.img --memory 2G
  qemu-system-x86_64 $(pmem qemu-args vm.toml) -kernel vmlinuz ...    paths without blanks
  xargs -a <(pmem qemu-args vm.toml) qemu-system-x86_64 -nographic    any path, from bash
  pmem qemu-args vm.toml --json                                       from programs"""
_LABEL_SIZE_LEAST = 128 << 10
_GIB = 1 << 30
_MIB = 1 << 20
_PAGE = 4096
_ALIGN = 2 << 20


def run(arguments: Sequence[str]) -> int:
    """Prints the options."""
    parser = make_parser(
        "qemu-args",
        "Print the QEMU options that attach these dimms: one option with its value a line.",
        _EXAMPLES,
    )
    add_machine_options(parser, several=True)
    parser.add_argument("--memory", type=size, default=_GIB, help="RAM of the guest (1G)")
    parser.add_argument("--json", action="store_true", help="the words as a JSON list")
    options = parser.parse_args(arguments)
    bus = seen_bus(options, options.paths, placement=True)
    words = _words(options, bus)
    if options.json:
        print_json(words)
    else:
        pairs = zip(words[::2], words[1::2], strict=True)
        print("\n".join(f"{option} {shlex.quote(value)}" for option, value in pairs))
    return 0


def _words(options: argparse.Namespace, bus: "ImageBus") -> list[str]:
    ram = -(-options.memory // _MIB)
    # Each dimm may be moved up to the next GiB, which costs addresses and no memory.
    room = sum(-(-dimm.file_size // _GIB) + 1 for dimm in bus.dimms) * 1024
    slots = max(dimm.spec.slot or 0 for dimm in bus.dimms) + 1
    words = ["-machine", "pc,nvdimm=on"]
    words += ["-m", f"{ram}M,slots={max(slots, len(bus.dimms))},maxmem={ram + room}M"]
    nodes = {dimm.spec.numa_node for dimm in bus.dimms}
    if nodes != {0}:
        words += ["-object", f"memory-backend-ram,id=ram0,size={ram}M"]
        words += ["-numa", "node,nodeid=0,cpus=0,memdev=ram0"]
        for node in sorted(nodes - {0}):
            words += ["-numa", f"node,nodeid={node}"]
    for number, dimm in enumerate(bus.dimms):
        words += _dimm(number, dimm, many_nodes=nodes != {0})
    return words


def _dimm(number: int, dimm: "ImageDimm", *, many_nodes: bool) -> list[str]:
    spec = dimm.spec
    if 0 < spec.label_size < _LABEL_SIZE_LEAST:
        text = f"QEMU refuses a label area of {spec.label_size} bytes: 128 KiB are the least"
        raise InvalidArgument(text, op="qemu-args", path=spec.path)
    own_serial = spec.serial is not None and spec.serial != 0x123456 + (spec.slot or 0)
    if own_serial or spec.region_offset or spec.dpa:
        text = "QEMU has no option for the serial number, region_offset and dpa of a dimm"
        raise InvalidArgument(text, op="qemu-args", path=spec.path)
    writable = os.access(spec.path, os.W_OK)
    backend = {
        "id": f"mem{number}",
        "share": "on",
        "mem-path": os.path.abspath(spec.path).replace(",", ",,"),  # noqa: PTH100
        "size": str(dimm.file_size),
        **_align(dimm),
        **({} if writable else {"readonly": "on"}),
    }
    device = {
        "id": f"nvdimm{number}",
        "memdev": f"mem{number}",
        "slot": str(spec.slot or 0),
        **({"label-size": str(spec.label_size)} if spec.label_size else {}),
        **({"uuid": spec.uuid} if spec.uuid else {}),
        **({"unarmed": "on"} if spec.unarmed or not writable else {}),
        **({"node": str(spec.numa_node)} if many_nodes else {}),
    }
    parts = (("-object", "memory-backend-file", backend), ("-device", "nvdimm", device))
    return [
        word
        for option, kind, values in parts
        for word in (option, ",".join([kind, *(f"{key}={value}" for key, value in values.items())]))
    ]


def _align(dimm: "ImageDimm") -> dict[str, str]:
    """The backend's alignment: the one that a machine file names. Of a bare image 2 MiB, which
    kernels want, where that leaves the region as large, and where it is, as they are listed."""
    spec = dimm.spec
    if spec.align > _PAGE:
        return {"align": str(spec.align)}
    same = dimm.address % _ALIGN == 0 == (dimm.file_size - spec.label_size) % _ALIGN
    return {"align": str(_ALIGN)} if same else {}
