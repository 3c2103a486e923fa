"""Results of a run as a table and as a JSON document."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from common.files import atomic_write
from testbed import facts
from testbed.bench.rows import WARM_UP, Result, Row, Settings, Skipped, Throughput

SCHEMA = 2


def print_results(results: Sequence[Result], console: Console) -> None:
    """Print a line per row, then the parts of rows, and skipped rows with reasons."""
    table = Table(pad_edge=False, padding=(0, 1))
    table.add_column("benchmark")
    table.add_column("floor")
    for column in ("ours ms", "floor ms", "ratio", "95 %", "wanted"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in results:
        if isinstance(row, Row):
            low, high = row.interval()
            ours, floor = (statistics.median(s) for s in (row.ours_ms, row.floor_ms))
            wanted = f"≤ {row.target:g}" if row.target else ""
            table.add_row(
                row.name, row.floor, f"{ours:.3f}", f"{floor:.3f}", f"{row.ratio:.2f}", f"{low:.2f}–{high:.2f}", wanted
            )
    if table.row_count:
        console.print(table)
    rates = [row for row in results if isinstance(row, Throughput)]
    if rates:
        console.print(_rates(rates))
    for row in results:
        if isinstance(row, Row) and row.parts:
            parts = ", ".join(f"{cause} {ms:.2f}" for cause, ms in row.parts.items())
            console.print(f"{row.name}: ms {parts}", highlight=False)
        elif isinstance(row, Skipped):
            console.print(f"skipped: {row.name}: {row.why}", style="yellow", highlight=False)


def _rates(rows: Sequence[Throughput]) -> Table:
    """Tokens per second as llama-bench writes them."""
    table = Table("model", "nodes", "test", "t/s", box=box.MARKDOWN)
    for row in rows:
        facts = (str(row.parameters.get(name, "")) for name in ("bundle", "nodes"))
        table.add_row(*facts, row.name, f"{row.mean:.2f} ± {row.deviation:.2f}")
    return table


def write_document(results: dict[str, list[Result]], settings: Settings, out: Path) -> None:
    """Write all results so far, with every sample, as JSON."""
    document: dict[str, Any] = {
        **facts.result_header(SCHEMA),
        "parameters": {
            "broker": settings.broker,
            "samples": settings.samples,
            "busy": settings.busy,
            "device": settings.device,
            "warm_up": WARM_UP,
            "stays_awake": settings.stays_awake,
        },
        "rows": [],
        "throughputs": [],
        "skipped": [],
    }
    for section, rows in results.items():
        for row in rows:
            if isinstance(row, Skipped):
                document["skipped"].append({"section": section, **row._asdict()})
            elif isinstance(row, Throughput):
                rates = {"mean": row.mean, "standard_deviation": row.deviation}
                document["throughputs"].append({"section": section, **asdict(row), **rates})
            else:
                facts_of_row = {"ratio": row.ratio, "ratio_95": row.interval()}
                document["rows"].append({"section": section, **asdict(row), **facts_of_row})
    with atomic_write(out) as file:
        file.write(json.dumps(document).encode())
