"""The benchmark of observers, with the two-layer model on real nodes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from testbed.bench.rows import Row, Settings
from testbed.bench.sections import observers
from wire.manifest import Scheme


@pytest.mark.slow
def test_arms_take_turns(
    tiny_bundle: Callable[[Scheme], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observers, "demo_bundle", lambda scheme, console: tiny_bundle(scheme))
    rows = list(observers.measure(Settings("embedded", 12, tmp_path / "bench", Console(quiet=True))))
    assert [row.name.partition(",")[0] for row in rows] == ["decode with metrics", "decode with metrics and traces"]
    for row in rows:
        assert isinstance(row, Row)
        assert len(row.ours_ms) == len(row.floor_ms) >= 12
        assert all(took_ms > 0 for took_ms in (*row.ours_ms, *row.floor_ms))
        assert all(ms > 0 for ms in row.parts.values())
    metrics, traces = rows
    assert isinstance(metrics, Row)
    assert isinstance(traces, Row)
    # Both are compared with the same steps, and only spans are encoded.
    assert metrics.floor_ms == traces.floor_ms
    assert traces.parts.keys() - metrics.parts.keys() == {"encoding in the background, per step"}
