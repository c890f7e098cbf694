#!/usr/bin/env python3
"""Prints what ``make build`` puts into the virtual environment, read from pyproject.toml.

The build backend, the package's own dependencies and the pinned ``dev`` extra, one a line; with a
name, that extra alone. It is here because an editable install without build isolation needs its
backend there first.
"""

import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Prints the requirements."""
    pyproject = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    if len(sys.argv) > 1:
        print(*project["optional-dependencies"][sys.argv[1]], sep="\n")
        return
    for line in [
        *pyproject["build-system"]["requires"],
        *project["dependencies"],
        *project["optional-dependencies"]["dev"],
    ]:
        print(line)


if __name__ == "__main__":
    main()
