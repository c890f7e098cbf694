"""The planner, a decision at a time."""

from dataclasses import replace
from fractions import Fraction

import pytest

from pmemkit.policy.model import (
    VERBS,
    Content,
    CxlState,
    CxlWant,
    DaxState,
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
from pmemkit.policy.plan import plan

MIB, GIB = 1 << 20, 1 << 30
EXT4 = Content(kind="filesystem", name="ext4", label="home")


def want(mode, **more):
    personality = {"raw": "storage", "sector": "storage", "system-ram": "memory"}.get(mode, "dax")
    return Want(personality=personality, mode=mode, **more)


def rule(*shares, match=None, **more):
    made = tuple(each if isinstance(each, Share) else Share(want=each) for each in shares)
    return Rule(name="r", match=match or Match(), shares=made, **more)


def policy(*shares, guards=None, cxl=(), **more):
    rules = (rule(*shares, **more),) if shares else ()
    return Policy(rules=rules, guards=guards or Guards(), cxl=cxl)


def namespace(mode="raw", size=GIB, dev="namespace0.0", **more):
    more = {"capacity": size, "uuid": f"uuid-{dev}", "offset": 0} | more
    return NamespaceState(dev=dev, mode=mode, size=size, **more)


def region(*namespaces, size=GIB, **more):
    free = size - sum(each.size for each in namespaces)
    more = {"dev": "region0", "available": free, "largest": free} | more
    return RegionState(size=size, namespaces=tuple(namespaces), **more)


def machine(*regions, **more):
    more = {"verbs": frozenset(VERBS)} | more
    return MachineState(bus="kernel", name="m", regions=tuple(regions), **more)


def verbs(found):
    return [(each.verb, each.target) for each in found.steps]


def the_refusal(found):
    assert found.steps == ()
    (refusal,) = found.refused
    return refusal.why


# --- the straight way -----------------------------------------------------------------------------


def test_what_no_rule_takes_is_left_alone():
    found = plan(machine(region(namespace())), policy(want("sector"), match=Match(node=(5,))))
    assert found.steps == ()
    assert found.notes == ("region0: no rule is for it, so it is left alone",)


def test_the_first_rule_that_matches_decides():
    rules = (
        replace(rule(want("raw"), match=Match(name=("region1",))), name="one"),
        replace(rule(want("sector"), match=Match(size_least=GIB)), name="two"),
        replace(rule(want("fsdax")), name="three"),
    )
    found = plan(machine(region()), Policy(rules=rules))
    assert [each.params["mode"] for each in found.steps] == ["sector"]
    assert found.notes == ("region0 (storage): rule 'two'",)


def test_a_free_region_gets_its_namespace_filesystem_and_mount():
    wanted = want("sector", sector_size=4096, filesystem="ext4", mount="/srv", mount_options="ro")
    found = plan(machine(region()), policy(Share(want=wanted, name="data")))
    assert verbs(found) == [("create-namespace", "region0"), ("mkfs", "@1"), ("mount", "@1")]
    create, mkfs, mount = found.steps
    assert create.params == {"mode": "sector", "size": GIB, "sector_size": 4096, "name": "data"}
    assert mkfs.params == {"filesystem": "ext4"}
    assert mount.params == {"filesystem": "ext4", "path": "/srv", "options": "ro"}
    assert create.page_map is None
    assert all(each.destroys == () for each in found.steps)


def test_what_is_there_is_not_made_again():
    there = namespace("sector", content=EXT4, mounts=("/srv",), sector_size=512)
    wanted = want("sector", filesystem="ext4", mount="/srv")
    assert plan(machine(region(there)), policy(wanted)).steps == ()
    unmounted = replace(there, mounts=())
    assert verbs(plan(machine(region(unmounted)), policy(wanted))) == [("mount", "namespace0.0")]


def test_shares_are_rounded_down_to_what_is_legal():
    shares = [Share(want=want("sector"), size=Fraction(60, 100)), Share(want=want("raw"))]
    create, other = plan(machine(region()), policy(*shares)).steps
    assert create.params["size"] == GIB * 60 // 100 // (16 * MIB) * (16 * MIB)
    assert other.params["size"] == GIB - create.params["size"]


def test_shares_that_are_too_many_or_too_small():
    many = [Share(want=want("raw"), size=700 * MIB)] * 2
    assert "352 MiB more than it has" in the_refusal(plan(machine(region()), policy(*many)))
    small = [Share(want=want("sector"), size=Fraction(1, 100)), Share(want=want("raw"))]
    why = the_refusal(plan(machine(region()), policy(*small)))
    assert why == "a share of 10.24 MiB is too small for mode sector: 16 MiB are the least here"


def test_a_disabled_namespace_is_enabled_and_looked_at_before_anything_else():
    there = namespace("sector", enabled=False, damaged="it is disabled")
    found = plan(machine(region(there)), policy(want("sector", filesystem="ext4")))
    assert verbs(found) == [("enable-namespace", "namespace0.0")]


# --- what is in the way ---------------------------------------------------------------------------


def two(**more):
    first = namespace("sector", 512 * MIB, **more)
    return first, namespace("raw", 512 * MIB, "namespace0.1", offset=512 * MIB)


def test_no_more_is_destroyed_than_it_takes():
    shares = [Share(want=want("sector"), size=512 * MIB), Share(want=want("fsdax"), size=256 * MIB)]
    found = plan(machine(region(*two(content=EXT4))), policy(*shares))
    assert verbs(found) == [("destroy-namespace", "namespace0.1"), ("create-namespace", "region0")]
    (destroy, _) = found.steps
    assert destroy.destroys == ("namespace0.1, 512 MiB, raw: no known signature",)
    assert destroy.reverse == "contents"


def test_a_signature_protects_and_the_region_stays_whole():
    found = plan(machine(region(*two(content=EXT4))), policy(want("raw")))
    assert the_refusal(found) == "namespace0.0 would have to go, and carries ext4"
    found = plan(
        machine(region(*two(content=EXT4))),
        policy(want("raw"), guards=Guards(keep_signatures=False)),
    )
    destroyed = [line for each in found.steps for line in each.destroys]
    assert "namespace0.0, 512 MiB, sector: ext4 'home' (filesystem)" in destroyed


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"mounts": ("/home",)}, "is mounted at /home"),
        ({"holders": ("dm-0",)}, "is in use: dm-0"),
        ({"damaged": "a bad checksum"}, "cannot be read (a bad checksum); pmem check-namespace"),
    ],
)
def test_what_is_in_use_or_damaged_stays(more, why):
    assert why in the_refusal(plan(machine(region(*two(**more))), policy(want("raw"))))


