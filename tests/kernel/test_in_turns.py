"""pmemkit and a real kernel make and destroy namespaces on one image in turns, at random."""

import json
import random

import pytest
from agreement import differences, kernels, ours
from tools.guest import Dimm, Guest

from pmemkit.bus import machine_of, observe
from pmemkit.errors import NoSpace
from pmemkit.namespace.create import Wish, create, destroy
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels, labels_listing

MIB = 1 << 20
LABEL_SIZE = 128 << 10
STEPS_A_BOOT = 4
BUDGET_SECONDS = 1200

KINDS = (
    ("raw", {}),
    ("sector", {"sector_size": 4096}),
    ("sector", {"sector_size": 512}),
    ("fsdax", {"map": "dev", "align": 2 * MIB}),
    ("fsdax", {"map": "mem", "align": 4096}),
    ("devdax", {"map": "dev", "align": 4096}),
    ("devdax", {"map": "mem", "align": 2 * MIB}),
)


def make_by_ndctl(mode, parameters, size, name) -> str:
    words = ["ndctl create-namespace -r region0", f"-m {mode} -s {size} -n {name}"]
    words += [f"-l {parameters['sector_size']}"] if "sector_size" in parameters else []
    words += [f"-M {parameters['map']} -a {parameters['align']}"] if "map" in parameters else []
    return " ".join(words)


def random_wish(choose, number):
    mode, parameters = choose.choice(KINDS)
    size = choose.choice((32, 48, 64, 96)) * MIB
    return mode, parameters, size, f"step{number}"


@pytest.mark.timeout(BUDGET_SECONDS)
@pytest.mark.parametrize("version", [(1, 2), (1, 1)], ids=["v1.2", "v1.1"])
def test_both_sides_agree_after_every_boot(guest: Guest, blank, scale, version):
    """Each round: some steps by pmemkit, then a boot that must agree and does some of its own."""
    choose = random.Random(f"turns {version}")
    path = blank("turns.img", 512 * MIB + LABEL_SIZE)
    dimm = Dimm(path, label_size_bytes=LABEL_SIZE)
    machine = machine_of([path], label_size=LABEL_SIZE, slot=0)
    with open_images(machine) as images:
        init_labels(images, 0, version=version)
    steps = 0
    for _ in range(scale(2, 10)):
        steps += _own_steps(choose, machine, steps)
        # Names in the guest are those after boot; what it makes meanwhile it destroys by name.
        existing = [each.dev for each in observe(machine).regions[0].namespaces]
        scripts = {"list": "ndctl list -DRNi", "labels": "ndctl read-labels -j all"}
        for _ in range(STEPS_A_BOOT // 2):
            if existing and choose.random() < 0.5:
                gone = existing.pop(choose.randrange(len(existing)))
                scripts[f"destroy {gone}"] = f"ndctl destroy-namespace -f {gone}"
            else:
                made = make_by_ndctl(*random_wish(choose, steps))
                scripts[f"create {steps}"] = f"{made} || [ $? = 6 ] || ndctl list -R >&2"
            steps += 1
        scripts["after"] = "ndctl list -N"
        expected = ours([str(path)])
        labels = labels_listing(observe(machine).dimms)
        result = guest.run([dimm], scripts)
        wrong = differences(kernels(result["list"].json()), expected)
        assert not wrong, "\n".join(wrong)
        assert result["labels"].json() == json.loads(json.dumps(labels))
        for name in scripts:
            if name.startswith("destroy"):
                result[name].check()
        theirs = {each["uuid"] for each in result["after"].json()}
        mine = ours([str(path)])["region0"]["namespaces"].values()
        assert {each["uuid"] for each in mine if each["size"]} == theirs
    assert steps >= scale(6, 30)


def _own_steps(choose, machine, number) -> int:
    for place in range(STEPS_A_BOOT // 2):
        with open_images(machine) as images:
            existing = [each.dev for each in images.bus().regions[0].namespaces]
            if existing and choose.random() < 0.4:
                destroy(images, choose.choice(existing))
                continue
            mode, parameters, size, name = random_wish(choose, number + place)
            try:
                create(images, "region0", Wish(mode=mode, size=size, name=name, **parameters))
            except NoSpace:
                if existing:
                    destroy(images, choose.choice(existing))
    return STEPS_A_BOOT // 2
