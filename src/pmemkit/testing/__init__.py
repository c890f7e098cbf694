"""Public test suites: run them on your own media, devices and layers.

- :class:`DeviceSuite`: the conformance suite of block devices; :class:`ReferenceDevice` is the
  slow, obvious device that :func:`device_state_machine` compares with.
- :class:`RecordedDevice` and :func:`check_streams`: durability under power failure, on the
  recording medium ``pmemkit._native.media.Recording`` (here as :class:`Recording`).
- :func:`check_change`: a change of namespaces or labels on an image, under the same failures.
- :class:`ProviderSuite`: the conformance suite of providers of memory.
- :func:`noop_stack` and :func:`traced_stack`: stacks of layers that change nothing.
- :class:`TransmissionClient`: the server's own path to the media, without a handshake.

:class:`DeviceSuite` needs pytest and :func:`device_state_machine` Hypothesis: these two are loaded
when they are first used, everything else works without.
"""

import importlib
from typing import TYPE_CHECKING

from pmemkit._native import media as _media
from pmemkit.testing.crash import (
    DurabilityError,
    DurabilityOracle,
    RecordedDevice,
    Request,
    RequestTarget,
    check_streams,
    random_requests,
)
from pmemkit.testing.protocols import Backdoor, BlockChannel
from pmemkit.testing.reference import ReferenceDevice
from pmemkit.testing.stacks import TracedStack, noop_stack, traced_stack
from pmemkit.testing.transmission import TransmissionClient

if TYPE_CHECKING:
    from pmemkit.testing.device_suite import DeviceSuite
    from pmemkit.testing.images import check_change
    from pmemkit.testing.provider_suite import ProviderSuite
    from pmemkit.testing.state_machine import device_state_machine

Recording = _media.Recording

_LATE = {
    "DeviceSuite": "device_suite",
    "check_change": "images",
    "ProviderSuite": "provider_suite",
    "device_state_machine": "state_machine",
}

__all__ = [
    "Backdoor",
    "BlockChannel",
    "DeviceSuite",
    "DurabilityError",
    "DurabilityOracle",
    "ProviderSuite",
    "RecordedDevice",
    "Recording",
    "ReferenceDevice",
    "Request",
    "RequestTarget",
    "TracedStack",
    "TransmissionClient",
    "check_change",
    "check_streams",
    "device_state_machine",
    "noop_stack",
    "random_requests",
    "traced_stack",
]


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
    globals()[name] = value
    return value
