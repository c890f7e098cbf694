"""Cases of suite ``dax``: faults a second of a mapping that fills itself.

Against the shortest loop around userfaultfd that works, on the same memory, and against the faults
that the kernel handles by itself, which need no other thread. As many threads touch pages as there
are handlers. Ours and the shortest loop wait alike: both sleep until a fault comes, or both go on
looking for one for a while, which is what a mapping does unless told otherwise.

What this does not do: providers that do something; fault-around, which asks once for many pages.
"""

from functools import partial

from pmemkit import _native
from pmemkit.bench._runner import Options, Report, alternate
from pmemkit.errors import NotSupported

__all__ = ["measure"]

_NS_GUESS = 3000


def measure(report: Report, options: Options) -> None:
    """Adds the cases."""
    pages = max(1000, int(options.seconds * 1e9 / _NS_GUESS))
    for threads in (1, 2):
        for peer, looking in (("bare", False), ("bare", True), ("kernel", True)):
            how = "looking" if looking else "sleeping"
            name = f"faults threads {threads} against {peer}, {how}"
            if not options.wanted(name):
                continue
            sides = [
                partial(_native.bench.faults_ns, who, threads, pages, looking=looking)
                for who in ("ours", peer)
            ]
            try:
                ours, other = alternate(sides, options.runs)
            except NotSupported as refused:
                print(f"left out: {name}: {refused}")
                continue
            what = "a bare loop" if peer == "bare" else "the kernel's own"
            report.add(name, "ns", ours, other, what, less_is_better=True)
