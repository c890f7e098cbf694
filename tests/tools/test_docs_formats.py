"""docs/formats is what the tables say, and every trap in it is pinned by a test that exists."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "docs_formats.py"


def _load():
    spec = importlib.util.spec_from_file_location("docs_formats", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def _run(*options: str) -> tuple[int, str]:
    command = [sys.executable, str(TOOL), *options]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return told.returncode, told.stderr


def test_the_documents_are_up_to_date():
    assert _run("--check") == (0, "")


def test_a_stale_document_is_named_and_a_run_makes_it_whole(tmp_path):
    assert _run("--target", str(tmp_path))[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "btt.md",
        "index.md",
        "infoblocks.md",
        "labels.md",
        "pool.md",
    ]
    (tmp_path / "btt.md").write_text("something else")
    (tmp_path / "labels.md").unlink()
    status, told = _run("--check", "--target", str(tmp_path))
    assert status == 1
    assert "btt.md is not what" in told
    assert "labels.md is not what" in told
    assert "index.md" not in told


def test_a_trap_whose_test_is_gone_is_an_error(monkeypatch, capsys):
    docs = _load()
    assert docs.missing_tests() == []
    assert len(docs.TRAPS) >= 15
    gone = docs.Trap("btt", "a trap", "tests/formats/test_traps.py::test_that_is_gone")
    monkeypatch.setattr(docs, "TRAPS", (*docs.TRAPS, gone))
    assert docs.main(["--check"]) == 1
    assert "no such test: tests/formats/test_traps.py::test_that_is_gone" in capsys.readouterr().err


def test_every_field_of_every_table_is_in_the_documents():
    docs = _load()
    text = "".join(docs.documents().values())
    for kind in docs.layout.Layout.__subclasses__():
        for each in [kind, *kind.__subclasses__()]:
            if not each.TITLE:
                continue
            assert f"## {each.TITLE}\n" in text
            for row in each.fields():
                assert f"| {row.offset} | {row.width} | `{row.name}` |" in text
