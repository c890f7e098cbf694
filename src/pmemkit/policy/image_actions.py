"""Policy on images: a machine file looked at and changed, and every change taken back.

Invariants:
1. A step is rehearsed first; what it will replace is kept and durable before the first write, and
   what is then written is exactly what was rehearsed.
2. Taking back restores the very bytes, in an order that a crash may interrupt anywhere, and may be
   done again from anywhere (:mod:`pmemkit.policy.image_changes`).
3. Contents come back only where the media hold what the step left there, and where nothing was
   written since to the range that it concerned; otherwise it is :class:`Corrupt`, unless forced.
4. Forced, the state comes back: the same namespaces of the same modes, and no promise of what is in
   them.
5. The dimms of the region are locked for writing meanwhile; the images of others are only read.

What this does not do: change interleaved sets, or ask anybody whether it should.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final
from uuid import UUID

from pmemkit.bus.image import (
    ImageNamespace,
    ImageRegion,
    machine_of,
    observe,
    observe_with,
    open_reader,
)
from pmemkit.bus.machine import Machine
from pmemkit.errors import Busy, Corrupt, InvalidArgument, NotSupported
from pmemkit.namespace.create import Wish, create, destroy, reconfigure
from pmemkit.namespace.images import Images, Progress, open_images
from pmemkit.namespace.label_verbs import init_labels, zero_labels
from pmemkit.policy.image_changes import Changes, Rehearsal, fingerprint
from pmemkit.policy.image_survey import IMAGE_VERBS, machine_state
from pmemkit.policy.model import Actions, Entry, Keep, MachineState, Step
from pmemkit.storage.btt_reader import read_infos
from pmemkit.storage.signatures import contents_of

__all__ = ["ImageActions"]

_LABEL_VERSION: Final = (1, 2)
_PIECE: Final = 1 << 20
"""Bytes at the start, and at the end, that have the magic bytes of all formats."""
_Made = Mapping[int, Mapping[str, Any]]


class ImageActions(Actions):
    """The bus of a machine file, or of bare images."""

    def __init__(
        self, paths: Sequence[str | os.PathLike[str]], *, progress: Progress | None = None
    ) -> None:
        self.paths = [os.path.abspath(path) for path in paths]  # noqa: PTH100 - keeps links
        self.progress = progress

    def __repr__(self) -> str:
        return f"<ImageActions {self.name}>"

    @property
    def name(self) -> str:
        """The machine file, or the first image."""
        return self.paths[0]

    def machine(self) -> Machine:
        """The machine as its file has it now."""
        return machine_of(self.paths)

    def observe(self) -> MachineState:
        """What the images hold now. Nothing is locked."""
        machine = self.machine()
        with ExitStack() as stack:
            readers = []
            for dimm in machine.dimms:
                read, size, close = open_reader(dimm.path)
                stack.callback(close)
                readers.append((read, size))
            return machine_state(observe_with(machine, readers), self.name)

    # --- forth ------------------------------------------------------------------------------------

    def perform(self, step: Step, keep: Keep, made: _Made) -> dict[str, Any]:
        """Carries a step out on the images; see :class:`~pmemkit.policy.model.Actions`."""
        if step.verb not in IMAGE_VERBS:
            text = f"{step.verb} needs the running machine; images have {_listed(IMAGE_VERBS)}"
            raise NotSupported(text, op=step.verb, path=self.name)
        with self._region(step.region) as (images, region):
            paper = Rehearsal(images, images.number_of(region))
            before, after = _rehearse(paper, region, step, made)
            changes = paper.changes
            if changes.groups:
                keep(_kept(images, region, changes, before, after))
                changes.carry_out(images, self.progress)
            if after is None:
                return {}
            return {"dev": after.dev, "uuid": str(after.uuid) if after.found else None}

    @contextmanager
    def _region(self, name: str) -> Iterator[tuple[Images, ImageRegion]]:
        """The images, with that of one region locked for change."""
        machine = self.machine()
        region = observe(machine).region(name)
        if region.span.ways > 1:
            text = f"{name} is interleaved over {region.span.ways} dimms; such sets are not changed"
            raise NotSupported(text, op="apply", path=self.name)
        with open_images(machine, machine.sets[region.span.index]) as images:
            yield images, images.bus().region(name)

    # --- back -------------------------------------------------------------------------------------

    def reverse(self, entry: Entry, *, force: bool = False) -> str:
        """Takes a step back; see :class:`~pmemkit.policy.model.Actions`."""
        step = entry.step
        if step.verb not in IMAGE_VERBS:
            raise NotSupported(f"{step.verb} is no verb of images", op="undo", path=self.name)
        if "changes" not in entry.kept:
            return "nothing had been changed"
        changes = Changes.of_plain(entry.kept["changes"])
        with self._region(step.region) as (images, region):
            _require_same(images, region, entry, changes)
            place = changes.place(images) if _labels_stand(images, entry, changes) else None
            if place == 0:
                return "nothing is left of it"
            doubt = _doubt(images, entry, changes, place)
            if doubt is not None and not force:
                text = (
                    f"{doubt}: the contents that {step.verb} of {step.target} replaced cannot come "
                    "back; --force brings the state back without them"
                )
                raise Corrupt(text, op="undo", path=region.path)
            if place is not None and changes.kept(place):
                changes.take_back(images, place)
            else:
                _bring_back(images, region, entry)
            return _came_back(entry, doubt)


# --- what a step does -----------------------------------------------------------------------------


def _rehearse(
    paper: Images, region: ImageRegion, step: Step, made: _Made
) -> tuple[ImageNamespace | None, ImageNamespace | None]:
    """Carries the verb out on paper; gives the namespace that it concerns before and after."""
    match step.verb:
        case "init-labels":
            if not region.labelled:
                number = paper.number_of(region)
                init_labels(paper, number, version=_LABEL_VERSION, force=bool(step.destroys))
            return None, None
        case "create-namespace":
            there = _named(region, step.params)
            return None, there or _wiped(paper, create(paper, region.dev, _wish(step.params)))
        case "destroy-namespace":
            here = _locate(region, step, made)
            return (None if here is None else destroy(paper, _key(here), force=True)), None
        case _:
            here = _locate(region, step, made)
            if here is None:
                text = f"{step.target} is not in {region.dev} any more"
                raise InvalidArgument(text, op=step.verb, path=region.path)
            if _agrees(here, step.params):
                return here, here
            damaged = bool(here.claim.faults)
            wish = _wish(step.params, force=damaged)
            return here, _wiped(paper, reconfigure(paper, _key(here), wish))


def _wiped(paper: Images, here: ImageNamespace) -> ImageNamespace:
    """A new namespace without the signatures of what lay there before, which nobody is to take for
    its contents (:mod:`pmemkit.policy.kernel_leftovers`)."""
    start, end = _data_range(here)
    base = here.region.dimms[0].spec.dpa + here.offset
    for offset in (start, max(start, end - _PIECE)):
        if contents_of(here) is None:
            break
        zeros = bytes(min(_PIECE, end - offset))
        paper.carry_out(paper.number_of(here.region), [[(offset, zeros)]], base=base)
    return here


def _data_range(here: ImageNamespace) -> tuple[int, int]:
    """Where in a new namespace its first and last data are."""
    claim = here.claim
    if claim.mode != "sector":
        return claim.offset, claim.offset + (here.size if claim.size is None else claim.size)

    def read(offset: int, length: int) -> bytes:
        return here.region.read(here.offset + offset, length)

    parent = here.uuid
    infos = read_infos(read, here.size, version=claim.version, parent_uuid=parent)
    (first, info), (last, last_info) = infos[0], infos[-1]
    data_size = last_info.external_nlba * last_info.internal_lbasize
    return first + info.dataoff, last + last_info.dataoff + data_size


def _wish(params: Mapping[str, Any], *, force: bool = False) -> Wish:
    mode = params["mode"]
    return Wish(
        mode=mode,
        size=params.get("size"),
        name=params.get("name") or "",
        sector_size=params.get("sector_size") if mode != "devdax" else None,
        map=params.get("map") or "dev",
        align=params.get("align") if mode in ("fsdax", "devdax") else None,
        force=force,
    )


def _key(here: ImageNamespace) -> str:
    """What a namespace is called that keeps its name when others come and go."""
    return str(here.uuid) if here.found is not None else here.dev


def _locate(region: ImageRegion, step: Step, made: _Made) -> ImageNamespace | None:
    """The namespace of a step, by uuid where it has one."""
    uuid, dev = step.params.get("uuid"), step.target
    if dev.startswith("@"):
        earlier = made.get(int(dev[1:]), {})
        uuid, dev = earlier.get("uuid"), earlier.get("dev", dev)
    for each in region.namespaces:
        known = each.uuid if each.found is not None else each.claim.uuid
        if (each.dev == dev) if uuid is None else (str(known) == uuid):
            return each
    return None


def _named(region: ImageRegion, params: Mapping[str, Any]) -> ImageNamespace | None:
    """A namespace of the wanted name that is as wanted already."""
    for each in region.namespaces:
        if params.get("name") and each.name == params["name"] and _agrees(each, params):
            return each if params.get("size") in (None, each.size) else None
    return None


def _agrees(here: ImageNamespace, params: Mapping[str, Any]) -> bool:
    """True when a namespace is what these parameters ask for."""
    claim = here.claim
    if claim.mode != params["mode"] or claim.faults or not claim.enabled:
        return False
    if params.get("name") not in (None, "", here.name):
        return False
    sector_size: int | None = (here.found.lbasize if here.found is not None else 0) or 512
    if claim.mode == "sector":
        sector_size = claim.sector_size
    pairs = (("sector_size", sector_size), ("map", claim.map), ("align", claim.align))
    known = pairs[1:] if claim.mode == "devdax" else pairs
    return all(params.get(key) in (None, value) for key, value in known if value is not None)


# --- what is kept of it ---------------------------------------------------------------------------


def _kept(
    images: Images,
    region: ImageRegion,
    changes: Changes,
    before: ImageNamespace | None,
    after: ImageNamespace | None,
) -> dict[str, Any]:
    """What the journal keeps: all that is replaced, and what tells whether it was written since."""
    base = region.dimms[0].spec.dpa
    here = before or after
    offset, size = (0, region.size) if here is None else (here.offset, here.size)
    start, end = base + offset, base + offset + size
    return {
        "changes": changes.plain(),
        "range": [start, end],
        "rest": fingerprint(images, changes.dimm, start, end, changes.ranges()),
        "labels": _labels_rest(images, changes),
        "file_size": len(images.medium(changes.dimm)),
        "was": None if before is None else _description(before),
    }


def _description(here: ImageNamespace) -> dict[str, Any]:
    claim, labelled = here.claim, here.found is not None
    return {
        "dev": here.dev,
        "labelled": labelled,
        "mode": claim.mode,
        "size": here.size,
        "uuid": str(here.uuid) if labelled else None,
        "name": here.name,
        "sector_size": claim.sector_size if claim.mode == "sector" else None,
        "map": claim.map,
        "align": claim.align,
    }


# --- taking it back -------------------------------------------------------------------------------


def _require_same(images: Images, region: ImageRegion, entry: Entry, changes: Changes) -> None:
    """Refuses an image that cannot be the one that was changed."""
    number = images.number_of(region)
    size = len(images.medium(number))
    if number != changes.dimm or size != entry.kept["file_size"]:
        text = (
            f"{region.dev} is nmem{number} with {size} bytes; what was changed is "
            f"nmem{changes.dimm} with {entry.kept['file_size']}"
        )
        raise Corrupt(text, op="undo", path=region.path)


def _labels_rest(images: Images, changes: Changes) -> str:
    """A digest of what the label area has that the change does not write."""
    end = len(images.medium(changes.dimm))
    start = end - images.machine.dimms[changes.dimm].label_size
    return fingerprint(images, changes.dimm, start, end, changes.ranges())


def _labels_stand(images: Images, entry: Entry, changes: Changes) -> bool:
    """True when nobody changed labels since. A change of labels writes one index block of two, so
    what a step wrote may still stand there and count no more."""
    return bool(_labels_rest(images, changes) == entry.kept["labels"])


def _doubt(images: Images, entry: Entry, changes: Changes, place: int | None) -> str | None:
    """Why the contents cannot come back whole; ``None``: they can."""
    what = _concerned(entry)
    if place is None:
        return f"{what} or its labels were changed since"
    if not changes.kept(place):
        return "what was there is more than the journal keeps"
    start, end = entry.kept["range"]
    if fingerprint(images, changes.dimm, start, end, changes.ranges()) != entry.kept["rest"]:
        return f"{what} was written to since"
    return None


def _concerned(entry: Entry) -> str:
    was = entry.kept.get("was")
    if was is not None:
        return str(was["dev"])
    return str(entry.made.get("dev") or entry.step.region)


def _bring_back(images: Images, region: ImageRegion, entry: Entry) -> None:
    """Brings the state back with the verbs that make namespaces. May be done again."""
    was = entry.kept["was"]
    start, end = entry.kept["range"]
    offset = start - region.dimms[0].spec.dpa
    place = (offset, end - start)
    here = next((n for n in region.namespaces if (n.offset, n.size) == place), None)
    match entry.step.verb:
        case "init-labels":
            if region.labelled and region.namespaces:
                devs = ", ".join(each.dev for each in region.namespaces)
                text = f"{devs} would be lost with the labels; destroy them first"
                raise Busy(text, op="undo", path=region.path)
            zero_labels(images, images.number_of(region))
        case "create-namespace":
            if here is not None and (here.found is not None or here.claim.info is not None):
                destroy(images, _key(here), force=True)
        case "destroy-namespace" if was["labelled"]:
            if was["uuid"] not in {str(each.uuid) for each in region.namespaces}:
                create(images, region.dev, replace(_wish(was), uuid=UUID(was["uuid"])))
        case _:
            if here is None:
                text = f"the place of {was['dev']} is no namespace any more"
                raise Corrupt(text, op="undo", path=region.path)
            if _key(here) != was["uuid"] or not _agrees(here, was):
                uuid = UUID(was["uuid"]) if was["labelled"] else None
                reconfigure(images, _key(here), replace(_wish(was, force=True), uuid=uuid))


def _came_back(entry: Entry, doubt: str | None) -> str:
    """In a sentence."""
    step, was = entry.step, entry.kept["was"]
    if step.verb == "init-labels":
        text = f"{step.region} is label-less again"
    elif was is None:
        text = f"{entry.made.get('dev') or 'the namespace'} is gone again"
    else:
        text = f"{was['dev']} is {was['mode']} again"
    if doubt is not None:
        return f"{text}, without its contents: {doubt}"
    return f"{text}, with what was in it" if was is not None else text


def _listed(words: Iterable[str]) -> str:
    return ", ".join(sorted(words))
