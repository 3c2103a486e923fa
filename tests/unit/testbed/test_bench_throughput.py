"""Rows of tokens per second: the table as llama-bench writes it, and the document."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from testbed.bench.document import print_results, write_document
from testbed.bench.rows import Settings, Throughput

RATES = (38.0, 41.5, 40.25, 39.75, 40.5)


def test_a_row_is_printed_and_stored_with_its_mean_and_standard_deviation(tmp_path: Path) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=80)
    row = Throughput("pp512", RATES, {"bundle": "demo-int4-b32", "nodes": 8})
    print_results([row], console)
    head, rule, line = (part.strip() for part in shown.getvalue().strip().splitlines())
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["model", "nodes", "test", "t/s"]
    assert set(rule) <= set("|-: ")
    mean, deviation = np.mean(RATES), np.std(RATES, ddof=1)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["demo-int4-b32", "8", "pp512", f"{mean:.2f} ± {deviation:.2f}"]
    settings = Settings(broker="embedded", samples=10, folder=tmp_path, console=console)
    write_document({"llama-bench": [row]}, settings, tmp_path / "bench.json")
    (stored,) = json.loads((tmp_path / "bench.json").read_text())["throughputs"]
    assert (stored["section"], stored["name"]) == ("llama-bench", "pp512")
    assert stored["tokens_per_s"] == list(RATES)
    assert (stored["mean"], stored["standard_deviation"]) == pytest.approx((mean, deviation))
