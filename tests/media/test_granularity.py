"""Which granularity holds, decided on a machine that is made up."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from pmemkit.errors import InvalidArgument, NotSupported
from pmemkit.media.granularity import GRANULARITIES, decide
from pmemkit.media.platform import LinuxPlatform

ADR = {"region0": "cpu_cache", "region1": "memory_controller"}
EADR = {"region0": "cpu_cache", "region1": "cpu_cache"}


@dataclass
class FakePlatform:
    """A machine that grants what it is told to."""

    granted: bool = True
    domains: Mapping[str, str] = field(default_factory=dict)
    probes: int = 0

    def map_sync_granted(self, fd: int) -> bool:
        self.probes += 1
        return self.granted

    def persistence_domains(self) -> Mapping[str, str]:
        return self.domains

    def volatile_because(self, fd: int) -> str | None:
        return None

    def persistence_domain_of(self, fd: int) -> str | None:
        return None


def decide_for(platform, *, backing="file", fd=3, environment=None, **options):
    return decide(backing, fd, platform, environment=environment or {}, **options)


@pytest.mark.parametrize(
    ("granted", "domains", "expected"),
    [
        (False, {}, "page"),
        (False, EADR, "page"),
        (True, {}, "cacheline"),
        (True, ADR, "cacheline"),
        (True, {"region0": ""}, "cacheline"),
        (True, {"region0": "memory_controller"}, "cacheline"),
        (True, {"region0": "cpu_cache"}, "byte"),
        (True, EADR, "byte"),
    ],
)
def test_the_rules_of_libpmem2(granted, domains, expected):
    decision = decide_for(FakePlatform(granted, domains))
    assert (decision.granularity, decision.found) == (expected, expected)
    assert decision.map_sync == granted
    assert decision.why


@pytest.mark.parametrize("backing", ["file", "block device", "device dax", "memfd", "hugetlb"])
def test_everything_with_a_descriptor_is_asked_for_map_sync(backing):
    platform = FakePlatform(granted=False)
    assert decide_for(platform, backing=backing).granularity == "page"
    assert platform.probes == 1


def test_anonymous_memory_is_byte_whatever_the_environment_says():
    environment = {"PMEMKIT_GRANULARITY": "page", "PMEM2_FORCE_GRANULARITY": "PAGE"}
    platform = FakePlatform(granted=False)
    decision = decide_for(platform, backing="anonymous", fd=None, environment=environment)
    assert decision.granularity == "byte"
    assert not decision.map_sync
    assert platform.probes == 0


def test_anonymous_memory_refuses_another_granularity():
    platform = FakePlatform()
    assert decide_for(platform, backing="anonymous", fd=None, override="byte")
    with pytest.raises(NotSupported, match="always byte, not page"):
        decide_for(platform, backing="anonymous", fd=None, override="page")


@pytest.mark.parametrize(
    ("option", "environment", "expected"),
    [
        (None, {"PMEM2_FORCE_GRANULARITY": "BYTE"}, "byte"),
        (None, {"PMEM2_FORCE_GRANULARITY": "CACHE_LINE"}, "cacheline"),
        (None, {"PMEM2_FORCE_GRANULARITY": "cache_line"}, "cacheline"),
        (None, {"PMEM2_FORCE_GRANULARITY": "PAGE"}, "page"),
        (None, {"PMEMKIT_GRANULARITY": "byte", "PMEM2_FORCE_GRANULARITY": "CACHE_LINE"}, "byte"),
        ("cacheline", {"PMEMKIT_GRANULARITY": "byte"}, "cacheline"),
        ("page", {"PMEM2_FORCE_GRANULARITY": "BYTE"}, "page"),
        (None, {"PMEMKIT_GRANULARITY": ""}, "page"),
    ],
)
def test_the_option_beats_our_variable_which_beats_that_of_libpmem2(option, environment, expected):
    decision = decide_for(FakePlatform(granted=False), override=option, environment=environment)
    assert decision.granularity == expected
    assert decision.found == "page"
    assert not decision.map_sync


def test_an_override_says_who_and_what_it_risks():
    environment = {"PMEMKIT_GRANULARITY": "byte"}
    why = decide_for(FakePlatform(granted=False), environment=environment).why
    assert any("PMEMKIT_GRANULARITY says byte" in sentence for sentence in why)
    assert any("offers page" in sentence for sentence in why)
    assert any("loses what was acknowledged" in sentence for sentence in why)
    coarser = decide_for(FakePlatform(), override="page").why
    assert not any("loses" in sentence for sentence in coarser)


def test_a_coarser_override_does_not_use_map_sync():
    assert not decide_for(FakePlatform(), override="page").map_sync
    assert decide_for(FakePlatform(), override="cacheline").map_sync


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"override": "line"}, "'line' is not a granularity"),
        ({"override": ""}, "'' is not a granularity"),
        ({"environment": {"PMEMKIT_GRANULARITY": "PAGE"}}, "PMEMKIT_GRANULARITY: 'PAGE' is not"),
        ({"environment": {"PMEM2_FORCE_GRANULARITY": "x"}}, "PMEM2_FORCE_GRANULARITY: 'x' is not"),
        ({"required": "fine"}, "'fine' is not a granularity"),
    ],
)
def test_a_word_that_is_none_is_refused(options, sentence):
    with pytest.raises(InvalidArgument, match=sentence):
        decide_for(FakePlatform(), **options)


@pytest.mark.parametrize("required", GRANULARITIES)
@pytest.mark.parametrize(
    ("platform", "found"),
    [
        (FakePlatform(granted=False), "page"),
        (FakePlatform(domains=ADR), "cacheline"),
        (FakePlatform(domains=EADR), "byte"),
    ],
)
def test_what_is_coarser_than_required_is_refused(required, platform, found):
    if GRANULARITIES.index(found) <= GRANULARITIES.index(required):
        assert decide_for(platform, required=required).granularity == found
        return
    with pytest.raises(NotSupported, match=f"{required} is required and {found} is"):
        decide_for(platform, required=required)


def test_an_override_counts_against_what_is_required():
    platform = FakePlatform(granted=False)
    assert decide_for(platform, override="byte", required="cacheline").granularity == "byte"
    with pytest.raises(NotSupported):
        decide_for(FakePlatform(), override="page", required="cacheline")


def test_the_reasons_name_the_region_that_stands_against_eadr():
    why = " ".join(decide_for(FakePlatform(domains=ADR)).why)
    assert "region1 says memory_controller" in why


# --- what the real platform reads -----------------------------------------------------------------


def sysfs_with(tmp_path, domains):
    devices = tmp_path / "sys" / "bus" / "nd" / "devices"
    for name, domain in domains.items():
        (devices / name).mkdir(parents=True)
        if domain is not None:
            (devices / name / "persistence_domain").write_text(f"{domain}\n")
    return LinuxPlatform(tmp_path / "sys")


def test_persistence_domains_are_those_of_the_regions_only(tmp_path):
    platform = sysfs_with(
        tmp_path,
        {
            "region0": "cpu_cache",
            "region10": "memory_controller",
            "namespace0.0": "x",
            "nmem0": "x",
        },
    )
    expected = {"region0": "cpu_cache", "region10": "memory_controller"}
    assert platform.persistence_domains() == expected


def test_a_region_that_does_not_say_is_no_eadr(tmp_path):
    platform = sysfs_with(tmp_path, {"region0": "cpu_cache", "region1": None})
    assert platform.persistence_domains() == {"region0": "cpu_cache", "region1": ""}


def test_a_machine_without_regions_has_no_domains(tmp_path):
    assert LinuxPlatform(tmp_path / "nothing").persistence_domains() == {}


def mountinfo(tmp_path, fd, file_system):
    proc = tmp_path / "proc" / "self"
    (proc / "fdinfo").mkdir(parents=True)
    (proc / "fdinfo" / str(fd)).write_text("pos:\t0\nflags:\t0100002\nmnt_id:\t31\nino:\t5\n")
    (proc / "mountinfo").write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"31 22 0:26 / /mnt rw shared:4 - {file_system} none rw\n"
    )
    return LinuxPlatform(tmp_path / "sys", tmp_path / "proc")


@pytest.mark.parametrize(
    ("file_system", "volatile"),
    [("tmpfs", True), ("ramfs", True), ("hugetlbfs", True), ("ext4", False), ("xfs", False)],
)
def test_file_systems_in_memory_are_volatile(tmp_path, file_system, volatile):
    with (tmp_path / "file").open("wb") as file:
        platform = mountinfo(tmp_path, file.fileno(), file_system)
        because = platform.volatile_because(file.fileno())
    assert (because is not None) == volatile
    if because is not None:
        assert file_system in because


def test_the_domain_of_a_file_is_that_of_the_region_under_its_disk(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        number = (tmp_path / "file").stat().st_dev
        major, minor = number >> 8 & 0xFFF, (number & 0xFF) | (number >> 12 & 0xFFF00)
        region = tmp_path / "sys" / "devices" / "ndbus0" / "region3"
        disk = region / "namespace3.0" / "block" / "pmem3"
        disk.mkdir(parents=True)
        links = tmp_path / "sys" / "dev" / "block"
        links.mkdir(parents=True)
        (links / f"{major}:{minor}").symlink_to(disk)
        platform = LinuxPlatform(tmp_path / "sys")
        assert platform.persistence_domain_of(file.fileno()) == "unknown"
        (region / "persistence_domain").write_text("memory_controller\n")
        assert platform.persistence_domain_of(file.fileno()) == "memory_controller"
        assert LinuxPlatform(tmp_path / "no").persistence_domain_of(file.fileno()) is None
