"""Lines of keys in TOML: everything that tomllib finds has the line where it stands."""

import tomllib
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmemkit.policy.positions import DEPTH_MOST, TooDeep, positions


def test_the_shapes_that_a_policy_has():
    text = """# [[rule]] in a comment
version = 1

[[rule]]
name = "first"
want.mode = "fsdax"
match = { node = [0, # ]
    1], "a.b" = '''
[rule]''', dimm = "# no comment" }

[[rule]]
  [[rule.share]]
  size = "60%"
  [[ rule . share ]]
  size = "rest"
  [rule.share.want]
  x.y.z = 2026-01-01 10:00:00 # a date with a blank

[guards]
"""
    assert positions(text) == {
        (): 1,
        ("version",): 2,
        ("rule",): 4,
        ("rule", 0): 4,
        ("rule", 0, "name"): 5,
        ("rule", 0, "want"): 6,
        ("rule", 0, "want", "mode"): 6,
        ("rule", 0, "match"): 7,
        ("rule", 0, "match", "node"): 7,
        ("rule", 0, "match", "node", 0): 7,
        ("rule", 0, "match", "node", 1): 8,
        ("rule", 0, "match", "a.b"): 8,
        ("rule", 0, "match", "dimm"): 9,
        ("rule", 1): 11,
        ("rule", 1, "share"): 12,
        ("rule", 1, "share", 0): 12,
        ("rule", 1, "share", 0, "size"): 13,
        ("rule", 1, "share", 1): 14,
        ("rule", 1, "share", 1, "size"): 15,
        ("rule", 1, "share", 1, "want"): 16,
        ("rule", 1, "share", 1, "want", "x"): 17,
        ("rule", 1, "share", 1, "want", "x", "y"): 17,
        ("rule", 1, "share", 1, "want", "x", "y", "z"): 17,
        ("guards",): 19,
    }


def test_a_table_that_is_opened_after_its_children_has_its_own_line():
    found = positions("[a.b]\nx = 1\n[a]\ny = 2\n")
    assert (found["a",], found["a", "b"], found["a", "y"]) == (3, 1, 4)


@pytest.mark.parametrize(
    "value",
    [
        '"""a""b"""',
        '"""a\n""""',
        '"""\n"""""',
        '"""\\""""""',
        "'''a''b'''",
        "''''''",
        "'''\n''''",
        '""',
        "''",
        '"\\\\"',
        '"\\""',
        "'\\'",
        '"#[]{},="',
        "[ [ ], [ '[' ], # [\n]",
        "{ }",
        "{ a = [\n{ b = 1 } ] }",
        "-1_000.5e+10",
        "1979-05-27T07:32:00-08:00",
        "nan",
    ],
)
def test_a_value_is_stepped_over_whole(value):
    text = f"before = {value}\nbehind = 1\n"
    assert set(tomllib.loads(text)) == {"before", "behind"}
    assert positions(text)["behind",] == text.count("\n")


def test_line_ends_of_windows_count_once():
    text = 'a = 1\r\nb = [\r\n  2]\r\nc = """\r\n"""\r\nd = 3\r\n'
    found = positions(text)
    assert (found["a",], found["b", 0], found["c",], found["d",]) == (1, 3, 4, 6)


def test_what_is_not_understood_ends_the_walk_and_leaves_what_came_before():
    assert positions("a = 1\n]\nb = 2\n") == {(): 1, ("a",): 1}
    assert positions('a = 1\n"\\q" = 2\n') == {(): 1, ("a",): 1}
    assert positions("") == {(): 1}


def test_the_deepest_text_is_walked_and_a_deeper_one_is_not():
    # Brackets within brackets, and parts of a key, each at their limit.
    lists = f"a = {'[' * DEPTH_MOST}{']' * DEPTH_MOST}"
    keys = ".".join("k" * DEPTH_MOST) + " = 1"
    for text in (lists, keys):
        tomllib.loads(text)
        assert len(positions(text)) == DEPTH_MOST + 1
    for text in (f"a = [{lists[4:]}]", f"k.{keys}", f"[x]\n{keys}"):
        with pytest.raises(TooDeep) as caught:
            positions(text)
        assert caught.value.line == text.count("\n") + 1


