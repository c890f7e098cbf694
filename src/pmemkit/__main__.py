"""``python -m pmemkit`` is the ``pmem`` command."""

import sys

from pmemkit.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
