"""The runner of suites: counts what the output names, stops what hangs, fails when anything did."""

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "suites.py"


def _run(*suites: str, patience: str = "3") -> tuple[int, str]:
    command = [sys.executable, str(TOOL), "--patience", patience, *suites]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stdout


def _row(output: str, name: str) -> str:
    (row,) = [line for line in output.splitlines() if line.startswith(name + "  ")]
    return row


def test_counts_come_from_pytest_and_cargo_and_suites():
    status, output = _run(
        "a:10:echo '== 3 passed, 2 skipped, 1 xfailed in 0.10s =='",
        "b:10:echo 'test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured'",
        "c:10:true",
    )
    assert status == 0
    assert output.splitlines()[-1] == "10 passed, 0 failed"
    assert _row(output, "total").split()[-1] == "3"


def test_quiet_pytest_lines_are_counted():
    status, output = _run("a:10:echo '43 passed, 1 skipped in 0.99s'")
    assert (status, output.splitlines()[-1]) == (0, "43 passed, 0 failed")


def test_a_failing_suite_fails_the_run_and_the_rest_still_runs():
    status, output = _run(
        "a:10:echo '1 failed, 2 passed in 1.00s'; exit 1", "b:10:false", "c:9:true"
    )
    assert status == 1
    assert output.splitlines()[-1] == "3 passed, 2 failed"
    assert "FAILED" in _row(output, "b")
    assert "ok" in _row(output, "c")


def test_a_suite_that_breaks_without_a_count_is_one_failure():
    status, output = _run("a:10:echo '7 passed in 1.00s'; exit 3")
    assert (status, output.splitlines()[-1]) == (1, "7 passed, 1 failed")


def test_what_a_suite_left_behind_is_ended(tmp_path):
    mark = tmp_path / "mark"
    status, _ = _run(f"a:10:(sleep 2; touch {mark}) & true", "b:10:sleep 3")
    assert status == 0
    assert not mark.exists()


def test_a_hanging_suite_is_stopped(tmp_path):
    text = TOOL.read_text(encoding="utf-8")
    quick = tmp_path / "suites.py"
    quick.write_text(text.replace("max(60.0, ", "max(1.0, "), encoding="utf-8")
    command = [sys.executable, str(quick), "--patience", "1", "a:1:sleep 50", "b:5:true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 1
    assert "TIMEOUT" in _row(done.stdout, "a")
    assert done.stdout.splitlines()[-1] == "1 passed, 1 failed"
