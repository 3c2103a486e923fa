"""Estimated links against configured ones, from samples as runs hold them."""

import pyarrow as pa
import pytest

from testbed.report.numbers.link_errors import link_errors, link_series
from testbed.report.numbers.link_probes import LinkProbes, count_probes, link_probes
from testbed.run_directory.machine_tables import LINK_SAMPLES, LinkSample
from testbed.run_directory.step_tables import LATENCY

BEGIN_NS = 1_795_516_823_759_000_981


def _cell(profile: str, begin_s: float, rows: list[tuple[float, str, str, str, float]]) -> pa.Table:
    """Rows of (seconds, node, kind, quantity, value)."""
    unix_ns = [BEGIN_NS + int((begin_s + s) * 1e9) for s, *_ in rows]
    made = LINK_SAMPLES.build([LinkSample(ns, ns, *row[1:]) for ns, row in zip(unix_ns, rows, strict=True)])
    return made.append_column("profile", pa.repeat(profile, len(rows)))


def test_each_estimate_is_held_against_what_was_configured_last() -> None:
    step = _cell(
        "step",
        0,
        [
            (0.0, "pi1", "estimate", "down_mbps", 1.0),  # before any truth: not judged
            (0.5, "pi1", "truth", "down_mbps", 50.0),
            (1.0, "pi1", "estimate", "down_mbps", 45.0),
            (1.0, "pi1", "estimate", "down_std_mbps", 5.0),
            (2.0, "pi1", "truth", "down_mbps", 20.0),
            (2.0, "pi1", "estimate", "down_mbps", 30.0),
            (3.0, "pi1", "estimate", "down_mbps", 21.0),
            (3.0, "pi2", "truth", "down_mbps", 80.0),
        ],
    )
    (error,) = link_errors([step])
    assert (error.profile, error.node, error.quantity, error.samples) == ("step", "pi1", "down_mbps", 3)
    assert error.truth == 20.0
    assert error.error_share == pytest.approx(0.1)  # of 0.1, 0.5 and 0.05


def test_cells_follow_each_other_without_their_pause_and_without_a_line_between() -> None:
    rows = [(0.0, "pi1", "truth", "rtt_ms", 4.0), (2.0, "pi1", "truth", "rtt_ms", 5.0)]
    late = [(0.0, "pi1", "estimate", "rtt_ms", 5.0), (1.0, "pi1", "truth", "rtt_ms", 5.0)]
    cells = [_cell("walk", 0, rows), _cell("walk", 3600, late)]
    (series,) = link_series(cells)
    assert series.truth.s.tolist() == pytest.approx([0, 2, 2, 4, 4])
    assert series.truth.value.tolist() == pytest.approx([4, 5, float("nan"), 5, float("nan")], nan_ok=True)
    # The truth of the cell before an hour's pause says nothing about this one.
    assert link_errors(cells) == []


def test_without_samples_there_is_nothing() -> None:
    assert link_series([]) == []
    assert link_errors([]) == []


def test_the_share_of_probes_is_that_of_all_bytes_on_the_link() -> None:
    counts = [("probe_down_bytes", 900.0), ("probe_up_bytes", 100.0), ("probes_refused", 3.0)]
    samples = _cell(
        "wifi",
        0,
        [(float(s), "pi1", "count", name, 50.0 + s * step) for s in (0, 1, 2) for name, step in counts]
        + [(1.0, "pi1", "estimate", "down_mbps", 20.0)],
    )
    requests = [{"node": "pi1", "down_bytes": 3000, "up_bytes": 2000}, {"node": "@bs", "down_bytes": 0, "up_bytes": 0}]
    latency = pa.Table.from_pylist(requests, LATENCY.schema)
    total = count_probes("wifi", samples, latency)
    total.update(count_probes("wifi", samples, latency.slice(0, 0)))  # a second cell
    assert link_probes(total) == [
        LinkProbes(profile="wifi", node="pi1", probe_bytes=4000, frame_bytes=5000, share=4 / 9, refused=12)
    ]
    assert count_probes("wifi", LINK_SAMPLES.schema.empty_table(), latency) == {}
