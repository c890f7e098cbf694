"""``pmem umount``: unmounts what ``pmem mount`` mounted, and ends its server.

What this does not do: decide what there is to be taken down (:mod:`pmemkit.serve.mounts`).
"""

import os
from collections.abc import Sequence

from pmemkit.cli._common import make_parser, print_json
from pmemkit.errors import InvalidArgument, PmemError, SystemFailure

__all__ = ["run"]

_EXAMPLES = """\
  pmem umount /mnt
  pmem umount --all
  pmem umount /mnt --lazy       at once; the server ends with the last user"""

_NOTES = """\
It returns when everything is flushed and the server has ended. What a server left that was killed
is cleaned up, lazily where programs still use it."""


def run(arguments: Sequence[str]) -> int:
    """Unmounts."""
    parser = make_parser("umount", "Unmount what pmem mount mounted.", _EXAMPLES, _NOTES)
    parser.add_argument("directories", metavar="DIR", nargs="*", help="where it is mounted")
    parser.add_argument("--all", action="store_true", help="everything that pmem mount mounted")
    parser.add_argument("--lazy", action="store_true", help="do not wait for who still uses it")
    parser.add_argument(
        "--force",
        action="store_true",
        help="kill a server that does not answer; what programs had not synced is lost",
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_intermixed_args(arguments)
    from pmemkit.serve.mounts import records, require_known, unmount

    if bool(options.directories) == options.all:
        raise InvalidArgument("name a DIR, or say --all")
    if os.geteuid() != 0:
        raise SystemFailure("unmounting needs root", errno=1, op="umount")
    if options.all:
        found = records()
    else:
        found = [require_known(os.path.realpath(each)) for each in options.directories]
    told, failures = [], []
    for record in found:
        try:
            done = unmount(record, lazily=options.lazy, force=options.force)
        except PmemError as failure:
            failure.path = failure.path or record.directory
            failures.append(failure)
            continue
        state = {"state": "unmounted" if done.gone else "in use"}
        told.append({"directory": record.directory} | state | (done.traffic or {}))
    if options.json:
        print_json(told)
    else:
        for each in told:
            rest = "" if each["state"] == "unmounted" else ", and served until its last user ends"
            print(f"{each['directory']}: unmounted{rest}")
    if failures:
        raise failures[0]
    return 0
