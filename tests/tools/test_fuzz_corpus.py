"""The committed seeds of the fuzzers are those that the script beside them writes."""

import runpy
from pathlib import Path

FUZZ = Path(__file__).resolve().parents[2] / "fuzz"


def test_seeds_are_what_the_script_writes(tmp_path):
    script = runpy.run_path(str(FUZZ / "make_corpus.py"))
    script["main"].__globals__["CORPUS"] = tmp_path
    script["main"]()
    written = {
        path.relative_to(tmp_path): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert len(written) >= 50
    for path, data in written.items():
        assert (FUZZ / "corpus" / path).read_bytes() == data, path
