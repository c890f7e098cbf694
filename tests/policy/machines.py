"""Random machines and policies, and what it means for the one to be as the other wants it."""

from fractions import Fraction

from hypothesis import strategies as st

from pmemkit.policy.model import (
    Content,
    CxlWant,
    DaxState,
    DimmState,
    Guards,
    MachineState,
    Match,
    MemdevState,
    NamespaceState,
    Policy,
    RegionState,
    Rule,
    Share,
    Want,
)

MIB = 1 << 20
GIB = 1 << 30
UNIT = 128 * MIB
SCARCE = 64 * MIB
"""So little DRAM that not every page map has room in it."""
NAMES = [None, "a", "b"]
PATHS = ["/mnt/a", "/mnt/b", "/mnt/c"]
CONTENTS = [
    None,
    None,
    Content(kind="filesystem", name="ext4"),
    Content(kind="filesystem", name="xfs"),
    Content(kind="crypto", name="crypto_LUKS"),
]

# --- machines -------------------------------------------------------------------------------------


@st.composite
def dax_devices(draw, dev, size):
    """A DAX device, or some part of one as memory."""
    if draw(st.booleans()):
        return DaxState(dev=dev, size=size, mode="devdax")
    blocks = size // UNIT
    online = draw(st.integers(0, blocks))
    zone = draw(st.sampled_from(["movable", "kernel"])) if online else None
    return DaxState(dev=dev, size=size, mode="system-ram", blocks=blocks, online=online, zone=zone)


@st.composite
def namespaces(draw, number, place, size, paths, labelled):
    """A namespace as somebody left it. ``paths``: mount points that are still free."""
    mode = draw(st.sampled_from(["raw", "sector", "fsdax", "devdax"]))
    dev = f"namespace{number}.{place}"
    paged = mode in ("fsdax", "devdax")
    content = draw(st.sampled_from(CONTENTS)) if mode != "devdax" else None
    mounts = ()
    if content is not None and content.kind == "filesystem" and paths and draw(st.booleans()):
        mounts = (paths.pop(),)
    damaged = draw(st.sampled_from([None, None, None, "a bad checksum"]))
    enabled = bool(mounts) or draw(st.sampled_from([True, True, True, False]))
    dax = None
    if mode == "devdax":
        dax = DaxState(dev=f"dax{number}.{place}", size=size, mode="devdax")
        dax = draw(dax_devices(dax.dev, size)) if enabled else dax
    return NamespaceState(
        dev=dev,
        mode=mode,
        size=size,
        capacity=size,
        uuid=f"uuid-{dev}",
        name=draw(st.sampled_from(NAMES)) if labelled else None,
        map=draw(st.sampled_from(["mem", "dev"])) if paged else None,
        align=2 * MIB if paged else None,
        sector_size=draw(st.sampled_from([512, 4096])) if mode == "sector" else None,
        enabled=enabled,
        content=content,
        mounts=mounts,
        holders=() if mounts or not enabled else draw(st.sampled_from([(), (), ("a server",)])),
        dax=dax,
        damaged=damaged if mode != "devdax" and content is None else None,
    )


