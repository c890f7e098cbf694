"""Providers of bytes: what can be mapped, what a store on it needs to be durable, who may have it.

:func:`open_medium` opens a regular file, a file on a DAX mount, a block device, a device DAX, a
memfd, huge pages or anonymous memory; :func:`decide` says which granularity holds and why.
"""

from pmemkit.media.granularity import Backing, Decision, Granularity, Platform, decide
from pmemkit.media.platform import LinuxPlatform
from pmemkit.media.provider import OpenedMedium, open_medium

__all__ = [
    "Backing",
    "Decision",
    "Granularity",
    "LinuxPlatform",
    "OpenedMedium",
    "Platform",
    "decide",
    "open_medium",
]
