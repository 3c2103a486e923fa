"""Under which conditions a run was measured, and which of them make its numbers doubtful. Pure."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct

from testbed.plan.schema import Plan
from testbed.run_directory.cell_rows import CellRows

_PI_THROTTLED_NOW = 0xF
"""Flags of `vcgencmd get_throttled` that are set now: under-voltage, capped frequency, throttled, too hot."""


class Condition(Struct, frozen=True, kw_only=True):
    """One condition that a reader should know before any number.

    Attributes:
        kind: `load`, `throttled`, `alerts`, `links`, `attempts` or `pauses`.
        severe: the numbers are doubtful; otherwise they hold, but not everywhere.
        text: a sentence for people.
    """

    kind: str
    severe: bool
    text: str


@dataclass(slots=True)
class CellConditions:
    """What the cells say.

    Attributes:
        cells: number of complete cells.
        loads: load of the base station's machine at the end of each cell that recorded it.
        throttled: number of cells during which a node was slowed down, by node.
        truth: whether any cell knows how its links were configured.
    """

    cells: int = 0
    loads: list[float] = field(default_factory=list)
    throttled: Counter[str] = field(default_factory=Counter)
    truth: bool = False

    def add(self, rows: CellRows) -> None:
        """Take in one cell."""
        self.cells += 1
        if rows.marker.load_1min is not None:
            self.loads.append(rows.marker.load_1min)
        self.throttled.update(_throttled_nodes(rows.table("telemetry")))
        if "link_samples" in rows.tables:
            self.truth |= bool(pc.any(pc.equal(rows.tables["link_samples"]["kind"].cast(pa.string()), "truth")).as_py())


def conditions(
    plan: Plan, machine: Mapping[str, Any], events: Sequence[Mapping[str, Any]], cells: CellConditions
) -> list[Condition]:
    """The conditions of a run, the severe ones first.

    Args:
        machine: facts of the base station's machine when the run began.
        events: of the run, in order.
    """
    found = [*_load(machine, cells), *_throttling(events, cells), *_alerts(events), *_rest(plan, events, cells)]
    return sorted(found, key=lambda condition: not condition.severe)


def _load(machine: Mapping[str, Any], cells: CellConditions) -> Iterator[Condition]:
    cpus, began = (_number(machine.get(name)) for name in ("cpus", "load_1min"))
    if not cpus:
        return
    texts = [f"it was {began:.1f} when the run began"] if began is not None and began > cpus else []
    if above := [load for load in cells.loads if load > cpus]:
        texts.append(f"up to {max(above):.1f} in {len(above)} of {cells.cells} cells")
    if texts:
        yield Condition(
            kind="load", severe=True,
            text=f"Load above the number of CPUs of the base station, {cpus:.0f}: {', '.join(texts)}. Processes waited "
            "for a CPU, so times are longer than on an idle machine.",
        )  # fmt: skip


def _throttling(events: Sequence[Mapping[str, Any]], cells: CellConditions) -> Iterator[Condition]:
    texts = [f"{node} in {count} of {cells.cells} cells" for node, count in sorted(cells.throttled.items())]
    if (times := _base_station_throttled(events)) > 0:
        texts.append(f"the base station {times} times while cells ran")
    elif times < 0:
        texts.append("the base station")
    if texts:
        yield Condition(
            kind="throttled", severe=True,
            text=f"Throttled: {', '.join(texts)}. A processor was slowed down by heat or its power supply.",
        )  # fmt: skip


def _base_station_throttled(events: Sequence[Mapping[str, Any]]) -> int:
    """How often the base station's kernel counted throttling during sessions; −1 if only flags of a Pi tell it."""
    times, before, flags = 0, None, False
    for event in events:
        power = event.get("power")
        if not isinstance(power, Mapping):
            continue
        count = _number(power.get("throttle_count"))
        if event["event"] == "run_finished" and count is not None and before is not None:
            times += max(0, int(count - before))
        before = count
        try:
            flags |= bool(int(str(power.get("throttled", "0")), 16) & _PI_THROTTLED_NOW)
        except ValueError:
            continue
    return times or -flags


def _alerts(events: Sequence[Mapping[str, Any]]) -> Iterator[Condition]:
    raised = Counter((str(e["kind"]), str(e["subject"])) for e in events if e["event"] == "alert")
    if raised:
        kinds: dict[str, list[str]] = {}
        for kind, subject in raised:
            kinds.setdefault(kind, []).append(subject)
        what = "; ".join(f"{kind}: {', '.join(subjects)}" for kind, subjects in kinds.items())
        text = f"{raised.total()} alert{'s' * (raised.total() > 1)} while cells ran ({what}); see Alerts."
        yield Condition(kind="alerts", severe=True, text=text)


def _rest(plan: Plan, events: Sequence[Mapping[str, Any]], cells: CellConditions) -> Iterator[Condition]:
    failed = sum(event["event"] == "cell_failed" for event in events)
    if failed:
        text = f"{failed} attempt{'s' * (failed > 1)} at cells failed and {'were' if failed > 1 else 'was'} repeated."
        yield Condition(kind="attempts", severe=False, text=text)
    if pauses := sum(event["event"] == "run_resumed" for event in events):
        text = f"The run was interrupted and resumed {'once' if pauses == 1 else f'{pauses} times'}."
        yield Condition(kind="pauses", severe=False, text=text)
    if not cells.cells or not any(workload.where == "distributed" for workload in plan.workloads):
        return
    if plan.network == "localhost":
        text = "All nodes ran on the base station's machine: they share its CPUs, and no radio was measured."
        yield Condition(kind="links", severe=False, text=text)
    elif not cells.truth:
        text = "Link truth unknown: how fast the links really were is not known, so their estimates can't be checked."
        yield Condition(kind="links", severe=False, text=text)


def _throttled_nodes(telemetry: pa.Table) -> set[str]:
    """Nodes that reported throttling, or whose kernel counted some while the cell ran."""
    found: set[str] = set()
    counts: dict[str, list[int]] = {}
    columns = (telemetry[name].to_pylist() for name in ("node", "throttling_now", "throttle_events"))
    for node, now, count in zip(*columns, strict=True):
        if now:
            found.add(node)
        if count is not None:
            counts.setdefault(node, []).append(count)
    return found | {node for node, values in counts.items() if values[-1] > values[0]}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