@pytest.mark.parametrize("glob", ["namespace0.*", "uuid-namespace0.1", "ho?e"])
def test_what_is_protected_by_name_stays(glob):
    first, second = two()
    found = plan(
        machine(region(first, replace(second, name="home"))),
        policy(want("raw"), guards=Guards(protect=(glob,), keep_signatures=False)),
    )
    assert "the guards protect it by name" in the_refusal(found)


def test_what_is_mounted_is_unmounted_first_where_the_guards_allow_it():
    guards = Guards(keep_signatures=False, keep_if_mounted=False)
    first, second = two(content=EXT4, mounts=("/home",))
    found = plan(machine(region(first, second)), policy(want("raw"), guards=guards))
    assert verbs(found)[:3] == [
        ("destroy-namespace", "namespace0.1"),
        ("umount", "namespace0.0"),
        ("destroy-namespace", "namespace0.0"),
    ]


def test_a_mode_that_changes_loses_what_was_there():
    found = plan(machine(region(namespace("raw"))), policy(want("fsdax")))
    (step,) = found.steps
    assert (step.verb, step.params["uuid"]) == ("reconfigure-namespace", "uuid-namespace0.0")
    assert step.destroys
    assert step.why == "rule 'r' wants fsdax, it is raw"


def test_another_filesystem_is_not_made_over_one():
    there = namespace("sector", content=EXT4)
    found = plan(machine(region(there)), policy(want("sector", filesystem="xfs")))
    assert "carries ext4" in the_refusal(found)
    guards = Guards(keep_signatures=False)
    found = plan(machine(region(there)), policy(want("sector", filesystem="xfs"), guards=guards))
    (step,) = found.steps
    assert (step.verb, step.reverse) == ("mkfs", "state")
    assert step.destroys == ("namespace0.0, 1 GiB, sector: ext4 'home' (filesystem)",)


