"""The example programs of ``examples/dax``, run as programs: what one run left, the next finds."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "dax"


def run(name, *words, stdin=""):
    command = [sys.executable, EXAMPLES / f"{name}.py", *words]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_arrays_are_there_again(tmp_path):
    pool = str(tmp_path / "pool.img")
    assert run("array_store", pool, "put", "small", "3") == "small float64 (3,) sum 0.0\n"
    run("array_store", pool, "put", "large", "100x24")
    run("array_store", pool, "add", "large", "0.5")
    expected = "small float64 (3,) sum 0.0\nlarge float64 (100, 24) sum 1200.0\n"
    assert run("array_store", pool, "list") == expected


def test_records_outlive_the_process_that_appends(tmp_path):
    journal = str(tmp_path / "journal.img")
    assert run("append_log", journal, "append", stdin="one\ntwo\n") == "0\n1\n"
    command = [sys.executable, EXAMPLES / "append_log.py", journal, "append"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as writer:
        writer.stdin.write("three\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == "2\n"
        writer.kill()
    assert run("append_log", journal, "read") == "one\ntwo\nthree\n"


def test_a_torn_record_ends_the_log(tmp_path):
    path = tmp_path / "journal.img"
    run("append_log", str(path), "append", stdin="one\ntwo\nthree\n")
    with path.open("r+b") as file:
        file.seek(64 + 16)
        file.write(b"X")
    assert run("append_log", str(path), "read") == "one\n"
    assert run("append_log", str(path), "append", stdin="new\n") == "1\n"
    # What was third is behind a record it does not follow.
    assert run("append_log", str(path), "read") == "one\nnew\nthree\n"


def test_a_database_is_there_again(tmp_path):
    pool = str(tmp_path / "pool.img")
    run("sqlite_store", pool, "create table t (x)", "insert into t values (1), (41)")
    assert run("sqlite_store", pool, "select sum(x) from t") == "42\n"
    run("sqlite_store", pool, "insert into t values (58)", "delete from t where x = 1")
    assert run("sqlite_store", pool, "select sum(x), count(*) from t") == "99 2\n"
