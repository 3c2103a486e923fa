"""How far a run is, from its folder alone."""

import time
from dataclasses import dataclass

from testbed.experiment.rundir import RunDir


@dataclass(frozen=True, slots=True)
class Status:
    """State of a run.

    Attributes:
        failures: error lines of cells that are not complete, by cell; the latest of each.
        failed_attempts: of all cells, also of those that are complete by now.
        gaps_s: pauses before each resumption.
        left_s: what the missing cells will take, from the complete ones; None before the first.
    """

    cells: int
    complete: int
    running: bool
    current: str
    failures: dict[str, str]
    failed_attempts: int
    gaps_s: tuple[float, ...]
    left_s: float | None
    quiet_s: float


def status_of(run: RunDir) -> Status:
    """Look at a run's folder."""
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
        left_s=sum(seconds) / len(seconds) * (len(cells) - len(complete)) if seconds else None,
        quiet_s=(time.time_ns() - events[-1]["unix_ns"]) / 1e9 if events else 0.0,
    )


def lines(status: Status) -> list[str]:
    """For people."""
    if status.running:
        state = f"running {status.current}" if status.current else "running"
    elif status.complete == status.cells:
        state = "complete"
    else:
        state = f"stopped {status.quiet_s:.0f} s ago"
    text = [f"{status.complete} of {status.cells} cells complete, {state}"]
    if status.left_s and status.complete < status.cells:
        text.append(f"about {status.left_s / 60:.1f} min of cells are left")
    if status.gaps_s:
        text.append(f"resumed {len(status.gaps_s)} times after {', '.join(f'{gap:.0f}' for gap in status.gaps_s)} s")
    text.append(
        f"{status.failed_attempts} failed attempts, {len(status.failures)} cells without a result because of them"
    )
    return text + [f"  {cell}: {error}" for cell, error in status.failures.items()]
