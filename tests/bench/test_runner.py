"""The runner of benchmarks: turns, medians, ratios, and what it refuses to measure."""

import json

import pytest

from pmemkit import _native
from pmemkit.bench import medium, nbd
from pmemkit.bench._runner import Options, Report, alternate, parse_options
from pmemkit.errors import InvalidArgument


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "BUILD_PROFILE", "release")
    return Options(tmp_path / "out" / "suite.json", only="*", quick=False, runs=3, seconds=1.0)


def test_sides_take_turns_and_the_first_round_does_not_count():
    calls = []

    def side(name):
        def measure():
            calls.append(name)
            return len(calls)

        return measure

    samples = alternate([side("a"), side("b")], 2)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert samples == [[4, 5], [3, 6]]


def test_a_ratio_above_one_means_that_we_win(options, capsys):
    report = Report(options)
    faster = report.add("speed", "MiB/s", [200.0, 1.0, 300.0], [100.0], "peer")
    assert (faster.ours, faster.peer, faster.ratio, faster.runs) == (200.0, 100.0, 2.0, 3)
    cheaper = report.add("cost", "ns", [50.0], [100.0], "peer", less_is_better=True)
    assert cheaper.ratio == 2.0
    assert "speed" in capsys.readouterr().out


def test_records_and_what_they_were_measured_on_are_written(options):
    report = Report(options)
    report.add("speed", "MiB/s", [2.0], [1.0], "peer")
    report.write(["peer 1.0"])
    (record,) = json.loads(options.json_path.read_text())
    assert record == {
        "name": "speed",
        "ours": 2.0,
        "peer": 1.0,
        "peer_name": "peer",
        "unit": "MiB/s",
        "ratio": 2.0,
        "runs": 1,
    }
    about = json.loads(options.json_path.with_suffix(".about.json").read_text())
    assert about["build"] == _native.BUILD_PROFILE and about["peers"] == ["peer 1.0"]
    assert about["samples"][0]["ours"] == [2.0]


@pytest.mark.parametrize("suite", [nbd, medium])
def test_a_debug_build_is_refused(suite, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(_native, "BUILD_PROFILE", "debug")
    target = tmp_path / "suite.json"
    status = suite.main(["--quick", "--json", str(target)])
    assert status == InvalidArgument.exit_code
    assert "measure a release build" in capsys.readouterr().err
    assert not target.exists()


def test_a_build_with_planted_faults_is_refused(options, monkeypatch):
    monkeypatch.setattr(_native, "PLANTED_FAULTS", True)
    with pytest.raises(InvalidArgument, match="planted faults"):
        Report(options)


def test_quick_is_one_short_run_and_only_chooses_by_name():
    options, _ = parse_options("nbd", ["--quick", "--only", "qd16"], runs=3, seconds=3.0)
    assert (options.runs, options.seconds) == (1, 1.0)
    assert options.wanted("4k randread qd16") and not options.wanted("4k randread qd1")
    options, _ = parse_options("nbd", ["--only", "*write*", "--runs", "7"], runs=3, seconds=3.0)
    assert options.runs == 7
    assert options.wanted("256k write qd8") and not options.wanted("256k read qd8")


def test_the_medium_suite_runs(tmp_path, need):
    need("libpmem.so.1")
    if _native.BUILD_PROFILE != "release":
        pytest.skip("a debug build is not measured")
    target = tmp_path / "medium.json"
    assert medium.main(["--quick", "--only", "64 B", "--json", str(target)]) == 0
    names = [record["name"] for record in json.loads(target.read_text())]
    assert "copy_persist 64 B" in names and "python persist 64 B" in names


def test_every_case_of_the_nbd_suite_has_its_own_name():
    cases = nbd._RANDOM + nbd._SEQUENTIAL + nbd._FSYNC
    assert len({case.name for case in cases}) == len(cases) == 11