@st.composite
def regions(draw, number, paths):
    """A region with what is on it."""
    dev, size = f"region{number}", draw(st.integers(2, 12)) * UNIT
    nature = draw(st.sampled_from(["storage", "memory"]))
    common = {
        "dev": dev,
        "size": size,
        "nature": nature,
        "because": "a test says so",
        "wears": nature == "storage" and draw(st.booleans()),
        "endurance": draw(st.sampled_from([None, 1000 * GIB])),
        "node": number % 2,
        "dimms": (DimmState(dev=f"nmem{number}", serial=number),),
    }
    if draw(st.sampled_from([False, False, True])):
        device = draw(dax_devices(f"dax{number}.0", size))
        return RegionState(type="volatile", devices=(device,), **common)
    labelled = draw(st.booleans())
    here = []
    if not labelled:
        here.append(draw(namespaces(number, 0, size, paths, labelled)))
    left = size
    while labelled and left and len(here) < 4 and draw(st.booleans()):
        part = draw(st.integers(1, left // UNIT)) * UNIT
        here.append(draw(namespaces(number, len(here), part, paths, labelled)))
        left -= part
    fixed = draw(st.sampled_from([None] * 6 + ["the kernel has it read-only"]))
    return RegionState(
        labelled=labelled,
        label_room=labelled or draw(st.booleans()),
        namespaces=tuple(here),
        fixed=fixed,
        **common,
    )


@st.composite
def machines(draw):
    """A machine. Mount points are unique."""
    paths = list(PATHS)
    memdevs = tuple(
        MemdevState(
            dev=f"mem{number}",
            serial=0xC0 + number,
            ram_size=GIB,
            ram_free=GIB,
            pmem_size=GIB,
            pmem_free=GIB,
            decoders=("decoder0.0",),
        )
        for number in range(draw(st.integers(0, 2)))
    )
    count = draw(st.integers(0, 4))
    return MachineState(
        bus="kernel",
        name="simulated",
        regions=tuple(draw(regions(number, paths)) for number in range(count)),
        memdevs=memdevs,
        dram=draw(st.sampled_from([None, SCARCE, 64 * GIB])),
    )


# --- policies -------------------------------------------------------------------------------------

MODES = {
    "storage": ["raw", "sector"],
    "dax": ["fsdax", "devdax"],
    "memory": ["system-ram"],
}


@st.composite
def wants(draw):
    """What the schema lets through."""
    personality = draw(st.sampled_from(sorted(MODES)))
    mode = draw(st.sampled_from(MODES[personality]))
    files = mode in ("raw", "sector", "fsdax")
    filesystem = draw(st.sampled_from([None, "ext4", "xfs"])) if files else None
    return Want(
        personality=personality,
        mode=mode,
        sector_size=draw(st.sampled_from([None, 512, 4096])) if mode == "sector" else None,
        map=None if files and mode != "fsdax" else draw(st.sampled_from([None, "mem", "dev"])),
        online=draw(st.sampled_from([None, "movable", "kernel", "no"]))
        if mode == "system-ram"
        else None,
        filesystem=filesystem,
        mount=draw(st.sampled_from([None, *PATHS])) if filesystem else None,
    )


@st.composite
def shares(draw):
    """One want, or a region divided."""
    if draw(st.booleans()):
        return (Share(want=draw(wants())),)
    parts = []
    for percent in draw(st.sampled_from([(60,), (30, 30), (25, 75), (50, 20)])):
        parts.append(Share(want=draw(wants()), size=Fraction(percent, 100)))
    if sum(each.size for each in parts) < 1:
        parts.append(Share(want=draw(wants()), name=draw(st.sampled_from(NAMES))))
    return tuple(parts)


@st.composite
def policies(draw):
    """A policy."""
    rules = []
    for number in range(draw(st.integers(0, 4))):
        match = draw(
            st.sampled_from(
                [
                    Match(),
                    Match(nature="memory"),
                    Match(type="volatile"),
                    Match(name=("region0", "region2")),
                    Match(size_least=512 * MIB),
                    Match(node=(1,)),
                ]
            )
        )
        rules.append(
            Rule(
                name=f"rule {number}",
                match=match,
                shares=draw(shares()),
                override_nature=draw(st.sampled_from([None, "it is meant"])),
            )
        )
    cxl = ()
    if draw(st.booleans()):
        cxl = (
            CxlWant(
                name="far",
                type=draw(st.sampled_from(["ram", "pmem"])),
                members=draw(st.sampled_from([("*",), ("mem0",), ("0xc1",)])),
                size=draw(st.sampled_from([None, 512 * MIB])),
            ),
        )
    guards = Guards(
        keep_signatures=draw(st.booleans()),
        keep_if_mounted=draw(st.booleans()),
        protect=draw(st.sampled_from([(), ("namespace1.0", "uuid-namespace0.1")])),
    )
    return Policy(rules=tuple(rules), cxl=cxl, guards=guards)


# --- what they come to ----------------------------------------------------------------------------


def is_reached(region: RegionState, rule: Rule) -> list[str]:
    """What of a rule a region is not; written apart from the planner, and blunter."""
    wrong = []
    left = list(region.namespaces)
    devices = list(region.devices)
    for share in rule.shares:
        want = share.want
        if region.type == "volatile":
            wrong += [f"{each.dev} {each}" for each in devices if not _device_is(each, want)]
            continue
        found = next((each for each in left if _namespace_is(each, region, share)), None)
        if found is None:
            wrong.append(f"nothing in {region.dev} is {share}")
        else:
            left.remove(found)
    return wrong


def _namespace_is(namespace: NamespaceState, region: RegionState, share: Share) -> bool:
    want = share.want
    mode = "devdax" if want.mode == "system-ram" else want.mode
    wanted = region.size if share.size is None else share.size
    least = int(region.size * wanted) if isinstance(wanted, Fraction) else wanted
    fits = share.size is None or least - 16 * MIB < namespace.size <= least
    ok = namespace.mode == mode and namespace.enabled and fits
    ok = ok and want.map in (None, namespace.map)
    ok = ok and want.sector_size in (None, namespace.sector_size)
    ok = ok and share.name in (None, namespace.name)
    if want.filesystem is not None:
        ok = ok and namespace.content is not None and namespace.content.name == want.filesystem
    if want.mount is not None:
        ok = ok and want.mount in namespace.mounts
    if mode == "devdax":
        ok = ok and namespace.dax is not None and _device_is(namespace.dax, want)
    return ok


def _device_is(device: DaxState, want: Want) -> bool:
    if want.personality != "memory":
        return device.mode == "devdax"
    if want.online == "no":
        return device.mode == "system-ram"
    all_online = device.online == device.blocks
    return (
        device.mode == "system-ram"
        and all_online
        and (not device.blocks or device.zone == (want.online or "movable"))
    )


def guarded(machine: MachineState, policy: Policy) -> dict[str, NamespaceState]:
    """The namespaces that nothing may take away, by uuid."""
    guards = policy.guards
    return {
        each.uuid: each
        for region in machine.regions
        for each in region.namespaces
        if (guards.keep_signatures and (each.content is not None or each.damaged is not None))
        or (guards.keep_if_mounted and each.mounts)
        or each.holders
        or each.dev in guards.protect
        or each.uuid in guards.protect
    }
