"""What devices report of their health, from what ndctl and cxl print.

QEMU has no device that reports any, so these are records. ``NVDIMM_N`` is what a machine with
NVDIMM-N printed (github.com/pmem/ndctl, issue 185). The others have the shape that ndctl and cxl 77
give by their sources, with every field that can be there: ``ndctl/json-smart.c`` and
``util_cxl_memdev_health_to_json`` of ``cxl/json.c``, and the examples of ndctl-list(1) and
cxl-list(1); their numbers are made up.
"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemkit.bus.evidence_health import Health, health_evidence, health_of_machine, parse_health
from pmemkit.bus.nature import judge
from pmemkit.errors import Busy, NotSupported

NVDIMM_N = """[
  {
    "dev":"nmem11",
    "id":"802c-0f-2008-26a3e62f",
    "handle":4385,
    "phys_id":4375,
    "health":{
      "health_state":"ok",
      "temperature_celsius":255.000000,
      "life_used_percentage":5
    }
  },
  {
    "dev":"nmem10",
    "id":"802c-0f-2008-26a3e382",
    "handle":4369,
    "phys_id":4374,
    "health":{
      "health_state":"ok",
      "temperature_celsius":255.000000,
      "life_used_percentage":6
    }
  }
]"""
NVDIMM = """[
  {
    "dev":"nmem0",
    "id":"8089-a2-1837-00000bb3",
    "handle":17,
    "phys_id":40,
    "security":"disabled",
    "health":{
      "health_state":"non-critical",
      "temperature_celsius":38.0,
      "controller_temperature_celsius":41.0,
      "spares_percentage":75,
      "alarm_temperature":false,
      "alarm_controller_temperature":false,
      "alarm_spares":true,
      "alarm_enabled_media_temperature":true,
      "temperature_threshold":82.0,
      "alarm_enabled_ctrl_temperature":true,
      "controller_temperature_threshold":98.0,
      "alarm_enabled_spares":true,
      "spares_threshold":80,
      "life_used_percentage":104,
      "shutdown_state":"dirty",
      "shutdown_count":12
    }
  },
  {
    "dev":"nmem1",
    "id":"8089-a2-1837-00000b5e",
    "handle":257,
    "phys_id":44,
    "health":{
      "health_state":"unknown"
    }
  },
  {
    "dev":"nmem2",
    "id":"8089-a2-1837-00000b60",
    "handle":273,
    "phys_id":46
  }
]"""
CXL = """[
  {
    "memdev":"mem0",
    "pmem_size":268435456,
    "ram_size":268435456,
    "health":{
      "maintenance_needed":true,
      "performance_degraded":false,
      "hw_replacement_needed":false,
      "media_normal":false,
      "media_not_ready":false,
      "media_persistence_lost":false,
      "media_data_lost":false,
      "media_powerloss_persistence_loss":true,
      "media_shutdown_persistence_loss":false,
      "media_persistence_loss_imminent":false,
      "media_powerloss_data_loss":false,
      "media_shutdown_data_loss":false,
      "media_data_loss_imminent":true,
      "ext_life_used":"warning",
      "ext_temperature":"critical",
      "ext_corrected_volatile":"normal",
      "ext_corrected_persistent":"normal",
      "life_used_percent":87,
      "temperature":25,
      "dirty_shutdowns":10,
      "volatile_errors":20,
      "pmem_errors":30
    },
    "serial":0,
    "host":"0000:35:00.0"
  }
]"""
# A device that implements neither life used (0xff) nor temperature (0xffff): cxl leaves them out.
CXL_DRAM = """[
  {
    "memdev":"mem1",
    "ram_size":268435456,
    "health":{
      "maintenance_needed":false,
      "media_normal":true,
      "ext_life_used":"normal",
      "ext_temperature":"normal",
      "ext_corrected_volatile":"normal",
      "ext_corrected_persistent":"normal",
      "dirty_shutdowns":0,
      "volatile_errors":0,
      "pmem_errors":0
    },
    "serial":1,
    "host":"0000:36:00.0"
  }
]"""


def recorded(printed):
    return parse_health(json.loads(printed), "command")


# --- records --------------------------------------------------------------------------------------


def test_an_nvdimm_past_its_life():
    found = recorded(NVDIMM)
    assert found["nmem0"] == Health(
        dev="nmem0",
        source="command, nmem0",
        state="non-critical",
        life_used=104,
        spares=75,
        temperature=38.0,
        alarms=("spare capacity",),
        dirty_shutdowns=12,
        dirty=True,
    )
    wear, shown = health_evidence(found["nmem0"])
    assert (wear.says, wear.strength, wear.life_used) == ("storage", "wear", 104)
    assert wear.value == "104 % of its life is used, more than it was rated for"
    assert (shown.says, shown.strength) == (None, "hint")
    assert shown.value == (
        "state non-critical, 75 % spare capacity left, 38.0 °C, the last shutdown was dirty, "
        "12 dirty shutdowns, alarms: spare capacity"
    )


def test_a_dimm_that_did_not_answer_or_cannot_says_nothing():
    found = recorded(NVDIMM)
    assert health_evidence(found["nmem1"]) == []
    assert "nmem2" not in found


def test_an_nvdimm_n_wears_and_knows_no_temperature():
    found = recorded(NVDIMM_N)
    assert {dev: health.life_used for dev, health in found.items()} == {"nmem11": 5, "nmem10": 6}
    assert {health.temperature for health in found.values()} == {None}
    assert judge(health_evidence(found["nmem10"])).because == (
        "command, nmem10 says 6 % of its life is used: it wears"
    )


def test_a_cxl_device_with_alarms():
    health = recorded(CXL)["mem0"]
    assert (health.life_used, health.life_warning, health.errors) == (87, "warning", 50)
    assert (health.temperature, health.dirty_shutdowns, health.state) == (25, 10, None)
    assert health.alarms == (
        "maintenance needed",
        "a power failure would lose persistence",
        "loss of data imminent",
    )
    verdict = judge(health_evidence(health))
    assert (verdict.nature, verdict.wears, verdict.life_used) == ("storage", True, 87)


def test_cxl_memory_that_reports_no_wear_does_not_wear():
    found = health_evidence(recorded(CXL_DRAM)["mem1"])
    assert [each.strength for each in found] == ["hint"]
    assert not judge(found).wears


def test_a_device_that_only_warns_of_its_life_wears():
    rows = [{"memdev": "mem0", "health": {"ext_life_used": "critical"}}]
    (found,) = health_evidence(parse_health(rows, "command")["mem0"])
    assert (found.value, found.says, found.strength) == ("life used: critical", "storage", "wear")
    assert found.life_used is None


def test_life_at_its_beginning_is_wear_as_well():
    rows = [{"dev": "nmem0", "health": {"life_used_percentage": 0}}]
    (found,) = health_evidence(parse_health(rows, "command")["nmem0"])
    assert (found.says, found.strength, found.life_used) == ("storage", "wear", 0)


def test_devices_inside_a_listing_of_several_kinds():
    inside = [{"provider": "ACPI.NFIT", "dimms": json.loads(NVDIMM)}]
    assert parse_health(inside, "command") == recorded(NVDIMM)
    inside = [{"anon memdevs": 1, "memdevs": json.loads(CXL)}]
    assert parse_health(inside, "command") == recorded(CXL)


# --- what is odd ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "health",
    [
        None,
        [],
        {},
        {"life_used_percentage": 255},
        {"life_used_percentage": -1},
        {"life_used_percentage": True},
        {"life_used_percentage": "5"},
        {"life_used_percentage": 5.5},
        {"ext_life_used": "normal"},
        {"ext_life_used": ["warning"]},
        {"spares_percentage": 101},
        {"temperature_celsius": float("nan")},
        {"temperature": 10**400},
        {"temperature": True},
        {"health_state": "fine"},
        {"alarm_spares": 1},
        {"shutdown_state": "clean"},
        {"volatile_errors": 1 << 70},
    ],
)
def test_an_odd_value_is_as_good_as_left_out(health):
    found = parse_health([{"dev": "nmem0", "health": health}], "command")
    assert [piece for each in found.values() for piece in health_evidence(each)] == []


@pytest.mark.parametrize("row", [{}, {"dev": 5}, {"dev": ""}, {"dimms": 5}, {"dimms": [5]}])
def test_what_is_no_device(row):
    assert parse_health([row | {"health": {}}], "command") == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
NAMES = sorted({name for row in json.loads(NVDIMM)[:1] for name in row["health"]}) + sorted(
    json.loads(CXL)[0]["health"]
)


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6))
def test_whatever_a_report_holds_it_never_speaks_for_memory(health):
    for each in parse_health([{"dev": "nmem0", "health": health}], "command").values():
        assert all(piece.says in (None, "storage") for piece in health_evidence(each))


# --- asking ---------------------------------------------------------------------------------------


class Programs:
    """Programs that print what was recorded."""

    def __init__(self, **printed):
        self.printed = printed
        self.ran = []

    def __call__(self, argv, *, timeout_seconds=60, given=b""):
        self.ran.append(" ".join(argv))
        printed = self.printed[argv[0]]
        if isinstance(printed, Exception):
            raise printed
        return printed.encode()


def test_each_kind_of_device_is_asked_by_its_program():
    run = Programs(ndctl=NVDIMM, cxl=CXL)
    found, notes = health_of_machine(["nmem0", "mem0"], run)
    assert run.ran == ["ndctl list -DH", "cxl list -MH"]
    assert sorted(found) == ["mem0", "nmem0", "nmem1"]
    assert found["mem0"].source == "cxl list -MH, mem0"
    assert notes == []


@pytest.mark.parametrize(
    ("devices", "ran"),
    [([], []), (["nmem3"], ["ndctl list -DH"]), (["mem3"], ["cxl list -MH"]), (["dax0.0"], [])],
)
def test_no_program_runs_for_devices_that_are_not_there(devices, ran):
    run = Programs(ndctl="", cxl="")
    assert health_of_machine(devices, run) == ({}, [])
    assert run.ran == ran


def test_what_could_not_be_asked_is_a_note():
    run = Programs(ndctl=NotSupported("ndctl is not installed"), cxl=Busy("cxl had not ended"))
    found, notes = health_of_machine(["nmem0", "mem0"], run)
    assert found == {}
    assert notes == [
        "health of devices: ndctl is not installed",
        "health of devices is not known: cxl had not ended",
    ]


def test_what_is_no_json_is_a_note():
    found, (note,) = health_of_machine(["nmem0"], Programs(ndctl="{"))
    assert found == {}
    assert "what ndctl printed is no JSON" in note
