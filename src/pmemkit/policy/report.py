"""A plan for people, and as JSON.

The JSON is ``{"steps": […], "refused": […], "deferred": […], "notes": […], "seconds": S}``, each
step with the fields of :class:`pmemkit.policy.model.Step` that have a value.

What this does not do: decide anything.
"""

import io
import shutil
import sys
from typing import Any

from pmemkit.policy.model import Plan, Step, as_plain
from pmemkit.units import format_size

__all__ = ["plan_json", "plan_table", "step_words"]

_WIDTH = 120


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; every list is there, empty or not."""
    return {
        "steps": [as_plain(each) for each in plan.steps],
        "refused": [as_plain(each) for each in plan.refused],
        "deferred": list(plan.deferred),
        "notes": list(plan.notes),
        "seconds": round(sum(each.seconds for each in plan.steps), 1),
    }


def step_words(step: Step) -> str:
    """A step as a command line would have it."""
    params = [f"{key}={_shown(key, value)}" for key, value in step.params.items()]
    return " ".join([step.verb, step.target, *params])


def _shown(key: str, value: Any) -> str:
    if key in ("size", "align", "granularity") and isinstance(value, int):
        return format_size(value).replace(" ", "")
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value)


def plan_table(plan: Plan) -> str:
    """The plan as text: a table of the steps, and what else a reader must know."""
    parts = []
    if plan.steps:
        parts.append(_table(plan))
        about = sum(each.seconds for each in plan.steps)
        losses = sum(bool(each.destroys) for each in plan.steps)
        lost = f"; {losses} of them destroy data" if losses else ""
        parts.append(f"{len(plan.steps)} steps, about {about:.0f} seconds{lost}")
    elif not plan.refused:
        parts.append("Nothing is to be done.")
    parts += [f"refused: {each.region}: {each.why}" for each in plan.refused]
    parts += [f"later: {each}" for each in plan.deferred]
    parts += [f"note: {each}" for each in plan.notes]
    return "\n".join(parts)


def _table(plan: Plan) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("#", "step", "why", "destroys", "costs", "undo"):
        table.add_column(title, justify="right" if title == "#" else "left", overflow="fold")
    for step in plan.steps:
        costs = []
        if step.page_map is not None:
            costs.append(f"page map {format_size(step.page_map.size)} in {step.page_map.place}")
        if step.wear is not None:
            costs.append(step.wear)
        costs.append(f"{step.seconds:g} s")
        table.add_row(
            str(step.number),
            step_words(step),
            step.why,
            "; ".join(step.destroys) or "-",
            "; ".join(costs),
            step.reverse,
        )
    wide = shutil.get_terminal_size((_WIDTH, 24)).columns if sys.stdout.isatty() else _WIDTH
    console = Console(file=io.StringIO(), width=wide, highlight=False, markup=False)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())
