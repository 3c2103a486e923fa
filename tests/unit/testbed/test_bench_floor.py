"""The decode floor and its causes add up; fitted lines find the lines that points were made from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_coordinator.engine.step_records import DispatchRecord, LayerRecord, StepRecord
from testbed.bench.floor import Alone, FloorLink, causes_ms, floor_ms
from testbed.bench.sections.scaling import fit_line
from wire.frames import NodeDurations

times = st.integers(0, 20_000_000)
LINK = FloorLink(rtt_ms=5.0, mbps=100.0)
ALONE = Alone(trunk_ms=12.0, head_ms=9.0, compute_ms=lambda experts: 0.2 * experts)


def _dispatch(round_trip_ns: int, compute_ns: int, experts: int, down: int, up: int) -> DispatchRecord:
    durations = NodeDurations(queue_ns=1000, decode_ns=20_000, compute_ns=compute_ns, encode_ns=10_000)
    return DispatchRecord("n", tuple(range(experts)), 1, 0, round_trip_ns, durations, down, up, 0)


dispatches = st.builds(_dispatch, times, times, st.integers(1, 4), st.integers(100, 90_000), st.integers(100, 90_000))
layers = st.builds(
    lambda trunk, extra, asked: LayerRecord(
        0, trunk, max((d.round_trip_ns for d in asked), default=0) + extra, (), tuple(asked)
    ),
    times,
    times,
    st.lists(dispatches, max_size=3),
)


@given(st.lists(layers, min_size=1, max_size=5), times, times)
def test_floor_and_causes_add_up_to_the_step(parts: list[LayerRecord], head: int, between: int) -> None:
    total = head + between + sum(layer.trunk_ns + layer.dispatch_ns for layer in parts)
    step = StepRecord("decode", 0, 1, total, head, tuple(parts))
    causes = causes_ms(step, LINK, ALONE)
    assert floor_ms(step, LINK, ALONE) + sum(causes.values()) == pytest.approx(total / 1e6)
    assert causes["between layers"] == pytest.approx(between / 1e6, abs=1e-6)


def test_the_floor_is_what_the_design_says() -> None:
    slow, fast = _dispatch(9, 9, 2, 10_000, 2_500), _dispatch(9, 9, 1, 100, 100)
    step = StepRecord("decode", 0, 1, 0, 0, (LayerRecord(0, 0, 0, (), (slow, fast)), LayerRecord(1, 0, 0, (), (fast,))))
    # 12,500 bytes at 100 Mbit/s are 1 ms, 200 bytes 0.016 ms.
    assert floor_ms(step, LINK, ALONE) == pytest.approx(12 + 9 + (5 + 1 + 0.4) + (5 + 0.016 + 0.2))


@given(st.floats(-5, 5), st.floats(-3, 3), st.booleans())
def test_a_line_through_points_of_a_line_is_that_line(intercept: float, slope: float, relative: bool) -> None:
    x = np.array([1.0, 4.0, 16.0, 64.0, 256.0])
    y = 2000 + intercept + slope * x
    fit = fit_line(list(x), list(y), relative=relative)
    assert (fit.intercept, fit.slope) == pytest.approx((2000 + intercept, slope), abs=1e-6)
