"""Policy files: what can be said, what is refused and how, and who may write them."""

import os
import re
import stat
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmemkit.errors import InvalidArgument, PmemError, SystemFailure
from pmemkit.policy.document import TEXT_SIZE_MOST
from pmemkit.policy.model import (
    CxlWant,
    Guards,
    Match,
    Policy,
    Rule,
    Share,
    Want,
    as_plain,
)
from pmemkit.policy.schema import RULES_MOST, load_policy, parse_policy

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples" / "policies").glob("*.toml"))
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
RAW = "want = { mode = 'raw' }\n"


def _wrong_policies() -> list:
    text = Path(__file__).with_name("wrong_policies.txt").read_text(encoding="utf-8")
    found = []
    for block in text.split("=== ")[1:]:
        title, _, rest = block.partition("\n")
        policy, _, message = rest.partition("---\n")
        found.append(pytest.param(policy, message.splitlines(), id=title))
    return found


def message_of(text: str, path: str | None = "p.toml") -> str:
    with pytest.raises(InvalidArgument) as caught:
        parse_policy(text, path)
    return caught.value.message


# --- wrong policies ------------------------------------------------------------------------------


def test_there_are_enough_wrong_policies():
    assert len({each.id for each in _wrong_policies()}) >= 100


@pytest.mark.parametrize(("text", "messages"), _wrong_policies())
def test_a_wrong_policy_is_told_what_is_wrong_with_it(text, messages):
    assert message_of(text).splitlines() == [f"p.toml:{each}" for each in messages]


def test_a_text_without_a_path_is_called_policy():
    assert message_of("version = 3", None).startswith("policy:1: version = 3 is not known")


def test_what_is_no_text():
    assert message_of("\ufeffversion = 1") == (
        "p.toml:1: starts with a byte order mark; save it as UTF-8 without one"
    )
    assert message_of("version = 1\n# \0\n") == "p.toml:2: a NUL byte: this is no text"
    assert message_of("#\n#\n# \ud800") == "p.toml:3: character '\\ud800' is no Unicode text"


def test_the_longest_text_is_read_and_a_longer_one_is_not():
    parse_policy("#" * TEXT_SIZE_MOST)
    assert message_of("#" * (TEXT_SIZE_MOST + 1)) == (
        "p.toml:1: is longer than 1048576 bytes; a policy never is"
    )


def test_a_number_of_thousands_of_digits():
    text = f"[[rule]]\n{RAW}\nmatch = {{ size = {'9' * 5000} }}\n"
    assert message_of(text) == "p.toml:4: is not read: a number of thousands of digits"


@pytest.mark.parametrize(
    "line",
    [
        ".".join("a" * 400) + " = 1",
        ".".join("a" * 500_000) + " = 1",
        "[" + ".".join("a" * 400) + "]",
        "a = " + "[" * 100_000,
        "a = " + "[" * 400 + "]" * 400,
        "a = " + "{a=" * 400 + "1" + "}" * 400,
        "a = " + "[{a=" * 400 + "1" + "}]" * 400,
    ],
    ids=["key", "long key", "header", "open lists", "lists", "tables", "both"],
)
def test_what_nests_too_deep_is_refused_before_it_costs_anything(line):
    message = message_of(f"version = 1\n{line}\n")
    assert message == "p.toml:2: more than 32 tables or lists lie within one another"


def test_the_most_rules_are_read_and_one_more_is_not():
    # On one line each, so that the text stays below its own limit.
    rules = "".join(f'[[rule]]\nmatch.name="r{n}"\n{RAW}' for n in range(RULES_MOST))
    assert len(parse_policy(rules).rules) == RULES_MOST
    line = rules.count("\n") + 1
    assert message_of(f"{rules}[[rule]]\n{RAW}") == (
        f"p.toml:{line}: 10001 [[rule]] are too many; 10000 are the most"
    )


def test_lists_end_somewhere():
    shares = "".join(f"[[rule.share]]\nmode = 'raw'\nsize = {n}\n" for n in range(1, 1025))
    assert len(parse_policy(f"[[rule]]\n{shares}").rules[0].shares) == 1024
    assert message_of(f"[[rule]]\n{shares}[[rule.share]]\nmode = 'raw'") == (
        "p.toml:3074: 1025 [[rule.share]] are too many; 1024 are the most"
    )
    dimms = ",".join(f"'nmem{n}'" for n in range(1025))
    assert message_of(f"[[rule]]\n{RAW}match.dimm = [{dimms}]") == (
        "p.toml:3: dimm has 1025 elements; 1024 are the most"
    )


