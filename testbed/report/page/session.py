"""Sections of a report about a run's sessions: baselines, alerts and operators' notes."""

import time
from collections.abc import Iterator
from statistics import median

from testbed.report.page.document import Figure, Section, Table
from testbed.report.page.labels import NOTHING
from testbed.run_directory.baselines import Baseline, read_baselines
from testbed.run_directory.directory import NOTE, RunDir


def session_sections(run: RunDir) -> list[Section]:
    """Sections for whatever baselines, alerts and notes the run has."""
    events = run.events()
    notes = [event for event in events if event["event"] == NOTE]
    return [*_baselines(read_baselines(run)), *_alerts(events), *_notes(notes)]


def clock(unix_ns: int) -> str:
    """A time in words, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(unix_ns / 1e9)) + " UTC"


def _baselines(baselines: list[Baseline]) -> Iterator[Section]:
    if not baselines:
        return
    measured = [b for b in baselines if b.token_ns]
    keys = list(dict.fromkeys((b.session, b.kind, b.over) for b in measured))
    rows = []
    for session, kind, over in keys:
        phases = {b.phase: b for b in measured if (b.session, b.kind, b.over) == (session, kind, over)}
        start, end = phases.get("start"), phases.get("end")
        before, after = (median(phase.token_ns) if phase else 0 for phase in (start, end))
        change = f"× {after / before:.2f}" if before and end else NOTHING
        rows.append([str(session), kind, over, *_times(start), *_times(end), change])
    header = (
        *("session", "baseline", "over", "first token, ms", "token, ms"),
        *("first token at the end, ms", "token at the end, ms", "end / start"),
    )
    blocks: list[str | Table | Figure] = [
        "One short answer with top-k before the first cell of each session and after the last; token times are "
        "medians. A change between two baselines affected all policies.",
        Table(header, rows, 3),
    ]
    why_not = dict.fromkeys(f"{b.kind}: {b.why_not}" for b in baselines if b.why_not)
    if why_not:
        blocks.append(f"Not measured: {'; '.join(why_not)}.")
    yield Section("Baselines", blocks)


def _times(baseline: Baseline | None) -> list[str]:
    if baseline is None or baseline.first_token_ns is None:
        return [NOTHING, NOTHING]
    return [f"{baseline.first_token_ns / 1e6:.1f}", f"{median(baseline.token_ns) / 1e6:.1f}"]


def _alerts(events: list[dict[str, object]]) -> Iterator[Section]:
    begun: dict[tuple[object, object], dict[str, object]] = {}
    rows: list[list[str]] = []

    def row(alert: dict[str, object], seconds: str) -> list[str]:
        return [clock(_ns(alert)), str(alert["kind"]), str(alert["subject"]), str(alert["detail"]), seconds]

    for event in events:
        if event["event"] == "alert":
            begun[event["kind"], event["subject"]] = event
        elif event["event"] == "alert_over" and (alert := begun.pop((event["kind"], event["subject"]), None)):
            rows.append(row(alert, f"{(_ns(event) - _ns(alert)) / 1e9:.0f}"))
        elif event["event"] == "run_resumed":
            rows += [row(alert, NOTHING) for alert in begun.values()]
            begun.clear()
    rows += [row(alert, NOTHING) for alert in begun.values()]
    if rows:
        header = ("time", "alert", "machine", "detail", "duration, s")
        yield Section("Alerts", [f"{len(rows)} alerts were raised:", Table(header, sorted(rows), 4)])


def _notes(notes: list[dict[str, object]]) -> Iterator[Section]:
    if notes:
        rows = [[clock(_ns(n)), str(n["text"]), str(n.get("photo", NOTHING))] for n in notes]
        yield Section("Operators' notes", [Table(("time", "note", "photo"), rows, 3)])


def _ns(event: dict[str, object]) -> int:
    return int(str(event["unix_ns"]))