# --- against tomllib -----------------------------------------------------------------------------

_KEYS = st.sampled_from(
    ["a", "b2", "-", "7", '"a.b"', "'c d'", '"# ["', '"\']]"', "'\"'", '""', '"\\u0041"', '"="']
)
_BLANKS = st.sampled_from(["", " ", "\t "])
_BREAKS = st.sampled_from(["", " ", "\n", " # ] } \" '''\n", "\r\n  "])


@st.composite
def _scalar(draw, token: str) -> str:
    """A value that has the token on the line where it begins."""
    return draw(
        st.sampled_from(
            [
                token,
                f"+{token}",
                f"{token}.5e1",
                f'"{token} # ]\\" = ["',
                f"'{token} \\'",
                f'"""{token}\n[x]\ny = 1 ""\n\\"""" '.strip(),
                f"'''{token}\n# '' }}\n]'''",
                f'"""{token}"""""',
                f"''''{token}'''",
            ]
        )
    )


class _Writer:
    """Documents in which every value has a number of its own, so that a search finds its line."""

    def __init__(self, draw) -> None:
        self.draw = draw
        self.next = 1_000_000

    def value(self, depth: int) -> str:
        kind = self.draw(st.integers(0, 3 if depth else 1))
        if kind < 2:
            self.next += 1
            return self.draw(_scalar(str(self.next)))
        count = self.draw(st.integers(0, 3))
        if kind == 2:
            parts = [self.draw(_BREAKS) + self.value(depth - 1) for _ in range(count)]
            comma = self.draw(st.sampled_from(["", ","])) if parts else ""
            return f"[{','.join(parts)}{comma}{self.draw(_BREAKS)}]"
        keys = self.draw(st.lists(_KEYS, min_size=count, max_size=count, unique=True))
        return "{ " + ", ".join(f"{key} = {self.value(depth - 1)}" for key in keys) + " }"

    def key(self) -> str:
        dot = f"{self.draw(_BLANKS)}.{self.draw(_BLANKS)}"
        return dot.join(self.draw(st.lists(_KEYS, min_size=1, max_size=3)))

    def statement(self) -> str:
        kind = self.draw(st.integers(0, 5))
        if kind == 0:
            return f"[{self.draw(_BLANKS)}{self.key()} ]  # [no]\n"
        if kind == 1:
            return f"[[{self.key()}{self.draw(_BLANKS)}]]\n"
        if kind == 2:
            return "\n  # key = [[\n"
        return f"{self.draw(_BLANKS)}{self.key()} = {self.value(2)} # ' \n"


@st.composite
def _documents(draw) -> str:
    """Valid TOML: of the statements that are drawn, those that tomllib lets follow one another."""
    writer, text = _Writer(draw), ""
    for _ in range(draw(st.integers(1, 12))):
        longer = text + writer.statement()
        with suppress(tomllib.TOMLDecodeError):
            tomllib.loads(longer)
            text = longer
    return text


def _all_places(value, place=()):
    yield place, value
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _all_places(each, (*place, key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _all_places(each, (*place, index))


def _token(value) -> str:
    if isinstance(value, float):
        value = value / 10
    return "".join(letter for letter in str(value) if letter.isdigit())[:7]


@settings(max_examples=400, deadline=None)
@given(_documents())
def test_everything_that_tomllib_finds_has_its_line(text):
    found = positions(text)
    places = dict(_all_places(tomllib.loads(text)))
    assert set(found) == set(places)
    for place, value in places.items():
        if not isinstance(value, (dict, list)):
            token = _token(value)
            assert text.count(token) == 1
            assert found[place] == text.count("\n", 0, text.index(token)) + 1, place


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet="[]{}=\"'.,#\n\\ab1 \r\t", max_size=80))
def test_any_text_can_be_walked(text):
    with suppress(TooDeep):
        assert all(1 <= line <= text.count("\n") + 1 for line in positions(text).values())
