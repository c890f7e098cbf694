"""What devices report of their own health: ``ndctl list -DH`` and ``cxl list -MH``.

A device that reports how much of its life is used wears: that is evidence for storage, at 0 % as at
90 %, because a region does not change its nature as it ages. A device that cannot tell leaves the
value out, or says 255. One that only warns of the life that is left wears as well.

Invariants:
1. What a program prints is untrusted: a value of the wrong type or out of range is as good as left
   out, and what is no object at all is no device.
2. A machine without the programs, or without such devices, has no health; that is no error.

What this does not do: change thresholds or inject errors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pmemkit.bus.nature import Evidence
from pmemkit.bus.programs import Run, json_of, run_program
from pmemkit.errors import NotSupported, PmemError

__all__ = ["Health", "health_evidence", "health_of_machine", "parse_health"]

_NOT_REPORTED: Final = 255
_LIFE: Final = 100
_COUNT_MOST: Final = 1 << 64
_TEXT: Final = 32
_TIMEOUT_SECONDS: Final = 20.0
_COMMANDS: Final = (("nmem", ("ndctl", "list", "-DH")), ("mem", ("cxl", "list", "-MH")))
"""What the names of devices begin with, and who asks those devices."""

_STATES: Final = ("ok", "non-critical", "critical", "fatal")
_WARNINGS: Final = ("warning", "critical")
_ALARMS: Final = {
    "alarm_temperature": "temperature",
    "alarm_controller_temperature": "temperature of the controller",
    "alarm_spares": "spare capacity",
    "maintenance_needed": "maintenance needed",
    "performance_degraded": "performance degraded",
    "hw_replacement_needed": "replacement needed",
    "media_not_ready": "media not ready",
    "media_persistence_lost": "persistence lost",
    "media_data_lost": "data lost",
    "media_powerloss_persistence_loss": "a power failure would lose persistence",
    "media_shutdown_persistence_loss": "a shutdown would lose persistence",
    "media_persistence_loss_imminent": "loss of persistence imminent",
    "media_powerloss_data_loss": "a power failure would lose data",
    "media_shutdown_data_loss": "a shutdown would lose data",
    "media_data_loss_imminent": "loss of data imminent",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What one device reports; ``None`` is what it does not."""

    dev: str
    """``nmem0`` or ``mem0``."""
    source: str
    """The command that said so."""
    state: str | None = None
    life_used: int | None = None
    """Percent; above 100: past the life that it was rated for."""
    life_warning: str | None = None
    """``warning`` or ``critical``, where that is said of the life that is used."""
    spares: int | None = None
    """Percent."""
    temperature: float | None = None
    """Degrees Celsius."""
    alarms: tuple[str, ...] = ()
    dirty_shutdowns: int | None = None
    dirty: bool = False
    """The last shutdown was."""
    errors: int | None = None
    """Corrected and uncorrected, volatile and persistent together."""


def health_of_machine(
    devices: Iterable[str], run: Run = run_program
) -> tuple[dict[str, Health], list[str]]:
    """What these devices of this machine report, by name, and why some of it is not known. A
    program runs only where there is a device that it could ask."""
    names = tuple(devices)
    found: dict[str, Health] = {}
    notes = []
    for kind, command in _COMMANDS:
        if not any(name.startswith(kind) for name in names):
            continue
        try:
            printed = run(command, timeout_seconds=_TIMEOUT_SECONDS)
            found |= parse_health(json_of(printed, command[0]), " ".join(command))
        except NotSupported as missing:
            notes.append(f"health of devices: {missing.message}")
        except PmemError as failure:
            notes.append(f"health of devices is not known: {failure.message}")
    return found, notes


def parse_health(rows: list[dict[str, Any]], source: str) -> dict[str, Health]:
    """Devices that report anything, by name. A listing of several kinds of things is an object that
    has its dimms or memory devices inside."""
    found: dict[str, Health] = {}
    for row in rows:
        for key in ("dimms", "memdevs"):
            inside = row.get(key)
            if isinstance(inside, list):
                found |= parse_health([each for each in inside if isinstance(each, dict)], source)
        dev = row.get("dev", row.get("memdev"))
        health = row.get("health")
        if isinstance(dev, str) and dev and isinstance(health, Mapping) and health:
            found[dev] = _health(dev[:_TEXT], source, health)
    return found


def _health(dev: str, source: str, row: Mapping[str, Any]) -> Health:
    state = row.get("health_state")
    life = _count(row, "life_used_percentage", "life_used_percent")
    warning = row.get("ext_life_used")
    temperature = row.get("temperature_celsius", row.get("temperature"))
    warm = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    errors = [_count(row, name) for name in ("volatile_errors", "pmem_errors")]
    known = [each for each in errors if each is not None]
    return Health(
        dev=dev,
        source=f"{source}, {dev}",
        state=state if state in _STATES else None,
        life_used=life if life is not None and life < _NOT_REPORTED else None,
        life_warning=warning if warning in _WARNINGS else None,
        spares=_count(row, "spares_percentage", most=_LIFE),
        # NVDIMM-N that do not measure it say 255, too.
        temperature=temperature if warm and -273 <= temperature < _NOT_REPORTED else None,
        alarms=tuple(text for name, text in _ALARMS.items() if row.get(name) is True),
        dirty_shutdowns=_count(row, "dirty_shutdowns", "shutdown_count"),
        dirty=row.get("shutdown_state") == "dirty",
        errors=sum(known) if known else None,
    )


def _count(row: Mapping[str, Any], *names: str, most: int = _COUNT_MOST) -> int | None:
    """The first of these that is a count."""
    for name in names:
        value = row.get(name)
        if type(value) is int and 0 <= value <= most:
            return value
    return None


def health_evidence(health: Health) -> list[Evidence]:
    """What a device's report says of its nature, and the rest of it to be shown."""
    found = []
    if health.life_used is not None:
        text = f"{health.life_used} % of its life is used: it wears"
        if health.life_used > _LIFE:
            text = f"{health.life_used} % of its life is used, more than it was rated for"
        found.append(Evidence(health.source, text, "storage", "wear", life_used=health.life_used))
    if health.life_warning is not None:
        text = f"life used: {health.life_warning}"
        found.append(Evidence(health.source, text, "storage", "wear"))
    told = [
        text
        for text, known in (
            (f"state {health.state}", health.state is not None),
            (f"{health.spares} % spare capacity left", health.spares is not None),
            (f"{health.temperature} °C", health.temperature is not None),
            ("the last shutdown was dirty", health.dirty),
            (f"{health.dirty_shutdowns} dirty shutdowns", health.dirty_shutdowns is not None),
            (f"{health.errors} errors", health.errors is not None),
            (f"alarms: {', '.join(health.alarms)}", bool(health.alarms)),
        )
        if known
    ]
    if told:
        found.append(Evidence(health.source, ", ".join(told), None, "hint"))
    return found
