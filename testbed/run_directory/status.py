"""The progress of a run, read from its folder."""

import time
from dataclasses import dataclass
from typing import Any

from testbed.run_directory.directory import RunDir


@dataclass(frozen=True, slots=True)
class Status:
    """Progress of a run.

    Attributes:
        complete: number of complete cells.
        current: the cell in progress; empty if there is none.
        failures: last error of each cell that failed and is still incomplete, by cell.
        failed_attempts: failed attempts at any cell, complete by now or not.
        gaps_s: length of the pause before each resumption.
        left_s: expected time of the missing cells, from the mean of the complete ones; None before the first.
        alerts: alerts that are on, or were when the runner ended: `kind subject: detail`.
        quiet_s: time since the last event.
    """

    cells: int
    complete: int
    running: bool
    current: str
    failures: dict[str, str]
    failed_attempts: int
    gaps_s: tuple[float, ...]
    left_s: float | None
    alerts: tuple[str, ...]
    quiet_s: float


def status_of(run: RunDir) -> Status:
    """Read the progress of a run from its folder."""
    cells = run.cells()
    complete = [cell for cell in cells if run.is_complete(cell)]
    done = {cell.id for cell in complete}
    events = run.events()
    names = {cell.id: str(cell) for cell in cells}
    failed = [e for e in events if e["event"] == "cell_failed"]
    started = [e for e in events if e["event"] == "cell_started"]
    running = run.is_running()
    seconds = [run.marker(cell).seconds for cell in complete]
    return Status(
        cells=len(cells),
        complete=len(complete),
        running=running,
        current=started[-1]["what"] if running and started and started[-1]["cell"] not in done else "",
        failures={names[e["cell"]]: e["error"] for e in failed if e["cell"] in names and e["cell"] not in done},
        failed_attempts=len(failed),
        gaps_s=tuple(e["gap_s"] for e in events if e["event"] == "run_resumed"),
        left_s=(sum(seconds) / len(seconds) + run.plan.pause_s) * (len(cells) - len(complete)) if seconds else None,
        alerts=_alerts(events),
        quiet_s=(time.time_ns() - events[-1]["unix_ns"]) / 1e9 if events else 0.0,
    )


def _alerts(events: list[dict[str, Any]]) -> tuple[str, ...]:
    on: dict[tuple[str, str], str] = {}
    for event in events:
        if event["event"] in ("run_started", "run_resumed"):
            on.clear()  # a new session raises its own alerts
        elif event["event"] == "alert":
            on[event["kind"], event["subject"]] = event["detail"]
        elif event["event"] == "alert_over":
            on.pop((event["kind"], event["subject"]), None)
    return tuple(f"{kind} {subject}: {detail}" for (kind, subject), detail in on.items())


def lines(status: Status) -> list[str]:
    """The progress in words, a line each."""
    if status.running:
        state = f"running {status.current}" if status.current else "running"
    elif status.complete == status.cells:
        state = "complete"
    else:
        state = f"stopped {status.quiet_s:.0f} s ago"
    text = [f"{status.complete} of {status.cells} cells complete, {state}"]
    if status.left_s and status.complete < status.cells:
        text.append(f"about {status.left_s / 60:.1f} min left")
    if status.gaps_s:
        times = "once" if len(status.gaps_s) == 1 else f"{len(status.gaps_s)} times"
        text.append(f"resumed {times} after {', '.join(f'{gap:.0f}' for gap in status.gaps_s)} s")
    text += [f"alert: {alert}" for alert in status.alerts]
    text.append(f"{status.failed_attempts} failed attempts, {len(status.failures)} cells failed")
    return text + [f"  {cell}: {error}" for cell, error in status.failures.items()]