def test_free_pieces_that_do_not_join_are_no_room():
    middle = namespace("sector", 512 * MIB, offset=256 * MIB, content=EXT4)
    shares = [Share(want=want("sector"), size=512 * MIB), Share(want=want("raw"), size=512 * MIB)]
    why = the_refusal(plan(machine(region(middle)), policy(*shares)))
    assert why.startswith("512 MiB are needed; 512 MiB can be had, but not in one piece")


def test_a_mount_point_has_one_filesystem():
    wanted = want("sector", filesystem="ext4", mount="/srv")
    found = plan(machine(region(), region(dev="region1")), policy(wanted))
    (refusal,) = found.refused
    assert (refusal.region, refusal.why) == (
        "region1",
        "/srv is the mount point of region0 already",
    )


# --- labels ---------------------------------------------------------------------------------------


def test_a_region_without_labels_becomes_another_mode_as_it_is():
    there = region(namespace("raw"), labelled=False, available=0)
    assert verbs(plan(machine(there), policy(want("sector")))) == [
        ("reconfigure-namespace", "namespace0.0")
    ]


def test_a_region_without_labels_gets_them_to_be_divided():
    there = region(namespace("raw"), labelled=False, available=0)
    shares = [Share(want=want("raw"), size=Fraction(1, 2)), Share(want=want("sector"))]
    found = plan(machine(there), policy(*shares))
    assert verbs(found) == [("init-labels", "region0")] + [("create-namespace", "region0")] * 2
    assert found.steps[0].destroys
    none = replace(there, label_room=False)
    assert "it has no label area" in the_refusal(plan(machine(none), policy(*shares)))
    signed = replace(there, namespaces=(namespace("raw", content=EXT4),))
    assert "carries ext4" in the_refusal(plan(machine(signed), policy(*shares)))


@pytest.mark.parametrize("key", ["fixed", "unmappable"])
def test_a_region_that_cannot_be_changed(key):
    there = region(**{key: "because"})
    assert the_refusal(plan(machine(there), policy(want("fsdax")))).endswith(": because")


# --- nature ---------------------------------------------------------------------------------------


def test_storage_is_not_memory_without_a_reason():
    there = region(because="firmware says so")
    why = the_refusal(plan(machine(there), policy(want("system-ram"))))
    assert "it is storage by nature (firmware says so)" in why
    assert 'override_nature = "reason"' in why
    found = plan(machine(there), policy(want("system-ram"), override_nature="a test"))
    assert verbs(found) == [("create-namespace", "region0"), ("reconfigure-device", "@1")]
    assert found.steps[1].params == {"mode": "system-ram", "online": "movable"}
    assert all("overridden: a test" in (each.wear or "") for each in found.steps)


def test_the_forecast_of_what_wears():
    there = region(wears=True, endurance=14400 * GIB, life_used=50)
    found = plan(machine(there), policy(want("system-ram"), override_nature="a test"))
    assert found.steps[0].wear == (
        "rated for 14.06 TiB, 14,400 times its size; 50 % of its life are used; written once over "
        "every minute it lasts about 5 days, once every hour 300; overridden: a test"
    )


def test_a_page_map_in_what_wears_needs_a_reason():
    there = region(wears=True)
    why = the_refusal(plan(machine(there), policy(want("fsdax", map="dev"))))
    assert why.startswith("its page map is to be in the region, which wears it out")
    assert plan(machine(region()), policy(want("fsdax", map="dev"))).steps


def test_memory_used_as_storage_is_always_allowed():
    there = region(nature="memory")
    assert plan(machine(there), policy(want("sector"))).steps


@pytest.mark.parametrize(("wears", "place", "noted"), [(False, "dev", False), (True, "mem", True)])
def test_the_page_map_goes_where_the_guard_leaves_room(wears, place, noted):
    there = region(wears=wears)
    found = plan(machine(there, dram=64 * MIB), policy(want("fsdax")))
    (step,) = found.steps
    assert (step.page_map.size, step.page_map.place) == (16 * MIB, place)
    assert step.params["map"] == place
    assert any("leaves less DRAM" in each for each in found.notes) is noted
    ample = plan(machine(there, dram=64 * GIB), policy(want("fsdax")))
    assert ample.steps[0].page_map.place == "mem"


