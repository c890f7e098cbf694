"""The planner goes by the verdict that ``pmem explain`` prints: nature, reason, wear, and how much
of a life is left, with declarations and health, on live machines and on images."""

import json

import pytest
from fake_kernel import FakeKernel
from policy_images import MIB

from pmemkit.bus.declarations import parse_declarations
from pmemkit.bus.image import observe
from pmemkit.bus.machine import load_machine
from pmemkit.bus.nature import image_evidence, judge
from pmemkit.bus.verdicts import machine_verdicts
from pmemkit.policy.bills import wear_forecast
from pmemkit.policy.image_actions import ImageActions
from pmemkit.policy.kernel_survey import survey
from pmemkit.policy.model import RegionState
from pmemkit.policy.plan import plan
from pmemkit.policy.schema import parse_policy

LEND = '[[rule]]\nwant = { mode = "system-ram" }\n'
OVERRIDE = 'override_nature = "replaced next year"\n'
BUS = "acpi/ndbus0"
TIB = 1 << 40
DECLARED = """
[[dimm]]
handle = 1
nature = "memory"

[[dimm]]
handle = 2
endurance = "20P"
"""


def facts(found):
    """What a region and a verdict have in common."""
    names = ("nature", "because", "wears", "endurance", "life_used")
    return {name: getattr(found, name) for name in names}


# --- live machines --------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    tree = FakeKernel(tmp_path).tree
    tree.device("nd", BUS, provider="ACPI.NFIT")
    for number in range(3):
        tree.device(
            "nd",
            f"{BUS}/nmem{number}",
            flags="label",
            commands="set_data",
            nfit__handle=number + 1,
        )
        tree.device(
            "nd",
            f"{BUS}/region{number}",
            driver="nd_region",
            uevent="DEVTYPE=nd_pmem",
            size=512 * MIB,
            available_size=512 * MIB,
            max_available_extent=512 * MIB,
            nstype=5,
            mappings=1,
            mapping0=f"nmem{number},0,{512 * MIB},0",
        )
    tree.device("dax", "platform/hmem.0/dax9.0", size=512 * MIB, target_node=2)
    return tree


def health(**used):
    rows = [{"dev": dev, "health": {"life_used_percentage": life}} for dev, life in used.items()]

    def run(argv, *, timeout_seconds=60, given=b""):
        return json.dumps(rows).encode()

    return run


@pytest.mark.parametrize("declared", ["", DECLARED], ids=["undeclared", "declared"])
@pytest.mark.parametrize("used", [{}, {"nmem0": 5, "nmem2": 104}], ids=["new", "worn"])
def test_a_live_machine(tree, declared, used):
    declarations = parse_declarations(declared, "m.toml") if declared else ()
    run = health(**used)
    machine = survey(tree.sysfs, tree.proc, tree.dev, declarations, run)
    verdicts, _ = machine_verdicts(
        declarations=declarations, sysfs=tree.sysfs, proc=tree.proc, run=run
    )
    assert {each.dev: facts(each) for each in machine.regions} == {
        dev: facts(verdict) for dev, verdict in verdicts.items()
    }
    assert machine.region("region0").wears == bool(used)
    assert machine.region("region2").life_used == used.get("nmem2")
    assert machine.region("hmem.0").nature == "memory"


def planned(tree, policy, used=None):
    declarations = parse_declarations(DECLARED, "m.toml")
    machine = survey(tree.sysfs, tree.proc, tree.dev, declarations, health(**(used or {})))
    return plan(machine, parse_policy(policy, "p.toml"))


def refusals(found):
    return {each.region for each in found.refused if "is to be memory, but" in each.why}


def forecasts(found):
    return {step.region: step.wear for step in found.steps if step.wear is not None}


def test_what_wears_is_lent_as_memory_only_where_that_is_meant(tree):
    assert refusals(planned(tree, LEND)) == {"region1", "region2"}
    assert refusals(planned(tree, LEND, {"nmem0": 5})) == {"region0", "region1", "region2"}
    assert not refusals(planned(tree, LEND + OVERRIDE, {"nmem0": 5}))


def test_the_forecast_knows_endurance_and_life(tree):
    found = forecasts(planned(tree, LEND + OVERRIDE, {"nmem1": 50, "nmem2": 104}))
    assert found.keys() == {"region1", "region2"}
    assert found["region1"].startswith("rated for 20 PiB, 41,943,040 times its size; 50 % of its")
    assert "104 % of its life" in found["region2"]


# --- the forecast ---------------------------------------------------------------------------------


def region(**values):
    return RegionState(dev="region0", size=TIB, wears=True, **values)


def test_what_is_used_shortens_the_forecast():
    new = wear_forecast(region(endurance=1440 * 100 * TIB))
    assert "lasts about 100 days, once every hour 6,000" in new
    half = wear_forecast(region(endurance=1440 * 100 * TIB, life_used=50))
    assert "50 % of its life are used" in half
    assert "lasts about 50 days, once every hour 3,000" in half


@pytest.mark.parametrize("used", [100, 104, 254])
def test_a_life_that_is_used_up_leaves_no_days(used):
    text = wear_forecast(region(endurance=100 * TIB, life_used=used))
    assert text.endswith("nothing is left of the life that it was rated for")
    assert f"{used} % of its life" in text
    assert "days" not in text


def test_without_endurance_nothing_is_forecast():
    text = wear_forecast(region(life_used=7))
    assert (
        text == "its endurance is not known, so nothing can be forecast; 7 % of its life are used"
    )


# --- images ---------------------------------------------------------------------------------------

MACHINE = """
[[dimm]]
path = "a.img"
nature = "memory"
endurance = "3P"

[[dimm]]
path = "b.img"
nature = "storage"

[[dimm]]
path = "c.img"

[[dimm]]
path = "d.img"
endurance = "20P"

[[dimm]]
path = "e.img"
endurance = "5P"

[[region]]
dimms = [3, 4]
"""


@pytest.fixture
def machine(tmp_path):
    for name in "abcde":
        with (tmp_path / f"{name}.img").open("wb") as image:
            image.truncate(64 * MIB)
    path = tmp_path / "vm.toml"
    path.write_text(MACHINE)
    return path


def test_images(machine):
    state = ImageActions([machine]).observe()
    seen = observe(load_machine(machine))
    assert {each.dev: facts(each) for each in state.regions} == {
        each.dev: facts(judge(image_evidence(each))) for each in seen.regions
    }
    found = {(each.nature, each.wears, each.endurance) for each in state.regions}
    assert found == {
        ("memory", True, 3 << 50),
        ("storage", False, None),
        # A set is worn out when its weakest dimm is.
        ("storage", True, 10 << 50),
    }
