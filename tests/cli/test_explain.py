"""``pmem explain`` of this machine: what it prints, with verdicts that are given.

``tests/kernel/test_explain_guest.py`` has it on real kernels, ``test_cli_machine.py`` for machine
files.
"""

import json

import pytest

from pmemkit.bus import declarations, verdicts
from pmemkit.bus.nature import Evidence, judge
from pmemkit.cli import explain_region
from pmemkit.errors import InvalidArgument

TIB = 1 << 40
WORN = judge(
    [
        Evidence("NFIT", "a persistent range", "storage", "firmware", "a volatile range"),
        Evidence("m.toml:1", "endurance 3 TiB", "storage", "wear", endurance=3 * TIB),
        Evidence("ndctl list -DH, nmem0", "104 % is used", "storage", "wear", life_used=104),
    ],
    declare="m.toml",
)
PLAIN = judge([Evidence("CXL region1", "mode ram", "memory", "firmware")], declare="m.toml")


@pytest.fixture(autouse=True)
def undeclared(tmp_path, monkeypatch):
    """Whatever the machine of the test declares."""
    monkeypatch.setattr(declarations, "DECLARATIONS", str(tmp_path / "absent"))


@pytest.fixture
def asked(monkeypatch):
    """What the command asks for; it gets two regions and a note."""
    calls = []

    def machine_verdicts(names, *, declarations):
        calls.append((names, declarations))
        return {"region0": WORN, "region1": PLAIN}, ["health: cxl is not installed"]

    monkeypatch.setattr(verdicts, "machine_verdicts", machine_verdicts)
    return calls


def test_for_people(asked, capsys):
    assert explain_region.run([]) == 0
    printed = capsys.readouterr()
    first, second = printed.out.split("\n\n")
    assert first.splitlines() == [
        "region0: storage: m.toml:1 says endurance 3 TiB and "
        "ndctl list -DH, nmem0 says 104 % is used",
        "  strength  speaks for  source                 value",
        "  wear      storage     m.toml:1               endurance 3 TiB",
        "  wear      storage     ndctl list -DH, nmem0  104 % is used",
        "  firmware  storage     NFIT                   a persistent range",
        "  it wears: 104 % of its life is used, 3 TiB may be written to it in its life",
        '  would be memory with nature = "memory" in m.toml',
    ]
    assert second.startswith("region1: memory: CXL region1 says mode ram\n")
    assert "it wears" not in second
    assert "cxl is not installed" in printed.err
    assert asked == [(None, ())]


def test_for_scripts(asked, capsys):
    assert explain_region.run(["--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["dev"], first["wears"], first["life_used"]) == ("region0", True, 104)
    assert first["endurance"] == 3 * TIB
    assert first["evidence"][0] == {
        "source": "m.toml:1",
        "value": "endurance 3 TiB",
        "says": "storage",
        "strength": "wear",
        "endurance": 3 * TIB,
    }
    assert (second["endurance"], second["life_used"]) == (None, None)
    assert second["would_change"][0] == 'nature = "storage" in m.toml'


@pytest.mark.parametrize("word", ["region0", "dax_region0", "dax1.0", "hmem.0", "hmem_platform.0"])
def test_a_region_of_the_machine_is_told_from_a_path(asked, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    explain_region.run([word])
    assert asked == [([word], ())]


def test_a_file_that_is_called_like_a_region_is_a_file(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "region0").open("wb") as image:
        image.truncate(16 << 20)
    explain_region.run(["region0"])
    assert asked == []
    assert "its nature is not known" in capsys.readouterr().out


def test_declarations_of_a_file(asked, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[[dimm]]\nhandle = 1\nnature = "memory"\n')
    explain_region.run(["region0", "--declare", str(path)])
    ((names, (declared,)),) = asked
    assert (names, declared.source) == (["region0"], f"{path}:1")


def test_images_have_their_own_declarations(asked, tmp_path):
    with pytest.raises(InvalidArgument, match="stands in their machine file"):
        explain_region.run([str(tmp_path / "vm.toml"), "--declare", "mine.toml"])


def test_a_machine_without_regions(monkeypatch):
    monkeypatch.setattr(verdicts, "machine_verdicts", lambda names, declarations: ({}, []))
    with pytest.raises(InvalidArgument, match="this machine has no region"):
        explain_region.run([])