# --- memory and volatile regions ------------------------------------------------------------------


def ram(**more):
    more = {"dev": "dax0.0", "size": GIB, "mode": "system-ram", "blocks": 8} | more
    return region(type="volatile", nature="memory", devices=(DaxState(**more),))


def test_memory_that_is_online_as_wanted():
    assert plan(machine(ram(online=8, zone="movable")), policy(want("system-ram"))).steps == ()
    found = plan(machine(ram(online=3, zone="movable")), policy(want("system-ram")))
    assert verbs(found) == [("online-memory", "dax0.0")]
    found = plan(machine(ram(online=8, zone="kernel")), policy(want("system-ram")))
    assert verbs(found) == [("offline-memory", "dax0.0"), ("online-memory", "dax0.0")]
    found = plan(machine(ram()), policy(want("system-ram", online="no")))
    assert found.steps == ()


def test_a_volatile_region_as_a_device_and_no_block_device():
    found = plan(machine(ram(online=8, zone="movable")), policy(want("devdax")))
    (step,) = found.steps
    assert (step.verb, step.params) == ("reconfigure-device", {"mode": "devdax"})
    why = the_refusal(plan(machine(ram()), policy(want("fsdax"))))
    assert "needs a block device" in why


def test_memory_on_a_namespace_goes_back_before_it_is_destroyed():
    dax = DaxState(dev="dax0.0", size=GIB, mode="system-ram", blocks=8, online=8, zone="movable")
    there = region(namespace("devdax", map="mem", dax=dax), nature="memory")
    found = plan(machine(there), policy(want("sector")))
    assert verbs(found) == [
        ("reconfigure-device", "dax0.0"),
        ("reconfigure-namespace", "namespace0.0"),
    ]


def test_what_the_bus_cannot_do_is_put_off():
    here = machine(region(nature="memory"), verbs=frozenset({"create-namespace"}))
    found = plan(here, policy(want("system-ram")))
    assert verbs(found) == [("create-namespace", "region0")]
    assert found.deferred == ("region0: region0 becomes system RAM, on the running machine",)


# --- CXL ------------------------------------------------------------------------------------------


def memdev(number, **more):
    sizes = {"ram_size": GIB, "ram_free": GIB, "pmem_size": GIB, "pmem_free": GIB}
    more = sizes | {"decoders": ("decoder0.0", "decoder0.1")} | more
    return MemdevState(dev=f"mem{number}", serial=0xC0 + number, **more)


def test_a_cxl_region_over_all_devices():
    wish = CxlWant(name="far", type="ram", members=("*",), granularity=4096)
    found = plan(machine(memdevs=(memdev(0), memdev(1))), policy(cxl=(wish,)))
    (step,) = found.steps
    assert (step.verb, step.target) == ("create-cxl-region", "decoder0.0")
    assert step.params == {
        "type": "ram",
        "members": ["mem0", "mem1"],
        "ways": 2,
        "granularity": 4096,
        "decoder": "decoder0.0",
        "size": 2 * GIB,
    }
    cxl = CxlState(
        dev="region0", type="ram", ways=2, granularity=4096, decoder="d", members=("mem1", "mem0")
    )
    there = machine(region(cxl=cxl), memdevs=(memdev(0), memdev(1)))
    assert plan(there, policy(cxl=(wish,))).steps == ()


@pytest.mark.parametrize(
    ("wish", "devices", "why"),
    [
        ({"members": ("mem7",)}, [memdev(0)], "no CXL memory device with ram in it is mem7"),
        ({"members": ("*",), "ways": 2}, [memdev(0)], "1 devices are named for 2 ways"),
        ({"members": ("*",), "size": 4 * GIB}, [memdev(0)], "4 GiB are needed, 1 GiB are free"),
        ({"members": ("*",)}, [memdev(0, ram_free=0)], "256 MiB are needed, 0 B are free"),
        ({"members": ("0xc0",)}, [memdev(0, decoders=())], "no root decoder reaches"),
    ],
)
def test_cxl_regions_that_cannot_be(wish, devices, why):
    found = plan(
        machine(memdevs=tuple(devices)), policy(cxl=(CxlWant(name="far", type="ram", **wish),))
    )
    assert why in the_refusal(found)
