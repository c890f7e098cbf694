"""The records of policy: the machine as it is, what its owner wants, and the plan between the two.

Everything here is frozen and made of plain values, so that a plan is a pure function and goes into
JSON and out of it unchanged (``as_plain``). Sizes are bytes, times are seconds.

What this does not do: look at a machine, read a file, decide, or change anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from fractions import Fraction
from typing import Any, Final, Literal, Protocol

from pmemkit.bus.model import Map, Mode
from pmemkit.bus.nature import Nature

__all__ = [
    "VERBS",
    "Actions",
    "Content",
    "CxlState",
    "CxlWant",
    "DaxState",
    "DimmState",
    "Entry",
    "Guards",
    "Keep",
    "MachineState",
    "Match",
    "MemdevState",
    "NamespaceState",
    "PageMap",
    "Personality",
    "Plan",
    "Policy",
    "Refusal",
    "RegionState",
    "Rule",
    "Share",
    "Step",
    "Verb",
    "Want",
    "as_plain",
]

Personality = Literal["storage", "dax", "memory"]


# --- the machine as it is ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What magic bytes say is on a namespace, as ``blkid`` would."""

    kind: str
    """``filesystem``, ``crypto``, ``raid``, ``volume``, ``partition table``, ``swap`` or
    ``pool``."""
    name: str
    """``ext4``, ``xfs``, ``crypto_LUKS``, ``LVM2_member``, ``linux_raid_member`` …"""
    label: str | None = None
    uuid: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DaxState:
    """A device DAX instance: of a devdax namespace, or of a volatile region."""

    dev: str
    size: int
    mode: Literal["devdax", "system-ram", "disabled"]
    target_node: int | None = None
    align: int | None = None
    blocks: int = 0
    """Memory blocks that it became, in system-ram mode."""
    online: int = 0
    """Those of them that are online."""
    zone: Literal["movable", "kernel", "mixed"] | None = None
    """Where the online ones are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceState:
    """A namespace. ``size`` is all of it, as ``create-namespace --size`` counts."""

    dev: str
    mode: Mode
    size: int
    offset: int | None = None
    """Where in its region it begins; ``None``: not known."""
    capacity: int = 0
    """Bytes that a user of it sees."""
    uuid: str | None = None
    name: str | None = None
    map: Map | None = None
    align: int | None = None
    sector_size: int | None = None
    enabled: bool = True
    blockdev: str | None = None
    content: Content | None = None
    mounts: tuple[str, ...] = ()
    """Mount points."""
    holders: tuple[str, ...] = ()
    """What else uses it: dm and md devices, loop devices, a server of ours."""
    dax: DaxState | None = None
    damaged: str | None = None
    """Why its info block is not valid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DimmState:
    """A dimm, or a CXL memory device, that a region takes bytes from."""

    dev: str
    id: str | None = None
    serial: int | None = None
    handle: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CxlState:
    """How a CXL region is put together."""

    dev: str
    type: Literal["ram", "pmem"]
    ways: int
    granularity: int
    decoder: str
    members: tuple[str, ...]
    """Memory devices in the order of their positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionState:
    """A region: of nvdimms or CXL pmem with namespaces, or a volatile one with DAX devices."""

    dev: str
    size: int
    type: Literal["pmem", "volatile"] = "pmem"
    """``pmem`` has namespaces; ``volatile`` (CXL ram, hmem) has :attr:`devices`."""
    nature: Nature = "storage"
    because: str = ""
    endurance: int | None = None
    """Bytes that may be written to it in its life; ``None``: not known, or without end."""
    wears: bool = False
    """True where wear is known to matter, from the owner or from the device."""
    life_used: int | None = None
    """Percent."""
    align: int = 16 << 20
    """What starts and sizes of namespaces are multiples of."""
    labelled: bool = True
    label_room: bool = True
    """False where there is no label area at all, so that none can be initialised."""
    available: int = 0
    """Bytes that no namespace has."""
    largest: int = 0
    """Bytes of the largest run of them."""
    node: int | None = None
    target_node: int | None = None
    persistence: str | None = None
    """``memory_controller``, ``cpu_cache``, ``none`` … as sysfs has it."""
    tier: str | None = None
    dimms: tuple[DimmState, ...] = ()
    namespaces: tuple[NamespaceState, ...] = ()
    devices: tuple[DaxState, ...] = ()
    cxl: CxlState | None = None
    enabled: bool = True
    fixed: str | None = None
    """Why nothing of it can be changed; ``None``: it can."""
    unmappable: str | None = None
    """Why no part of it can have a page map, as fsdax and devdax do; ``None``: it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemdevState:
    """A CXL memory device. Bytes that no region has yet are free."""

    dev: str
    serial: int | None = None
    node: int | None = None
    ram_size: int = 0
    pmem_size: int = 0
    ram_free: int = 0
    pmem_free: int = 0
    decoders: tuple[str, ...] = ()
    """Root decoders that reach it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineState:
    """Everything the planner looks at."""

    bus: Literal["image", "kernel"]
    name: str
    """The machine file, or the host's name."""
    regions: tuple[RegionState, ...] = ()
    memdevs: tuple[MemdevState, ...] = ()
    dram: int | None = None
    """Bytes of ordinary RAM; ``None``: not known, as on an image bus."""
    dram_free: int | None = None
    block_size: int = 128 << 20
    """Of a memory block."""
    auto_online: str | None = None
    """The kernel's policy for new memory blocks: offline, online, online_kernel, online_movable."""
    verbs: frozenset[str] = frozenset()
    """What can be done on this bus; the planner defers the rest and says so."""

    def region(self, dev: str) -> RegionState | None:
        """The region of this name."""
        return next((each for each in self.regions if each.dev == dev), None)


