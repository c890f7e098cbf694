"""What the commands on namespaces and labels share: images and machine files as arguments.

What this does not do: anything that :mod:`pmemkit.namespace` does.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from pmemkit.cli._common import size
from pmemkit.errors import InvalidArgument

if TYPE_CHECKING:
    from pmemkit.bus.image import ImageBus, ImageNamespace, ImageRegion
    from pmemkit.bus.machine import Machine
    from pmemkit.namespace.images import Images

__all__ = [
    "add_machine_options",
    "chosen_dimms",
    "data_on",
    "dimms_of_namespace",
    "looked",
    "namespace_json",
    "note",
    "opened",
    "print_namespace",
    "progress_bar",
    "region_name",
    "seen_bus",
    "split_target",
    "the_machine",
]

_PATH_HELP = "image, or a machine file (*.toml)"
_PATHS_HELP = "images, each a dimm, in this order; or a machine file (*.toml)"


def add_machine_options(
    parser: argparse.ArgumentParser,
    *,
    paths: str = "paths",
    several: bool = False,
    help: str | None = None,
) -> None:
    """The images, and what a machine file would say of a bare one."""
    if several:
        parser.add_argument(paths, metavar="PATH", nargs="+", help=help or _PATHS_HELP)
    else:
        parser.add_argument(paths, metavar="PATH", help=help or _PATH_HELP)
    group = parser.add_argument_group("of images without a machine file")
    group.add_argument(
        "--label-size",
        type=size,
        metavar="SIZE",
        help="of the label area at the end; found by its index blocks where there are any",
    )
    group.add_argument(
        "--slot",
        type=int,
        metavar="N",
        help="QEMU slot the image is plugged into; found by its labels, otherwise 0",
    )
    group.add_argument(
        "--backend-align",
        type=size,
        metavar="SIZE",
        help="align of the QEMU backend, which the region is cut to; the page size if not said",
    )


def the_machine(options: argparse.Namespace, paths: Sequence[str]) -> "Machine":
    """The machine that paths and options describe."""
    from pmemkit.bus.image import machine_of

    return machine_of(
        paths,
        label_size=options.label_size,
        slot=options.slot,
        align=options.backend_align,
    )


def split_target(options: argparse.Namespace) -> tuple[str, str | None]:
    """Path and namespace of ``PATH NAMESPACE`` or ``PATH:NAMESPACE``."""
    from pmemkit.bus.locate import split_namespace

    named = split_namespace(options.path)
    if named is not None:
        return named
    return options.path, getattr(options, "namespace", None)


def region_name(text: str | None) -> str | None:
    """The name of a region that is called by it or by its number; ``None`` for all of them."""
    if text in (None, "all"):
        return None
    return f"region{text}" if text.isascii() and text.isdigit() else text


def seen_bus(
    options: argparse.Namespace, paths: Sequence[str], *, placement: bool = False
) -> "ImageBus":
    """What is on the images; notes about it, and with ``placement`` about where QEMU would put
    them, go to standard error."""
    with looked(options, paths, placement=placement) as bus:
        return bus


@contextmanager
def looked(
    options: argparse.Namespace, paths: Sequence[str], *, placement: bool = False
) -> "Iterator[ImageBus]":
    """The same, as long as the images can be read."""
    from pmemkit.bus.image import observe_with, open_reader
    from pmemkit.namespace.advice import notes, placement_notes

    machine = the_machine(options, paths)
    with ExitStack() as stack:
        readers = []
        for dimm in machine.dimms:
            read, file_size, close = open_reader(dimm.path)
            stack.callback(close)
            readers.append((read, file_size))
        bus = observe_with(machine, readers)
        for each in (*notes(bus), *(placement_notes(bus) if placement else ())):
            note(each)
        yield bus


@contextmanager
def opened(
    options: argparse.Namespace, path: str, dimms: Iterable[int] | None = None
) -> "Iterator[Images]":
    """The images, locked for change."""
    from pmemkit.namespace.images import open_images

    with open_images(the_machine(options, [path]), dimms) as images:
        yield images


def dimms_of_namespace(options: argparse.Namespace, path: str, name: str) -> tuple[int, ...]:
    """The numbers of the dimms that a namespace lies on: only they have to be locked."""
    from pmemkit.bus.image import observe

    machine = the_machine(options, [path])
    here = observe(machine).namespace(name)
    return machine.sets[here.region.span.index]


def chosen_dimms(bus: "ImageBus", names: Sequence[str]) -> list[int]:
    """Numbers of the dimms named ``nmemN`` or ``N``, or all of them for ``all`` or nothing."""
    if not names or "all" in names:
        return list(range(len(bus.dimms)))
    found = []
    for name in names:
        number = name.removeprefix("nmem")
        if not number.isascii() or not number.isdigit() or int(number) >= len(bus.dimms):
            known = ", ".join(dimm.name for dimm in bus.dimms)
            raise InvalidArgument(f"{name!r} is no dimm here; there is {known}", op="labels")
        found.append(int(number))
    return found


def data_on(region: "ImageRegion") -> str | None:
    """What the raw namespace of a label-less region holds; ``None`` for one that looks blank, and
    for one with an info block, which the verbs see themselves."""
    from pmemkit.storage.signatures import signature_in

    if region.labelled or region.span.ways > 1 or region.namespaces[0].claim.info is not None:
        return None
    found = signature_in(region.read, region.size)
    if found is not None or not any(region.read(0, 8192)):
        return found
    return "data in its first bytes"


def note(text: str) -> None:
    """A remark on standard error."""
    print(f"pmem: note: {text}", file=sys.stderr)


def print_namespace(here: "ImageNamespace", *, verbose: bool = False) -> None:
    """A namespace as ``ndctl create-namespace`` prints one."""
    from pmemkit.cli._common import print_json

    print_json(namespace_json(here, verbose=verbose))


def namespace_json(here: "ImageNamespace", *, verbose: bool = False) -> dict[str, Any]:
    """A namespace in the JSON of ``ndctl list``."""
    from pmemkit.bus.records import namespace_record
    from pmemkit.bus.report import as_json

    return as_json(namespace_record(here, verbose=verbose))


@contextmanager
def progress_bar(what: str) -> "Iterator[Any]":
    """A function ``(done, total)`` that draws a bar on a terminal and nothing in a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
