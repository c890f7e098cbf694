"""The command line in a process of its own."""

import io
import json
import os
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PMEM = [sys.executable, "-m", "pmemkit"]
PATIENCE_SECONDS = 60


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PMEMKIT_", "PMEM2_"))}
    return kept | {"PYTHONPATH": str(ROOT / "src")} | more


def pmem(*words, stdin=None, env=None, text=True):
    """Runs a command and gives what it did."""
    return subprocess.run(
        [*PMEM, *map(str, words)],
        input=stdin,
        env=environment(**(env or {})),
        capture_output=True,
        text=text,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def refused(done, code, *parts):
    """One line on standard error with these parts in it, nothing on standard output."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stdout in ("", b"")
    error = done.stderr if isinstance(done.stderr, str) else done.stderr.decode()
    assert error.startswith("pmem")
    assert error.count("\n") == 1, error
    for part in parts:
        assert str(part) in error
    assert "Traceback" not in error


@contextmanager
def serving(*words, env=None, **options):
    """A server that has printed its first line; killed at the end if it still runs."""
    process = subprocess.Popen(
        [*PMEM, "serve", *map(str, words)],
        env=environment(**(env or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


class Done:
    """What a command did that ran in this process; looks like what :func:`pmem` gives."""

    def __init__(self, returncode, stdout, stderr):
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr

    def json(self):
        """Standard output as JSON; the command must have succeeded."""
        assert self.returncode == 0, self.stderr
        return json.loads(self.stdout)


def call(*words):
    """Runs a command in this process, which is quicker; nothing is typed in."""
    from pmemkit.cli import main

    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        try:
            code = main([*map(str, words)])
        except SystemExit as ended:
            code = ended.code
    return Done(code, out.getvalue(), error.getvalue())


def done_well(*words):
    """Runs a command that has to succeed."""
    done = call(*words)
    assert done.returncode == 0, done.stderr
    return done


def complaint(done, code, *parts):
    """Refused with this code; the last line on standard error has these parts."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    last = done.stderr.splitlines()[-1]
    for part in parts:
        assert str(part) in last, last
    return last
