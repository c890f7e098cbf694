"""What a region gets where nobody said: a cache, levelling; and why."""

import itertools
from typing import get_args

import pytest

import pmemkit
from pmemkit.bus.image import machine_of
from pmemkit.errors import InvalidArgument
from pmemkit.media.granularity import GRANULARITIES
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels
from pmemkit.storage.caching import CACHE_MODES
from pmemkit.storage.defaults import Client, Facts, choose, decide

MIB = 1 << 20
PIB = 1 << 50

EVERYTHING = [
    Facts(
        mode=mode,
        ordering=ordering,
        nature=nature,
        granularity=granularity,
        endurance=endurance,
        wears=wears,
        read_only=read_only,
        volatile_because=volatile,
    )
    for mode, ordering, nature, granularity, (endurance, wears), read_only, volatile in (
        itertools.product(
            ("raw", "sector", "fsdax"),
            ("default", "strict"),
            ("storage", "memory"),
            GRANULARITIES,
            ((None, False), (None, True), (20 * PIB, True)),
            (False, True),
            (None, "it is memory of this process"),
        )
    )
]


@pytest.mark.parametrize(
    ("facts", "client", "cache", "because"),
    [
        # NVDIMM-P and such: lines are written back, and nothing is between clients and media.
        (Facts(granularity="cacheline"), "nbd", "writeback", "taken for storage"),
        (Facts(granularity="cacheline", endurance=PIB), "nbd", "writeback", "wears"),
        (Facts(mode="sector", granularity="cacheline", wears=True), "nbd", "writeback", "wears"),
        # The same below a file system of this kernel.
        (Facts(granularity="cacheline", endurance=PIB), "mount", "off", "is above it"),
        # Files.
        (Facts(), "nbd", "off", "is below it"),
        (Facts(mode="sector"), "nbd", "off", "is below it"),
        (Facts(ordering="strict"), "nbd", "off", "is below it"),
        (Facts(mode="sector", ordering="strict"), "nbd", "writeback", "strict ordering"),
        # DRAM with a battery, also where the flash that it saves to reports wear.
        (Facts(granularity="byte"), "nbd", "off", "durable at once"),
        (Facts(granularity="byte", wears=True), "nbd", "off", "durable at once"),
        # Wears, and the caches of the processor survive a power failure.
        (Facts(granularity="byte", endurance=PIB, wears=True), "nbd", "writeback", "wears"),
        # Memory, unless somebody says that it wears.
        (Facts(nature="memory", granularity="cacheline"), "nbd", "off", "without end"),
        (
            Facts(nature="memory", granularity="cacheline", wears=True),
            "nbd",
            "writeback",
            "wears",
        ),
        (Facts(granularity="byte", volatile_because="a disk in RAM"), "nbd", "off", "a disk in"),
        (Facts(granularity="cacheline", read_only=True), "nbd", "off", "nothing is written"),
    ],
)
def test_by_nature_and_client(facts, client, cache, because):
    found = decide(facts, client)
    assert found.cache == cache
    assert because in found.because
    assert str(found).startswith(f"cache {cache}: {found.because}")
    assert ("; levelling " in str(found)) == (facts.mode == "sector")


def test_levelling_is_for_sectors_whose_media_wear():
    for facts, client in itertools.product(EVERYTHING, get_args(Client)):
        finite = facts.endurance is not None or (facts.wears and facts.granularity != "byte")
        expected = facts.mode == "sector" and finite and not facts.read_only
        found = decide(facts, client)
        assert found.levelling == ("least-worn" if expected else "off")
        assert (found.levelling_because is None) == (facts.mode != "sector")


def test_what_holds_whatever_else_does():
    chosen = set()
    for facts in EVERYTHING:
        nbd, mount = decide(facts, "nbd"), decide(facts, "mount")
        chosen.add(nbd.cache)
        assert mount.cache == "off"
        assert nbd.because and mount.because
        if facts.read_only:
            assert nbd.cache == "off"
        if facts.granularity == "byte" and facts.endurance is None:
            assert (nbd.cache, nbd.levelling) == ("off", "off")
        if nbd.cache != "off":
            assert facts.finite or (facts.nature == "storage" and facts.volatile_because is None)
    assert chosen == {"off", "writeback"}


# --- of regions -----------------------------------------------------------------------------------


def machine_file(path, **said):
    """A machine of one dimm with a namespace of mode sector."""
    with (path / "a.img").open("wb") as file:
        file.truncate((40 << 20) + (128 << 10))
    lines = ["[[dimm]]", 'path = "a.img"', "label_size = 131072"]
    lines += [f'{key} = "{value}"' for key, value in said.items()]
    (path / "vm.toml").write_text("\n".join(lines) + "\n")
    with open_images(machine_of([path / "vm.toml"])) as images:
        init_labels(images, 0, version=(1, 2))
        create(images, None, Wish(mode="sector"))
    return f"{path / 'vm.toml'}:namespace0.0"


@pytest.mark.parametrize(
    ("said", "granularity", "cache", "levelling"),
    [
        ({}, "cacheline", "writeback", "off"),
        ({"endurance": "20P"}, "cacheline", "writeback", "least-worn"),
        ({"nature": "memory"}, "cacheline", "off", "off"),
        ({"nature": "memory", "endurance": "20P"}, "byte", "writeback", "least-worn"),
        ({}, "byte", "off", "off"),
        ({"endurance": "20P"}, "page", "off", "least-worn"),
    ],
)
def test_of_a_machine_file(tmp_path, monkeypatch, said, granularity, cache, levelling):
    path = machine_file(tmp_path, **said)
    with pmemkit.open(path, granularity=granularity) as region:
        # Wherever the tests keep their files, be it in memory.
        monkeypatch.setattr(region.opened, "volatile_because", None)
        found = choose(region, "nbd")
        assert (found.cache, found.levelling, found.notes) == (cache, levelling, ())
        assert choose(region, "mount").cache == "off"
        for asked in CACHE_MODES:
            told = choose(region, "mount", asked).record()
            assert (told["cache"], told["cache_because"]) == (asked, "as asked for")
        told = choose(region, "mount", None, "random").record()
        assert (told["levelling"], told["levelling_because"]) == ("random", "as asked for")


def test_memory_and_what_is_only_read(tmp_path):
    with pmemkit.open("anonymous:1M") as region:
        assert "it is in RAM already" in choose(region, "nbd").because
    pmemkit.open(tmp_path / "a.img", create_size=MIB).close()
    with pmemkit.open(tmp_path / "a.img", read_only=True, granularity="cacheline") as region:
        assert choose(region, "nbd").because == "nothing is written to it"


def test_a_nature_that_cannot_be_found_out_is_storage(tmp_path, monkeypatch):
    def wrong(*_):
        raise InvalidArgument("machine.toml:3: nonsense")

    monkeypatch.setattr("pmemkit.bus.verdicts.verdict_at", wrong)
    with pmemkit.open(tmp_path / "a.img", create_size=MIB, granularity="cacheline") as region:
        monkeypatch.setattr(region.opened, "volatile_because", None)
        found = choose(region, "nbd")
    assert found.cache == "writeback"
    assert found.notes == ("its nature is not known: machine.toml:3: nonsense",)
