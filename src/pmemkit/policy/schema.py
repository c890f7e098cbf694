"""Policy files: what can be said in one, and what each wrong one is told.

A policy is TOML; ``docs/policy.md`` explains it to those who write one:

    [guards]
    keep_signatures = true               # never destroy what carries a signature

    [[rule]]                             # the first rule that matches a region decides
    name = "logs"
    match = { nature = "storage", size = ">=100G" }
    want = { personality = "storage", mode = "sector", filesystem = "ext4", mount = "/var/log" }

    [[cxl]]                              # a CXL region that there has to be
    name = "far"
    type = "ram"
    members = "all"

Invariants:
1. A file is read whole or refused whole, with every problem in it, each on a line of its own that
   begins with the file's name and line.
2. A policy that is given out is complete: every rule has shares, every share a personality and a
   mode that fit each other, no two rules have one match, and only the last matches everything.
3. Nothing in a file makes this raise anything but :class:`InvalidArgument`.

What this does not do: look at the machine. Whether a size fits a region, or a mount point is taken
by another rule, is for the planner to say.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Final

from pmemkit.errors import InvalidArgument
from pmemkit.formats import btt
from pmemkit.formats.infoblock import ALIGNMENTS
from pmemkit.policy.document import LIST_MOST, TEXT_SIZE_MOST, Table, read_document, refusal, shown
from pmemkit.policy.model import CxlWant, Guards, Match, Personality, Policy, Rule, Share, Want
from pmemkit.trust import read_trusted
from pmemkit.units import format_size, parse_size

__all__ = ["RULES_MOST", "load_policy", "parse_policy"]

RULES_MOST: Final = 10_000
"""Rules of a policy."""
_NAME_SIZE_MOST: Final = 63
"""Bytes: what a namespace label has room for."""
_TEXT_SIZE_MOST: Final = 1000
_NODE_MOST: Final = 1023
"""The kernel has at most 1024 NUMA nodes."""
_SERIAL_MOST: Final = 2**64 - 1

_PERSONALITIES: Final = ("storage", "dax", "memory")
_MODES: Final[Mapping[str, Personality]] = {
    "raw": "storage",
    "sector": "storage",
    "fsdax": "dax",
    "devdax": "dax",
    "system-ram": "memory",
}
_DEFAULT_MODES: Final = {"storage": "sector", "dax": "fsdax", "memory": "system-ram"}
_MODES_OF: Final = {
    "sector_size": ("sector",),
    "map": ("fsdax", "devdax", "system-ram"),
    "align": ("fsdax", "devdax", "system-ram"),
    "online": ("system-ram",),
    "filesystem": ("raw", "sector", "fsdax"),
}
"""Keys of a want that do not belong to every mode."""
_DOMAINS: Final = ("memory_controller", "cpu_cache", "none", "unknown")

_WANT: Final = (
    "personality",
    "mode",
    "sector_size",
    "map",
    "align",
    "online",
    "filesystem",
    "mount",
    "mount_options",
    "name",
)
_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "a policy": ("version", "guards", "rule", "cxl"),
    "[guards]": ("keep_signatures", "keep_if_mounted", "protect", "dram_share"),
    "[[rule]]": ("name", "match", "want", "share", "override_nature"),
    "match": (
        "nature",
        "type",
        "size",
        "node",
        "dimm",
        "serial",
        "name",
        "persistence",
        "tier",
    ),
    "want": _WANT,
    "[[rule.share]]": ("size", *_WANT),
    "[[cxl]]": ("name", "type", "members", "ways", "granularity", "decoder", "size"),
}
"""Every table by the word that messages have for it, and its keys."""

_LATER: Final = {
    key: layer
    for layer, keys in (
        ("the cache layer", "cache cache_size read_ahead write_back write_through"),
        ("wear levelling", "levelling leveling wear_levelling wear_leveling psi"),
        ("wear accounting", "endurance life_used wear wear_limit"),
        ("memory pools", "pool pools interleave promotion"),
        (
            "layers that change what is written",
            "compress compression dedup deduplication encrypt encryption",
        ),
    )
    for key in keys.split()
}
"""Keys that a policy will have, and what they come with."""
_WRITTEN_IN: Final = {
    ("[[rule.share]]", "want"): "write its keys into the share itself",
    ("want", "size"): "for a part of the region write [[rule.share]]",
    ("want", "share"): "write [[rule.share]]",
}
"""Keys that are nearly right, by the table they were found in."""

_PERCENT: Final = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%", re.ASCII)
_HEX: Final = re.compile(r"0[xX][0-9a-fA-F]{1,16}", re.ASCII)
_DECODER: Final = re.compile(r"decoder\d{1,4}\.\d{1,4}", re.ASCII)
_GLOB_MARKS: Final = frozenset("*?[")
_WAYS: Final = (1, 2, 3, 4, 6, 8, 12, 16)
_GRANULARITIES: Final = tuple(256 << shift for shift in range(7))
_CXL_UNIT: Final = 256 << 20
"""What an HDM decoder counts in, for each way."""


def load_policy(path: str | os.PathLike[str], *, trusted: bool | None = None) -> Policy:
    """Reads a policy file.

    ``trusted`` ``False`` demands that nobody but root can write the file, ``True`` does not, and
    ``None`` does when root asks. Raises :class:`InvalidArgument`, or what the system says.
    """
    name = os.fsdecode(path)
    check = os.geteuid() == 0 if trusted is None else not trusted
    data = read_trusted(name, TEXT_SIZE_MOST, check=check)
    if len(data) > TEXT_SIZE_MOST:
        raise refusal(name, 1, f"is longer than {TEXT_SIZE_MOST} bytes; a policy never is")
    try:
        text = data.decode()
    except UnicodeDecodeError as cause:
        line = data.count(b"\n", 0, cause.start) + 1
        raise refusal(name, line, f"byte 0x{data[cause.start]:02x} is no UTF-8") from None
    return parse_policy(text, name)


def parse_policy(text: str, path: str | None = None) -> Policy:
    """The policy that a text means. Raises :class:`InvalidArgument` with a line for each problem;
    ``path`` is what they are said of."""
    top = read_document(text, path or "policy", _KEYS, "a policy")
    _refuse_unknown(top)
    version = top.one("version", int, "version = 1")
    if version not in (None, 1):
        top.wrong("version", f"version = {shown(version)} is not known; this reads version = 1")
    guards = top.table("guards", "[guards]")
    read_guards = Guards() if guards is None else _guards(guards)
    tables = top.tables("rule", "[[rule]]", RULES_MOST)
    rules = [_rule(table, number) for number, table in enumerate(tables, 1)]
    _check_rules(tables, rules)
    regions = _cxl_regions(top.tables("cxl", "[[cxl]]", LIST_MOST))
    top.problems.raise_if_any()
    return Policy(
        rules=tuple(rule for rule, _ in rules),
        cxl=regions,
        guards=read_guards,
        path=path,
    )


def _refuse_unknown(table: Table) -> None:
    """Problems for keys that are not known, and for those that are not there yet."""
    for key in list(table.unknown()):
        if key in _LATER and table.word != "match":
            table.wrong(key, f"{key} is not there yet; it comes with {_LATER[key]}")
        else:
            table.refuse_key(key, _WRITTEN_IN.get((table.word, key)))


def _guards(table: Table) -> Guards:
    _refuse_unknown(table)
    protect: tuple[str, ...] | None = ()
    if table.values.get("protect") != []:
        protect = table.several("protect", _glob, 'globs, such as ["db-*"]')
    share = Guards().dram_share
    text = table.one("dram_share", str, '"90%"')
    if text is not None:
        percent = _percent(text)
        if percent is None or percent > 1:
            hint = 'a share of the DRAM is written "90%", from "0%" to "100%"'
            table.wrong("dram_share", f"dram_share = {shown(text)}: {hint}")
        else:
            share = percent
    return Guards(
        keep_signatures=table.flag("keep_signatures", True),
        keep_if_mounted=table.flag("keep_if_mounted", True),
        protect=protect or (),
        dram_share=share,
    )


# --- rules ---------------------------------------------------------------------------------------


def _rule(table: Table, number: int) -> tuple[Rule, bool]:
    """A rule, and whether its match is what the file says: with problems, neither is used."""
    _refuse_unknown(table)
    name = table.name("name", _NAME_SIZE_MOST) or f"rule {number}"
    before = len(table.problems)
    match = table.table("match", "match")
    matched = Match() if match is None else _match(match)
    is_sound = len(table.problems) == before
    reason = table.text("override_nature", "the reason why the nature is overridden")
    if reason is not None and len(reason) > _TEXT_SIZE_MOST:
        text = f"override_nature has {len(reason)} characters; {_TEXT_SIZE_MOST} are the most"
        table.wrong("override_nature", text)
    shares = _shares_of(table)
    rule = Rule(name=name, match=matched, shares=shares, override_nature=reason, line=table.line)
    return rule, is_sound


def _shares_of(table: Table) -> tuple[Share, ...]:
    """What a rule wants, whole region or shares; empty where something is wrong with it."""
    if "want" in table and "share" in table:
        text = "a rule has want, for the whole region, or [[rule.share]], and not both"
        table.wrong("share", text)
        return ()
    if "want" in table:
        want = table.table("want", "want")
        share = None if want is None else _share(want)
        return () if share is None else (share,)
    tables = table.tables("share", "[[rule.share]]", LIST_MOST)
    if not tables and table.values.get("share", []) == []:
        text = 'the rule wants nothing; give it want = { personality = "…" } or [[rule.share]]'
        table.wrong(None, text)
    shares = [_share(each) for each in tables]
    _check_shares(tables, shares)
    return tuple(each for each in shares if each is not None)


def _match(table: Table) -> Match:
    _refuse_unknown(table)
    least, most = _size_range(table)
    return Match(
        nature=table.choice("nature", ("storage", "memory")),
        type=table.choice("type", ("pmem", "volatile")),
        size_least=least,
        size_most=most,
        node=table.several("node", _node, "a node number or a list of them"),
        dimm=table.several("dimm", _glob, 'dimm ids or globs, such as "8680-*"'),
        serial=table.several("serial", _serial, 'serial numbers: 4660 or "0x1234"'),
        name=table.several("name", _glob, 'region names or globs, such as "region*"'),
        persistence=table.several("persistence", _domain, _either(_DOMAINS)),
        tier=table.several("tier", _glob, "names of memory tiers or globs"),
    )


def _size_range(table: Table) -> tuple[int | None, int | None]:
    """The least and the most of ``">=100G"``, ``"<=1T"``, ``"64G..1T"`` or ``"128G"``."""
    hint = '">=100G", "<=1T", "64G..1T" or "128G"'
    if type(table.values.get("size")) is int:
        exactly = table.size("size")
        return exactly, exactly
    text = table.one("size", str, hint)
    if text is None:
        return None, None
    wrong = f"is no range of sizes; write {hint}"
    if text.startswith((">=", "<=")):
        bound = table.size_of("size", text[2:], wrong)
        return (bound, None) if text.startswith(">") else (None, bound)
    if ".." not in text:
        exactly = table.size_of("size", text, wrong)
        return exactly, exactly
    first, _, last = text.partition("..")
    least = table.size_of("size", first, wrong)
    most = None if least is None else table.size_of("size", last, wrong)
    if least is not None and most is not None and least > most:
        table.wrong("size", f"size = {shown(text)} matches nothing: it ends before it begins")
    return least, most


def _check_rules(tables: list[Table], rules: list[tuple[Rule, bool]]) -> None:
    """Rules that no region ever reaches, and names that two of them have."""
    names: dict[str, int] = {}
    matches: dict[tuple[Any, ...], int] = {}
    for table, (rule, is_sound) in zip(tables, rules, strict=True):
        _require_new(table, "name", rule.name, names, "rule")
        key = _match_key(rule.match)
        everything = matches.get(_match_key(Match()))
        if everything is not None:
            text = f"the rule is never reached: the one in line {everything} matches every region"
            table.wrong(None, f"{text}; put that one last, or give it match = {{…}}")
            break
        if is_sound and key in matches:
            text = f"the rule is never reached: the one in line {matches[key]} has the same match"
            table.wrong("match", text)
        elif is_sound:
            matches[key] = table.line


def _match_key(match: Match) -> tuple[Any, ...]:
    """The same for matches that differ in the order of their globs and numbers only."""
    values = (getattr(match, name) for name in Match.__slots__)
    return tuple(frozenset(each) if isinstance(each, tuple) else each for each in values)


# --- shares and what they want -------------------------------------------------------------------


def _share(table: Table) -> Share | None:
    """A ``[[rule.share]]``, or a ``want``, which is a share of the whole."""
    before = len(table.problems)
    _refuse_unknown(table)
    name = table.name("name", _NAME_SIZE_MOST)
    size = _share_size(table) if table.word != "want" else None
    want = _want(table)
    if want is None or len(table.problems) > before:
        return None
    return Share(want=want, size=size, name=name, line=table.line)


def _share_size(table: Table) -> int | Fraction | None:
    """Bytes, a part of the region, or ``None`` for the rest."""
    hint = '"60%", "16G" or "rest"'
    value = table.values.get("size")
    if not isinstance(value, str):
        return table.size("size", hint)
    if value == "rest":
        return None
    if "%" not in value:
        return table.size_of("size", value)
    percent = _percent(value)
    if percent is None or not 0 < percent <= 1:
        text = 'a part of a region is written "60%", more than "0%" and at most "100%"'
        table.wrong("size", f"size = {shown(value)}: {text}")
        return None
    return percent


def _check_shares(tables: list[Table], shares: list[Share | None]) -> None:
    """What the shares of one rule must not do to each other."""
    total = Fraction(0)
    rest: Table | None = None
    names: dict[str, int] = {}
    mounts: dict[str, int] = {}
    for table, share in zip(tables, shares, strict=True):
        if share is None:
            continue
        if isinstance(share.size, Fraction):
            total += share.size
            if total > 1 >= total - share.size:
                text = f"size = {shown(table.values['size'])} makes {_of(total)} of the region"
                table.wrong("size", f"{text}; shares are at most 100% together")
        elif share.size is None and rest is not None:
            table.wrong("size", f"the rest is taken by the share in line {rest.line}; give a size")
        elif share.size is None:
            rest = table
        _require_new(table, "name", share.name, names, "share")
        _require_new(table, "mount", share.want.mount, mounts, "share")
    if rest is not None and total == 1:
        rest.wrong("size", "the rest is nothing: the other shares are 100% of the region")


def _require_new(
    table: Table, key: str, value: str | None, seen: dict[str, int], thing: str
) -> None:
    """What two things must not have in common."""
    if value in seen:
        table.wrong(key, f"{key} = {shown(value)} is that of the {thing} in line {seen[value]}")
    elif value is not None:
        seen[value] = table.line


def _want(table: Table) -> Want | None:
    before = len(table.problems)
    sector_size = _one_of(table, "sector_size", btt.SECTOR_SIZES, str)
    align = _one_of(table, "align", ALIGNMENTS, _short)
    map_ = table.choice("map", ("mem", "dev"))
    filesystem = table.choice("filesystem", ("ext4", "xfs"))
    if table.values.get("online") is False:
        table.wrong("online", 'online = false: write online = "no"')
        online = None
    else:
        online = table.choice("online", ("movable", "kernel", "no"))
    mount, options = _mount(table)
    personality = table.choice("personality", _PERSONALITIES)
    mode: Any = table.choice("mode", tuple(_MODES))
    if (personality is None and "personality" in table) or (mode is None and "mode" in table):
        return None
    if personality is None and mode is None:
        text = 'nothing says what it is to be; write personality = "storage", "dax" or "memory"'
        if "want" not in table:
            table.wrong(None, text)
        return None
    mode = mode or _DEFAULT_MODES[personality]
    _check_want(table, personality, mode)
    if len(table.problems) > before:
        return None
    if mode == "system-ram" and online is None:
        online = "movable"
    return Want(
        personality=personality or _MODES[mode],
        mode=mode,
        sector_size=sector_size,
        map=map_,
        align=align,
        online=online,
        filesystem=filesystem,
        mount=mount,
        mount_options=options,
    )


def _check_want(table: Table, personality: str | None, mode: str) -> None:
    """Keys of a want that do not fit each other."""
    if personality not in (None, _MODES[mode]):
        fitting = ", ".join(each for each, owner in _MODES.items() if owner == personality)
        text = f"mode = {shown(mode)} is of personality {_MODES[mode]}"
        table.wrong("mode", f"{text}; {personality} has {fitting}")
        return
    for key, modes in _MODES_OF.items():
        if key in table and mode not in modes:
            text = f"{key} = {shown(table.values[key])} is for mode {_either(modes)}"
            table.wrong(key, f"{text}, and this is {mode}")


def _mount(table: Table) -> tuple[str | None, str | None]:
    """Mount point and options."""
    mount = table.text("mount", 'a directory, such as "/srv/db"')
    options = table.text("mount_options", 'options of mount, such as "noatime"')
    if mount is not None:
        plain = os.path.normpath(mount)
        if not mount.startswith("/"):
            table.wrong("mount", f"mount = {shown(mount)} is not absolute; write it from / on")
        elif ".." in mount.split("/"):
            table.wrong("mount", f"mount = {shown(mount)} goes upwards; write where it ends")
        elif plain.strip("/") == "":
            table.wrong("mount", 'mount = "/" is where the system is; write another directory')
        elif len(mount.encode()) > _TEXT_SIZE_MOST:
            table.wrong("mount", f"mount = {shown(mount)} is longer than {_TEXT_SIZE_MOST} bytes")
        elif "filesystem" not in table:
            text = f"mount = {shown(mount)} needs something to mount"
            table.wrong("mount", f'{text}; write filesystem = "ext4" or "xfs"')
        mount = "/" + plain.strip("/")
    if options is not None and "mount" not in table:
        table.wrong("mount_options", "mount_options need a mount")
    elif options is not None and (" " in options or len(options) > _TEXT_SIZE_MOST):
        text = f"mount_options = {shown(options)} are no options of mount"
        table.wrong("mount_options", f'{text}; write them as "noatime,discard"')
    return mount, options


# --- CXL regions ---------------------------------------------------------------------------------


def _cxl_regions(tables: list[Table]) -> tuple[CxlWant, ...]:
    names: dict[str, int] = {}
    found = []
    for table in tables:
        region = _cxl(table)
        if region is not None:
            _require_new(table, "name", region.name, names, "[[cxl]]")
            found.append(region)
    return tuple(found)


def _cxl(table: Table) -> CxlWant | None:
    before = len(table.problems)
    _refuse_unknown(table)
    missing = [key for key in ("name", "type", "members") if key not in table]
    if missing:
        table.wrong(None, f"[[cxl]] has a name, a type and members; {', '.join(missing)} missing")
    name = table.name("name", _NAME_SIZE_MOST)
    type_ = table.choice("type", ("ram", "pmem"))
    members: tuple[str, ...] | None = ("*",)
    if table.values.get("members") != "all":
        members = table.several("members", _member, '"all", "mem*", or serial numbers')
    ways = _one_of(table, "ways", _WAYS, str)
    granularity = _one_of(table, "granularity", _GRANULARITIES, _short)
    decoder = table.text("decoder", '"decoder0.0"')
    if decoder is not None and not _DECODER.fullmatch(decoder):
        table.wrong("decoder", f"decoder = {shown(decoder)} is no root decoder; write decoder0.0")
    size = table.size("size")
    if len(table.problems) > before or name is None or members is None:
        return None
    _check_members(table, members, ways)
    unit = _CXL_UNIT * (ways or 1)
    if size is not None and size % unit:
        text = f"size = {format_size(size)} is no multiple of {format_size(unit)}"
        table.wrong("size", f"{text}, 256 MiB for each of {ways or 1} ways")
    return CxlWant(
        name=name,
        type=type_,
        members=members,
        ways=ways,
        granularity=granularity,
        decoder=decoder,
        size=size,
        line=table.line,
    )


def _check_members(table: Table, members: tuple[str, ...], ways: int | None) -> None:
    twice = next((each for each in members if members.count(each) > 1), None)
    if twice is not None:
        table.wrong("members", f"members have {twice} twice; each takes one position")
    exact = not any(_GLOB_MARKS & set(each) for each in members)
    if exact and ways is not None and ways > len(members):
        text = f"ways = {ways} need as many members, and there are {len(members)}"
        table.wrong("ways", text)


# --- values --------------------------------------------------------------------------------------


def _one_of(
    table: Table, key: str, choices: tuple[int, ...], written: Callable[[int], str]
) -> int | None:
    """One of some sizes or counts, as a number or as people write it."""
    value: Any = table.values.get(key)
    hint = ", ".join(written(each) for each in choices)
    if type(value) is not int:
        value = table.one(key, str, hint)
    if value is None:
        return None
    try:
        size = parse_size(value) if isinstance(value, str) else int(value)
    except InvalidArgument:
        size = 0
    if size in choices:
        return size
    table.wrong(key, f"{key} = {shown(value)} is none of {hint}")
    return None


def _short(size: int) -> str:
    """A power of two as it is written: 4K, 2M."""
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if size >= 1 << shift:
            return f"{size >> shift}{unit}"
    return str(size)


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _of(part: Fraction) -> str:
    return f"{float(part * 100):g}%"


def _percent(text: str) -> Fraction | None:
    match = _PERCENT.fullmatch(text.strip())
    return None if match is None else Fraction(match[1]) / 100


def _glob(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("is no text")
    if not value.strip() or not value.isprintable():
        raise ValueError("is empty or has characters that cannot be printed")
    if len(value) > _TEXT_SIZE_MOST:
        raise ValueError(f"is longer than {_TEXT_SIZE_MOST} characters")
    return value


def _node(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _NODE_MOST:
        raise ValueError(f"is no node from 0 to {_NODE_MOST}")
    return value


def _serial(value: Any) -> int:
    if isinstance(value, str) and _HEX.fullmatch(value):
        value = int(value, 16)
    if type(value) is not int or not 0 <= value <= _SERIAL_MOST:
        raise ValueError("is no serial number")
    return value


def _domain(value: Any) -> str:
    if value not in _DOMAINS or not isinstance(value, str):
        raise ValueError("is no persistence domain")
    return value


def _member(value: Any) -> str:
    """A glob of names, or a serial number in the one form that the planner compares."""
    if type(value) is int or (isinstance(value, str) and _HEX.fullmatch(value)):
        return hex(_serial(value))
    return _glob(value)