def test_of_very_many_problems_the_first_hundred_are_told():
    lines = message_of("".join(f"k{n} = 1\n" for n in range(150))).splitlines()
    assert len(lines) == 101
    assert lines[0].startswith("p.toml:1: k0 is no key of a policy")
    assert lines[-1] == "p.toml: and 50 problems more"


def test_the_first_line_is_a_message_of_its_own():
    first = message_of("version = 2\ncolour = 1\n").splitlines()[0]
    assert first == "p.toml:1: version = 2 is not known; this reads version = 1"


@pytest.mark.parametrize("value", ["x" * 100_000, "\\u001b[2Jgone", "\\n" * 50, "\\u202eabc"])
def test_a_message_is_short_and_printable_whatever_the_value(value):
    for text in (
        f'[[rule]]\nmatch.nature = "{value}"\n{RAW}',
        f'[[rule]]\nmatch.serial = "{value}"\n{RAW}',
        f'[[rule]]\nmatch.size = "{value}"\n{RAW}',
        f'"{value}" = 1\n',
        f'[[rule]]\nname = "{value}"\nwant.mode = "{value}"\n',
    ):
        for line in message_of(text).splitlines():
            assert len(line) < 300
            assert line.isprintable()


# --- right policies ------------------------------------------------------------------------------


def test_an_empty_policy_wants_nothing_and_guards_everything():
    policy = parse_policy("", "p.toml")
    assert policy == Policy(path="p.toml")
    assert policy.guards == Guards(
        keep_signatures=True, keep_if_mounted=True, protect=(), dram_share=Fraction(9, 10)
    )


_EVERYTHING = """version = 1
[guards]
keep_signatures = false
keep_if_mounted = false
protect = ["db*", "2ab4*"]
dram_share = "87.5%"
[[rule]]
name = "all of it"
match = { nature = "storage", type = "pmem", size = "64G..1T", node = [0, 2], dimm = "8680-*", \
serial = [18, "0xFF"], name = ["region0", "region1"], persistence = "cpu_cache", tier = "*4" }
override_nature = "lent for a week"
[[rule.share]]
name = "fast"
size = "12.5%"
personality = "dax"
mode = "devdax"
map = "dev"
align = "1G"
[[rule.share]]
size = "16G"
mode = "sector"
sector_size = "4K"
filesystem = "ext4"
mount = "/srv//logs/"
mount_options = "noatime,discard"
[[rule.share]]
size = "rest"
mode = "system-ram"
online = "no"
[[cxl]]
name = "far"
type = "ram"
members = ["mem*", 0x10, "0x00AB"]
ways = 2
granularity = "4K"
decoder = "decoder0.0"
size = "1G"
"""
_MATCH = Match(
    nature="storage",
    type="pmem",
    size_least=64 * GIB,
    size_most=1024 * GIB,
    node=(0, 2),
    dimm=("8680-*",),
    serial=(18, 255),
    name=("region0", "region1"),
    persistence=("cpu_cache",),
    tier=("*4",),
)
_FAST = Want(personality="dax", mode="devdax", map="dev", align=GIB)
_LOGS = Want(
    personality="storage",
    mode="sector",
    sector_size=4096,
    filesystem="ext4",
    mount="/srv/logs",
    mount_options="noatime,discard",
)
_RAM = Want(personality="memory", mode="system-ram", online="no")
_MEANT = Policy(
    guards=Guards(
        keep_signatures=False,
        keep_if_mounted=False,
        protect=("db*", "2ab4*"),
        dram_share=Fraction(7, 8),
    ),
    rules=(
        Rule(
            name="all of it",
            match=_MATCH,
            shares=(
                Share(want=_FAST, size=Fraction(1, 8), name="fast", line=11),
                Share(want=_LOGS, size=16 * GIB, line=18),
                Share(want=_RAM, line=25),
            ),
            override_nature="lent for a week",
            line=7,
        ),
    ),
    cxl=(
        CxlWant(
            name="far",
            type="ram",
            members=("mem*", "0x10", "0xab"),
            ways=2,
            granularity=4096,
            decoder="decoder0.0",
            size=GIB,
            line=29,
        ),
    ),
)


