#!/usr/bin/env python3
"""Compares the stubs of the Rust core with what the built extension has, with mypy's stubtest.

The submodules of the extension are attributes and no importable modules of their own, which
stubtest takes for granted; so they are entered among the loaded modules first. What the stubs leave
out on purpose stands in ``tools/stubtest-allowlist.txt`` with its reason.
"""

import sys
from types import ModuleType

from mypy import stubtest

from pmemkit import _native

ALLOWLIST = "tools/stubtest-allowlist.txt"


def main() -> int:
    """Runs stubtest over ``pmemkit._native``."""
    for name, value in list(vars(_native).items()):
        if isinstance(value, ModuleType):
            sys.modules[f"{_native.__name__}.{name}"] = value
    arguments = ["--allowlist", ALLOWLIST, "--mypy-config-file", "pyproject.toml"]
    return stubtest.test_stubs(stubtest.parse_options([_native.__name__, *arguments]))


if __name__ == "__main__":
    sys.exit(main())
