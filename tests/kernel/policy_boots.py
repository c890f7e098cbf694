"""Boots for the tests of ``pmem plan``, ``apply`` and ``undo``: scripts of ``policy_cli`` in the
guest, and what every call in them said."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
LABEL_SIZE = 128 << 10
POLICY = "/etc/pmemkit/policy.toml"
JOURNAL = "journal.tar"
TIMEOUT_SECONDS = 400


@dataclass
class Call:
    """What a program said."""

    name: str
    status: int
    out: str
    errors: str
    seconds: float = 0.0

    def json(self):
        """Its output as JSON."""
        return json.loads(self.out)

    def ok(self, status=0):
        """Itself; it has to have ended so."""
        text = f"{self.name} ended with {self.status}\n{self.out}{self.errors}"
        assert self.status == status, text
        return self


@dataclass
class Boot:
    """One boot: what was called, and the journal as it was at the end."""

    calls: Mapping[str, Call]
    journal: bytes
    messages: str

    def __getitem__(self, name):
        return self.calls[name]


def boot(guest, dimms, script, *, policy, machine=None, journal=b"", **more):
    """Boots, installs the policy and the machine file, brings the journal back, runs the script."""
    names = ("policy_cli.py", "policy_driver.py")
    files = {name: (HERE / name).read_bytes() for name in names}
    lines = ["from policy_cli import *", f"P = {POLICY!r}", f"install({policy!r}, {machine!r})"]
    if journal:
        files[JOURNAL] = journal
        lines.append(f"sh('journal', 'mkdir -p /var/lib && tar x -C /var/lib -f /in/{JOURNAL}')")
    body = "\n".join([*lines, script])
    steps = {
        "script": f"export PYTHONPATH=/in\npython3 - <<'END'\n{body}\nEND",
        "journal": "test ! -e /var/lib/pmemkit || tar c -C /var/lib pmemkit",
    }
    result = guest.run(
        dimms, steps, python=True, files=files, timeout_seconds=TIMEOUT_SECONDS, **more
    )
    rows = result["script"].json()
    calls = {name: Call(name, **row) for name, row in rows.items()}
    return Boot(calls, result["journal"].check().stdout, result.messages)


def verbs(plan):
    """The steps of a plan, as JSON has it, in words."""
    return [each["verb"] for each in plan["steps"]]


def regions(listing):
    """The regions of ``pmem list -BDRN`` by name."""
    return {region["dev"]: region for bus in listing for region in bus.get("regions", [])}


def undone(call):
    """What an undo said of each step."""
    return [line.strip() for line in call.errors.splitlines() if line.startswith("  undo ")]