def test_a_policy_that_says_everything():
    assert parse_policy(_EVERYTHING) == _MEANT


@pytest.mark.parametrize(
    ("want", "expected"),
    [
        ('personality = "storage"', Want(personality="storage", mode="sector")),
        ('personality = "dax"', Want(personality="dax", mode="fsdax")),
        (
            'personality = "memory"',
            Want(personality="memory", mode="system-ram", online="movable"),
        ),
        ('mode = "raw"', Want(personality="storage", mode="raw")),
        ('mode = "devdax"', Want(personality="dax", mode="devdax")),
        ('mode = "devdax", align = 4096', Want(personality="dax", mode="devdax", align=4096)),
        (
            'mode = "sector", sector_size = 4160',
            Want(personality="storage", mode="sector", sector_size=4160),
        ),
    ],
)
def test_what_a_want_leaves_open_has_defaults(want, expected):
    (rule,) = parse_policy(f"[[rule]]\nwant = {{ {want} }}\n").rules
    assert rule == Rule(
        name="rule 1", match=Match(), shares=(Share(want=expected, line=2),), line=1
    )


@pytest.mark.parametrize(
    ("size", "least", "most"),
    [
        ('">=100G"', 100 * GIB, None),
        ('"<= 1T"', None, 1024 * GIB),
        ('"1.5G..1.5G"', 3 * GIB // 2, 3 * GIB // 2),
        ('"64GiB .. 1TiB"', 64 * GIB, 1024 * GIB),
        ('"128G"', 128 * GIB, 128 * GIB),
        ("4096", 4096, 4096),
    ],
)
def test_sizes_that_a_region_may_have(size, least, most):
    (rule,) = parse_policy(f"[[rule]]\nmatch.size = {size}\n{RAW}").rules
    assert (rule.match.size_least, rule.match.size_most) == (least, most)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (["60%", "rest"], [Fraction(3, 5), None]),
        (["rest", "1G"], [None, GIB]),
        (["33.3%", "66.7%"], [Fraction(333, 1000), Fraction(667, 1000)]),
        (["100%"], [Fraction(1)]),
        (["100%", "1G"], [Fraction(1), GIB]),
        (["1G", "2G"], [GIB, 2 * GIB]),
    ],
)
def test_shares_of_a_region(sizes, expected):
    shares = "".join(f'[[rule.share]]\nsize = "{size}"\nmode = "raw"\n' for size in sizes)
    (rule,) = parse_policy(f"[[rule]]\n{shares}").rules
    assert [share.size for share in rule.shares] == expected


def test_a_name_of_63_bytes_is_not_too_long():
    name = "ä" * 31 + "x"
    (rule,) = parse_policy(f'[[rule]]\nname = "{name}"\n{RAW}').rules
    assert rule.name == name


def test_members_all_is_a_glob_of_all():
    (region,) = parse_policy('[[cxl]]\nname = "a"\ntype = "pmem"\nmembers = "all"').cxl
    assert region.members == ("*",)


def test_nothing_to_protect_may_be_said():
    assert parse_policy("guards.protect = []").guards.protect == ()


def test_two_rules_may_mount_in_one_place_because_one_region_may_be_there():
    rules = "".join(
        f'[[rule]]\nmatch.name = "region{n}"\n'
        'want = { mode = "fsdax", filesystem = "xfs", mount = "/srv" }\n'
        for n in range(2)
    )
    assert [each.shares[0].want.mount for each in parse_policy(rules).rules] == ["/srv", "/srv"]


# --- round trip ----------------------------------------------------------------------------------


def _toml(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value) if isinstance(value, int) else f'"{value}"'


def _written(policy: Policy) -> str:
    """A policy file that means this policy."""
    plain = as_plain(policy)
    lines = ["[guards]", *(f"{key} = {_toml(value)}" for key, value in plain["guards"].items())]
    for rule in plain.get("rules", []):
        lines += ["[[rule]]", f"name = {_toml(rule['name'])}"]
        if "override_nature" in rule:
            lines.append(f"override_nature = {_toml(rule['override_nature'])}")
        lines.append("[rule.match]")
        match = rule["match"]
        least, most = match.pop("size_least", None), match.pop("size_most", None)
        lines += [f"{key} = {_toml(value)}" for key, value in match.items()]
        if least and most:
            lines.append(f'size = "{least}..{most}"')
        elif least or most:
            lines.append(f'size = "{">=" if least else "<="}{least or most}"')
        for share in rule["shares"]:
            lines += ["[[rule.share]]", f"size = {_toml(share.get('size', 'rest'))}"]
            lines += [f"name = {_toml(share['name'])}"] if "name" in share else []
            lines += [f"{key} = {_toml(value)}" for key, value in share["want"].items()]
    for region in plain.get("cxl", []):
        lines.append("[[cxl]]")
        lines += [f"{key} = {_toml(value)}" for key, value in region.items() if key != "line"]
    return "\n".join(lines)