# --- what the owner wants ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Which regions a rule is for; what is ``None`` matches everything. Globs are shell patterns,
    and one of several is enough."""

    nature: Nature | None = None
    type: Literal["pmem", "volatile"] | None = None
    size_least: int | None = None
    size_most: int | None = None
    node: tuple[int, ...] | None = None
    """Target node, or the region's own where it has no target node."""
    dimm: tuple[str, ...] | None = None
    """Globs of dimm ids or names (nmem0)."""
    serial: tuple[int, ...] | None = None
    name: tuple[str, ...] | None = None
    """Globs of region names."""
    persistence: tuple[str, ...] | None = None
    tier: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """A personality and its parameters; ``None`` leaves the choice to the planner."""

    personality: Personality
    mode: Literal["raw", "sector", "fsdax", "devdax", "system-ram"]
    sector_size: int | None = None
    map: Literal["mem", "dev"] | None = None
    align: int | None = None
    online: Literal["movable", "kernel", "no"] | None = None
    filesystem: Literal["ext4", "xfs"] | None = None
    mount: str | None = None
    mount_options: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A part of a region."""

    want: Want
    size: int | Fraction | None = None
    """Bytes, a share of the region, or ``None``: the rest."""
    name: str | None = None
    """Of the namespace."""
    line: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The first rule that matches a region says what it is to be."""

    name: str
    match: Match
    shares: tuple[Share, ...]
    """At least one; at most one of them is the rest."""
    override_nature: str | None = None
    """Why the owner leans further than the nature allows."""
    line: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CxlWant:
    """A CXL region that there has to be. Members are globs of memdev names or serial numbers."""

    name: str
    type: Literal["ram", "pmem"]
    members: tuple[str, ...]
    ways: int | None = None
    granularity: int | None = None
    decoder: str | None = None
    size: int | None = None
    line: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Guards:
    """What no plan does, whatever the rules say."""

    keep_signatures: bool = True
    """Never destroy a namespace that carries a signature."""
    keep_if_mounted: bool = True
    """Never touch what is mounted or otherwise in use."""
    protect: tuple[str, ...] = ()
    """Globs of namespace names, uuids and devs that stay as they are."""
    dram_share: Fraction = Fraction(9, 10)
    """Page maps go to ``dev`` where less than this share of the DRAM would be left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy file."""

    rules: tuple[Rule, ...] = ()
    cxl: tuple[CxlWant, ...] = ()
    guards: Guards = field(default_factory=Guards)
    path: str | None = None


# --- the plan ------------------------------------------------------------------------------------

