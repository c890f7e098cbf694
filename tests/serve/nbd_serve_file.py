"""Serves a file over NBD until SIGTERM: the server process of the tests."""

import argparse
import os
from pathlib import Path

from pmemkit._native import block, media
from pmemkit.serve import Export, NbdServer, listen_activated, listen_unix


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("image", type=Path)
    parser.add_argument("--unix")
    parser.add_argument("--delay-reads", type=float, default=0.0)
    parser.add_argument("--drain-seconds", type=float, default=10.0)
    options = parser.parse_args()
    fd = os.open(options.image, os.O_RDWR)
    device = block.raw(media.map_file(fd, os.fstat(fd).st_size, granularity="page"))
    os.close(fd)
    if options.delay_reads:
        device = block.delay(device, ops="read", seconds=options.delay_reads)
    listeners = listen_activated()
    if options.unix:
        listeners.append(listen_unix(options.unix))
    server = NbdServer([Export("disk", device)], drain_seconds=options.drain_seconds)
    server.run(listeners)


if __name__ == "__main__":
    main()