def _without_lines(policy: Policy):
    """What a policy says, wherever it stands in the file."""

    def strip(plain):
        if isinstance(plain, dict):
            return {k: strip(v) for k, v in plain.items() if k not in ("line", "path")}
        return [strip(each) for each in plain] if isinstance(plain, list) else plain

    return strip(as_plain(policy))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_read_and_reads_the_same_when_it_is_written_from_its_plain_form(path):
    policy = load_policy(path, trusted=True)
    assert policy.rules
    assert policy.path == str(path)
    again = parse_policy(_written(policy), str(path))
    assert _without_lines(again) == _without_lines(policy)


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


_WORDS = st.sampled_from(
    ["version", "guards", "rule", "cxl", "match", "want", "share", "size", "name", "mode"]
) | st.sampled_from(
    ["personality", "node", "serial", "members", "protect", "cache", "mount", "filesystem"]
)
_VALUES = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(),
        st.floats(),
        st.dates(),
        st.text(max_size=8),
        st.sampled_from(["60%", "rest", "raw", "memory", "16G", ">=1G", "all", "/srv", "xfs"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=4),
    max_leaves=12,
)


def _inline(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{key} = {_inline(each)}" for key, each in value.items())
        return f"{{ {pairs} }}"
    if isinstance(value, str):
        escaped = "".join(
            each if each.isalnum() or each in " %=>/" else f"\\U{ord(each):08x}" for each in value
        )
        return f'"{escaped}"'
    return str(value)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(_WORDS, _VALUES, max_size=5))
def test_whatever_a_file_says_is_a_policy_or_refused_line_by_line(document):
    text = "".join(f"{key} = {_inline(value)}\n" for key, value in document.items())
    try:
        policy = parse_policy(text, "p.toml")
    except InvalidArgument as error:
        for line in error.message.splitlines():
            number = re.match(r"p\.toml:(\d+): \S", line)
            assert number is not None
            assert 1 <= int(number[1]) <= text.count("\n") + 1
    else:
        assert all(rule.shares for rule in policy.rules)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200) | st.text(alphabet="[]{}=\"'.,#\n\\a1 ", max_size=200))
def test_any_text_is_a_policy_or_refused(text):
    try:
        parse_policy(text, "p.toml")
    except InvalidArgument as error:
        assert error.message.startswith("p.toml:")


# --- files, and who may write them ---------------------------------------------------------------


@pytest.fixture
def policy_file(tmp_path) -> Path:
    directory = tmp_path / "etc"
    directory.mkdir(mode=0o755)
    path = directory / "policy.toml"
    path.write_text(f"[[rule]]\n{RAW}")
    path.chmod(0o644)
    return path


def refused(path: Path, **options) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        load_policy(path, **options)
    return caught.value


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(PmemError, match=r"absent\.toml: No such file") as caught:
        load_policy(tmp_path / "absent.toml")
    assert isinstance(caught.value, SystemFailure)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert str(refused(tmp_path)) == f"{tmp_path}: is a directory; a policy is a regular file"
    assert "is a FIFO" in str(refused(tmp_path / "fifo"))
    assert "is a character device" in str(refused(Path("/dev/zero")))
    assert "is a directory" in str(refused(Path("/")))
    assert "NUL byte" in str(refused(Path("a\0b")))


def test_a_file_of_bytes_that_are_no_text(policy_file):
    policy_file.write_bytes(b"version = 1\n# \xff\n")
    assert str(refused(policy_file)) == f"{policy_file}:2: byte 0xff is no UTF-8"


def test_a_file_that_never_ends_is_not_read_to_its_end(policy_file):
    with policy_file.open("r+b") as file:
        file.truncate(1 << 40)
    text = f"{policy_file}:1: is longer than 1048576 bytes; a policy never is"
    assert str(refused(policy_file)) == text