Verb = Literal[
    "create-cxl-region",
    "destroy-cxl-region",
    "init-labels",
    "create-namespace",
    "destroy-namespace",
    "reconfigure-namespace",
    "enable-namespace",
    "reconfigure-device",
    "online-memory",
    "offline-memory",
    "mkfs",
    "mount",
    "umount",
]
VERBS: Final[tuple[Verb, ...]] = Verb.__args__  # type: ignore[attr-defined]
"""In the words of cxl, ndctl, daxctl and mount. ``params`` of each, all plain values:

    create-cxl-region      type, members, ways, granularity, decoder, size
    destroy-cxl-region     (target: the CXL region)
    init-labels            (target: the region)
    create-namespace       mode, size, name, sector_size, map, align     (target: the region)
    destroy-namespace      uuid
    reconfigure-namespace  uuid, mode, sector_size, map, align, name
    enable-namespace
    reconfigure-device     mode: devdax | system-ram, online: movable | kernel | no
    online-memory          zone: movable | kernel
    offline-memory
    mkfs                   filesystem
    mount                  filesystem, path, options
    umount                 path

The target is a dev (``region0``, ``namespace0.1``, ``dax0.0``), or ``@N`` for what step N makes:
its namespace, or, in ``reconfigure-device``, ``online-memory`` and ``offline-memory``, the DAX
device of that namespace or CXL region.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageMap:
    """The bill of a page map."""

    size: int
    place: Literal["mem", "dev"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One change."""

    number: int
    """From 1 on, in the order of the plan."""
    verb: Verb
    target: str
    region: str
    why: str
    params: Mapping[str, Any] = field(default_factory=dict)
    destroys: tuple[str, ...] = ()
    """What data are lost, in words; empty: none."""
    reverse: Literal["contents", "state", "none"] = "state"
    """What undo brings back: contents (where nothing was written since), the state without its
    contents, or nothing."""
    page_map: PageMap | None = None
    wear: str | None = None
    """The wear forecast, where the step leans on the nature of a region that wears."""
    seconds: float = 0.0
    """An estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Something that a guard, or physics, keeps from happening. Its region is left alone."""

    region: str
    why: str
    rule: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be done. Empty steps: the machine is as the policy wants it, but for refusals."""

    steps: tuple[Step, ...] = ()
    refused: tuple[Refusal, ...] = ()
    deferred: tuple[str, ...] = ()
    """What only the running machine can do, in words (a policy tried on images)."""
    notes: tuple[str, ...] = ()
    """What a reader should know: which rule took which region, which regions no rule takes."""


# --- carrying it out -----------------------------------------------------------------------------


class Keep(Protocol):
    """Where a step puts what it is about to replace, durable when the call returns."""

    def __call__(self, what: Mapping[str, Any]) -> None:
        """Keeps plain values; ``bytes`` are allowed. May be called several times; later keys
        win."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A step in the journal."""

    step: Step
    state: Literal["started", "done", "undone"]
    kept: Mapping[str, Any] = field(default_factory=dict)
    """What the step replaced, by the word of its own :class:`Actions`."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """What came of it: ``dev``, ``uuid``, what tells whether anything was written since."""


class Actions(Protocol):
    """One bus, looked at and changed."""

    def observe(self) -> MachineState:
        """The machine as it is now."""

    def perform(
        self, step: Step, keep: Keep, made: Mapping[int, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Carries a step out, whole or not at all as far as the bus can, and says what came of it.

        ``keep`` is called before anything is replaced. ``made`` has what earlier steps of this run
        made, for targets ``@N``. Performing a step whose effect is there already does nothing.
        Raises :class:`~pmemkit.errors.PmemError`.
        """

    def reverse(self, entry: Entry, *, force: bool = False) -> str:
        """Takes a step back, done or only started, and says in a sentence what came back.

        Reversing what was never done does nothing. Raises ``Busy`` where it cannot be done now,
        ``NotSupported`` where there is no reverse, and ``Corrupt`` where something was written
        since and the contents cannot come back whole; ``force`` then brings the state back without
        them.
        """


def as_plain(thing: Any) -> Any:
    """Records as dicts, lists and numbers for JSON; what is ``None`` or empty is left out."""
    if is_dataclass(thing) and not isinstance(thing, type):
        pairs = ((each.name, getattr(thing, each.name)) for each in fields(thing))
        return {
            name: as_plain(value)
            for name, value in pairs
            if value is not None and value != () and value != {}
        }
    if isinstance(thing, Mapping):
        return {key: as_plain(value) for key, value in thing.items()}
    if isinstance(thing, (tuple, list)):
        return [as_plain(each) for each in thing]
    if isinstance(thing, (set, frozenset)):
        return sorted(thing)
    if isinstance(thing, Fraction):
        return f"{float(thing * 100):g}%"
    return thing
