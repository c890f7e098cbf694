"""``pmem bench``: hands over to a suite of :mod:`pmemkit.bench`."""

import importlib
from collections.abc import Sequence

from pmemkit.cli._common import make_parser

__all__ = ["SUITES", "run"]

SUITES = ("nbd", "medium", "formats", "btt", "cache", "wear", "policy", "frames", "tiers", "dax")

_EXAMPLES = """\
  pmem bench nbd --quick        the NBD server against nbdkit, with fio as the client
  pmem bench medium             copy and persist against libpmem
  pmem bench formats            namespaces on 1 TiB, check-namespace against NumPy
  pmem bench btt                sectors against libpmemblk and the floor
  pmem bench cache              hits, hit ratios and media writes against LRU, ARC, S3-FIFO
  pmem bench wear               lifetimes with levelling and without; what counting costs
  pmem bench policy             planning against parsing
  pmem bench frames             page frames against jemalloc, mimalloc, glibc
  pmem bench tiers              promotion and demotion against an oracle; what sampling costs
  pmem bench dax                direct mappings against libpmem, flushing it all, a bare mmap
  pmem bench nbd --help         options of a suite"""


def run(arguments: Sequence[str]) -> int:
    """Runs the suite with the rest of the arguments."""
    parser = make_parser("bench", "Measure against peers, in the same run.", _EXAMPLES)
    parser.add_argument("suite", metavar="SUITE", choices=SUITES, help=", ".join(SUITES))
    options = parser.parse_args(list(arguments[:1]))
    suite = importlib.import_module(f"pmemkit.bench.{options.suite}")
    code: int = suite.main(list(arguments[1:]))
    return code
