"""The recording medium from Python, and its crash images against a brute-force machine."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmemkit.errors import InvalidArgument, NotSupported, OutOfRange
from pmemkit.testing import Recording


def words(image, offsets):
    return tuple(int.from_bytes(image[at : at + 8], "little") for at in offsets)


def states(recording, offsets, event=None, **options):
    event = recording.event_count() if event is None else event
    images = recording.crash_images(event, limit=1 << 20, **options)
    assert len(set(images)) == len(images), "images are not distinct"
    return {words(image, offsets) for image in images}


def test_what_is_logged():
    recording = Recording(8192)
    medium = recording.medium()
    assert (len(medium), medium.granularity) == (8192, "cacheline")
    medium.write(10, b"x" * 100)
    medium.write(0, b"y" * 320)
    medium.write(0, b"y" * 320, how="cached")
    medium.store_u64(8, 1)
    medium.flush(8, 8)
    medium.fence()
    assert recording.mark(7) == recording.event_count() - 1
    medium.persist(0, 64)
    medium.sync()
    medium.punch(4096, 4096)
    assert recording.events() == [
        ("store", 10, 100),
        ("flush", 10, 100),
        ("store_nt", 0, 320),
        ("store", 0, 320),
        ("store", 8, 8),
        ("flush", 8, 8),
        ("fence", 0, 0),
        ("mark", 7, 0),
        ("persist", 0, 64),
        ("sync", 0, 0),
        ("punch", 4096, 4096),
    ]
    assert medium.stats() == {"bytes_stored": 748, "flushes": 2, "fences": 1, "syncs": 2}


def test_images_of_a_line_that_was_not_flushed():
    recording = Recording(128, initial=b"\1" * 64)
    medium = recording.medium()
    medium.store_u64(0, 5)
    medium.store_u64(64, 6)
    old = int.from_bytes(b"\1" * 8, "little")
    assert states(recording, [0, 64]) == {(old, 0), (5, 0), (old, 6), (5, 6)}
    assert recording.crash_count(2) == 4
    assert states(recording, [0, 64], only=[(60, 2)]) == {(old, 0), (5, 0)}
    medium.flush(0, 128)
    assert len(states(recording, [0, 64])) == 4
    medium.fence()
    assert states(recording, [0, 64]) == {(5, 6)}
    assert recording.crash_count(recording.event_count()) == 1


def test_images_of_the_past_are_still_there():
    recording = Recording(64)
    medium = recording.medium()
    for value in (1, 2, 3):
        medium.store_u64(0, value)
        medium.persist(0, 8)
    for event in (6, 0, 3, 5, 1):
        assert words(recording.durable_image(event), [0]) == (event // 2,)
        assert words(recording.visible_image(event), [0]) == ((event + 1) // 2,)


def test_a_limit_leaves_a_seeded_sample_with_both_extremes():
    recording = Recording(64 * 64)
    medium = recording.medium()
    for line in range(64):
        medium.store_u64(line * 64, line + 1)
    assert recording.crash_count(64) == 2**64 - 1
    images = recording.crash_images(64, limit=200, seed=3)
    assert len(images) == 200 == len(set(images))
    assert recording.durable_image(64) in images
    assert recording.visible_image(64) in images
    assert images == recording.crash_images(64, limit=200, seed=3)
    assert images != recording.crash_images(64, limit=200, seed=4)


def test_pages_and_torn_pages():
    recording = Recording(8192, granularity="page")
    medium = recording.medium()
    medium.store_u64(0, 1)
    medium.store_u64(512, 2)
    medium.flush(0, 8192)
    medium.fence()
    assert states(recording, [0, 512]) == {(0, 0), (1, 0), (1, 2)}
    assert states(recording, [0, 512], torn_pages=True) == {(0, 0), (1, 0), (0, 2), (1, 2)}
    medium.sync()
    assert states(recording, [0, 512], torn_pages=True) == {(1, 2)}


def test_bytes_are_durable_when_the_next_thing_happens():
    recording = Recording(64, granularity="byte")
    recording.medium().store_u64(0, 1)
    assert states(recording, [0]) == {(0,), (1,)}
    recording.mark(0)
    assert states(recording, [0]) == {(1,)}


def test_what_does_not_fit_is_refused():
    with pytest.raises(InvalidArgument, match='"line" is not byte, cacheline or page'):
        Recording(64, granularity="line")
    with pytest.raises(OutOfRange):
        Recording(64, initial=bytes(65))
    recording = Recording(64)
    medium = recording.medium()
    with pytest.raises(OutOfRange):
        medium.write(60, b"12345")
    with pytest.raises(InvalidArgument):
        medium.store_u64(4, 1)
    with pytest.raises(NotSupported):
        medium.resize(128)
    assert recording.event_count() == 0
    for ask in (recording.crash_images, recording.durable_image, recording.visible_image):
        with pytest.raises(OutOfRange):
            ask(1)


# --- an independent machine -----------------------------------------------------------------------

LINES = (0, 64)
WORDS = (0, 8, 64, 72)


class Machine:
    """Every state of a two-line cache over media, tried one by one.

    A state is what media hold and what was flushed but not fenced, a line each. Between any two
    steps any line may be written back. Word stores only, so nothing is torn.
    """

    def __init__(self):
        self.cache = dict.fromkeys(LINES, (0, 0))
        self.states = {(tuple(self.cache.values()), (None, None))}

    def store(self, offset, value):
        line, word = offset // 64 * 64, offset % 64 // 8
        held = list(self.cache[line])
        held[word] = value
        self.cache[line] = tuple(held)
        self.evict()

    def evict(self):
        for which in range(len(LINES)):
            more = set()
            for media, flushed in self.states:
                written = list(media)
                written[which] = self.cache[LINES[which]]
                # What was flushed earlier is older than what is there now.
                waiting = list(flushed)
                waiting[which] = None
                more.add((tuple(written), tuple(waiting)))
            self.states |= more

    def flush(self, offset):
        which = LINES.index(offset // 64 * 64)
        marked = set()
        for media, flushed in self.states:
            waiting = list(flushed)
            waiting[which] = self.cache[LINES[which]]
            marked.add((media, tuple(waiting)))
        self.states = marked
        self.evict()

    def fence(self):
        settled = set()
        for media, flushed in self.states:
            pairs = zip(media, flushed, strict=True)
            settled.add((tuple(new or old for old, new in pairs), (None, None)))
        self.states = settled

    def words(self):
        return {tuple(itertools.chain(*media)) for media, _ in self.states}


STEPS = st.one_of(
    st.tuples(st.just("store"), st.sampled_from(WORDS)),
    st.tuples(st.just("flush"), st.sampled_from(WORDS)),
    st.tuples(st.just("fence"), st.just(0)),
)


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(STEPS, max_size=14))
def test_the_model_agrees_with_a_machine_that_tries_everything(steps):
    recording = Recording(128)
    medium, machine = recording.medium(), Machine()
    for number, (step, offset) in enumerate(steps, 1):
        match step:
            case "store":
                medium.store_u64(offset, number)
                machine.store(offset, number)
            case "flush":
                medium.flush(offset, 8)
                machine.flush(offset)
            case "fence":
                medium.fence()
                machine.fence()
        assert states(recording, WORDS) == machine.words(), f"after {steps[:number]}"
