"""The policy of tiers alone: rooms, bounds, and that it comes to rest."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pmemkit.memory.tier_policy import Chunk, Move, plan

_CHUNKS = st.lists(
    st.builds(
        Chunk,
        address=st.integers(0, 1 << 40),
        size=st.integers(1, 64),
        score=st.floats(0, 1000),
        fast=st.booleans(),
        movable=st.booleans(),
    ),
    max_size=10,
    unique_by=lambda each: each.address,
)
_ROOM = st.integers(0, 200)


def carried_out(chunks: list[Chunk], moves: list[Move]) -> list[Chunk]:
    goals = {move.address: move.to_fast for move in moves}
    return [replace(each, fast=goals.get(each.address, each.fast)) for each in chunks]


@given(_CHUNKS, _ROOM, _ROOM, _ROOM, st.floats(0, 2))
def test_every_move_has_its_room_and_all_stay_within_the_budget(
    chunks, fast, slow, budget, hysteresis
):
    room = {"free_fast": fast, "free_slow": slow}
    moves = plan(chunks, **room, budget=budget, hysteresis=hysteresis)
    known = {each.address: each for each in chunks}
    assert len({move.address for move in moves}) == len(moves)
    for move in moves:
        chunk = known[move.address]
        assert chunk.movable
        assert chunk.fast != move.to_fast
        assert not move.to_fast or chunk.score > 0
        fast += chunk.size * (-1 if move.to_fast else 1)
        slow += chunk.size * (1 if move.to_fast else -1)
        assert min(fast, slow) >= 0
    assert sum(known[move.address].size for move in moves) <= budget
    assert not moves or moves[-1].to_fast


@given(_CHUNKS, _ROOM, _ROOM)
def test_what_is_used_in_the_fast_region_only_grows_hotter(chunks, fast, slow):
    moves = plan(chunks, free_fast=fast, free_slow=slow, budget=1 << 30)
    known = {each.address: each for each in chunks}
    victims: list[Chunk] = []
    for move in moves:
        if not move.to_fast:
            victims.append(known[move.address])
            continue
        assert all(each.heat < known[move.address].heat for each in victims)
        victims = []


@given(_CHUNKS, _ROOM, _ROOM)
def test_scores_that_stay_come_to_rest(chunks, fast, slow):
    for _ in range(len(chunks) ** 2 + 1):
        moves = plan(chunks, free_fast=fast, free_slow=slow, budget=1 << 30)
        if not moves:
            return
        sizes = {each.address: each.size for each in chunks}
        up = sum(sizes[m.address] * (1 if m.to_fast else -1) for m in moves)
        fast, slow, chunks = fast - up, slow + up, carried_out(chunks, moves)
    raise AssertionError("it moves for ever")


def test_the_hottest_take_the_place_of_the_coldest():
    chunks = [
        Chunk(1, 4, 1, fast=True),
        Chunk(2, 4, 9, fast=True),
        Chunk(3, 4, 8, fast=False),
        Chunk(4, 4, 2, fast=False),
    ]
    moves = plan(chunks, free_fast=0, free_slow=8, budget=64)
    assert moves == [Move(1, 4, to_fast=False), Move(3, 4, to_fast=True)]


def test_equals_and_the_nearly_equal_stay():
    chunks = [Chunk(1, 4, 10, fast=True), Chunk(2, 4, 14, fast=False)]
    assert plan(chunks, free_fast=0, free_slow=8, budget=64, hysteresis=0.5) == []
    assert len(plan(chunks, free_fast=0, free_slow=8, budget=64, hysteresis=0.2)) == 2


def test_what_may_not_move_stays():
    chunks = [Chunk(1, 4, 0, fast=True, movable=False), Chunk(2, 4, 9, fast=False)]
    assert plan(chunks, free_fast=0, free_slow=8, budget=64) == []
    pinned = [Chunk(1, 4, 0, fast=True), Chunk(2, 4, 9, fast=False, movable=False)]
    assert plan(pinned, free_fast=0, free_slow=8, budget=64) == []


def test_room_is_given_once():
    chunks = [Chunk(1, 4, 9, fast=False), Chunk(2, 4, 8, fast=False)]
    assert plan(chunks, free_fast=4, free_slow=0, budget=64) == [Move(1, 4, to_fast=True)]