def test_problems_in_a_file_begin_with_its_path(policy_file):
    policy_file.write_text("version = 2\n")
    assert str(refused(policy_file)).startswith(f"{policy_file}:1: version = 2")


def test_a_path_may_be_bytes_and_words_of_a_file_are_in_utf_8(policy_file):
    policy_file.write_text(f'[[rule]]\nname = "größer"\n{RAW}', encoding="utf-8")
    (rule,) = load_policy(os.fsencode(policy_file), trusted=True).rules
    assert rule.name == "größer"


@AS_ROOT
def test_a_file_that_only_root_can_write_is_read(policy_file):
    assert load_policy(policy_file).rules
    assert load_policy(policy_file, trusted=False).rules


@AS_ROOT
@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o777])
def test_a_file_that_others_can_write_is_refused(policy_file, mode):
    policy_file.chmod(mode)
    error = refused(policy_file)
    assert str(error) == (
        f"{policy_file}: others than root can write it, so root does not apply it: "
        f"{policy_file} has mode {mode:04o}: chmod go-w {policy_file}"
    )
    assert load_policy(policy_file, trusted=True).rules


@AS_ROOT
def test_a_file_of_someone_else_is_refused_even_if_it_is_read_only(policy_file):
    os.chown(policy_file, 1234, 0)
    policy_file.chmod(0o400)
    text = f"{policy_file} belongs to user 1234: chown root {policy_file}"
    assert text in str(refused(policy_file))
    assert load_policy(policy_file, trusted=True).rules


@AS_ROOT
def test_everything_to_be_put_right_is_said_at_once(policy_file):
    os.chown(policy_file, 1234, 0)
    policy_file.chmod(0o666)
    policy_file.parent.chmod(0o777)
    message = str(refused(policy_file))
    assert f"chown root {policy_file};" in message
    assert f"chmod go-w {policy_file};" in message
    assert message.endswith(f"has mode 0777: chmod go-w {policy_file.parent}")


@AS_ROOT
def test_a_directory_that_others_can_write_is_refused_unless_it_is_sticky(policy_file):
    policy_file.parent.chmod(0o777)
    assert f"chmod go-w {policy_file.parent}" in str(refused(policy_file))
    policy_file.parent.chmod(0o1777)
    assert load_policy(policy_file).rules


@AS_ROOT
def test_a_directory_of_someone_else_is_refused_sticky_or_not(policy_file):
    os.chown(policy_file.parent, 1234, 0)
    policy_file.parent.chmod(0o1755)
    assert f"{policy_file.parent} belongs to user 1234" in str(refused(policy_file))


@AS_ROOT
def test_of_a_link_the_target_is_what_is_looked_at(policy_file, tmp_path):
    link = tmp_path / "link.toml"
    link.symlink_to(policy_file)
    os.chown(link, 1234, 0, follow_symlinks=False)
    assert load_policy(link).rules
    policy_file.chmod(0o666)
    message = str(refused(link))
    assert message.startswith(f"{link}: others than root")
    assert f"chmod go-w {policy_file}" in message


@AS_ROOT
def test_a_file_that_is_exchanged_while_it_is_read_is_never_read_unchecked(policy_file):
    """A writable and a safe file take turns under one name; what is read is what was checked."""
    unsafe = policy_file.with_name("unsafe")
    safe = policy_file.with_name("safe")
    stop = threading.Event()

    def exchange() -> None:
        while not stop.is_set():
            for path, mode, name in ((unsafe, 0o666, "unsafe"), (safe, 0o644, "safe")):
                path.write_text(f'[[rule]]\nname = "{name}"\n{RAW}')
                path.chmod(mode)
                path.replace(policy_file)

    policy_file.write_text(f'[[rule]]\nname = "safe"\n{RAW}')
    thread = threading.Thread(target=exchange)
    thread.start()
    seen = set()
    try:
        for _ in range(300):
            try:
                seen.add(load_policy(policy_file).rules[0].name)
            except InvalidArgument:
                seen.add("refused")
    finally:
        stop.set()
        thread.join()
    assert "unsafe" not in seen
    assert stat.S_ISREG(policy_file.stat().st_mode)


def test_root_is_not_asked_for_where_nobody_is_root(policy_file, monkeypatch):
    policy_file.chmod(0o666)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert load_policy(policy_file).rules
    assert "chmod go-w" in str(refused(policy_file, trusted=False))
