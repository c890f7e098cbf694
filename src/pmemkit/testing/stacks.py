"""Stacks of layers that change nothing, and what their traces must say."""

from __future__ import annotations

from dataclasses import dataclass

from pmemkit._native import block

__all__ = ["TracedStack", "noop_stack", "traced_stack"]


def noop_stack(below: block.Device, layers: int) -> block.Device:
    """``layers`` no-op layers on top of a device."""
    for _ in range(layers):
        below = block.noop(below)
    return below


@dataclass(frozen=True)
class TracedStack:
    """A stack with a trace layer on top of each no-op layer."""

    device: block.Device
    sinks: tuple[block.Trace, ...]
    """What each trace layer saw, the top layer's first."""

    def calls(self) -> list[tuple[str, int, int, int, str]]:
        """What the layers saw, which must be the same calls in the same order for all of them."""
        seen = [sink.entries() for sink in self.sinks]
        for depth, entries in enumerate(seen):
            if entries != seen[0]:
                raise AssertionError(
                    f"layer {depth} below the top saw {entries}, the top one {seen[0]}"
                )
        return seen[0]


def traced_stack(below: block.Device, layers: int) -> TracedStack:
    """``layers`` times a no-op layer with a trace layer on top of it."""
    sinks = []
    for _ in range(layers):
        sink = block.Trace()
        below = block.trace(block.noop(below), sink)
        sinks.append(sink)
    return TracedStack(below, tuple(reversed(sinks)))
