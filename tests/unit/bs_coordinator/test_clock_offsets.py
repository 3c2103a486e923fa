"""Clock estimates against clocks and delays that are known because they are made up here."""

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bs_coordinator.nodes.clock_offsets import ClockSample, NodeClock

S, MS, US = 1_000_000_000, 1_000_000, 1_000
T0 = 1_790_000_000 * S


def probe(at_ns: int, *, offset_ns: int, ppm: float, down_ns: int, up_ns: int, node_ns: int = 20 * US) -> ClockSample:
    """A probe that leaves at T0 + `at_ns` of our clock; the node's is ahead by `offset_ns` at T0."""

    def node_clock(ours: int) -> int:
        return ours + offset_ns + round(ppm * 1e-6 * (ours - T0))

    sent = T0 + at_ns
    arrived_there, left = sent + down_ns, sent + down_ns + node_ns
    return ClockSample("n", sent, node_clock(arrived_there), node_clock(left), left + up_ns)


delays = st.integers(10 * US, 200 * MS)
moments = st.lists(st.tuples(st.integers(0, 600 * S), delays, delays), min_size=1, max_size=60)
offsets = st.integers(-3600 * S, 3600 * S)
# Slightly within the limit: our own clock, which the estimator measures time by, is the reference here.
drifts = st.floats(-490, 490)


@settings(deadline=None)
@given(moments, offsets, drifts, st.integers(-60 * S, 660 * S))
def test_the_true_offset_lies_within_the_bounds(
    probes: list[tuple[int, int, int]], offset_ns: int, ppm: float, when: int
) -> None:
    clock = NodeClock([probe(at, offset_ns=offset_ns, ppm=ppm, down_ns=d, up_ns=u) for at, d, u in probes])
    assert clock.steady
    found = clock.at(T0 + when)
    truth = offset_ns + ppm * 1e-6 * when
    # 1 µs: offsets of an hour in ns, with their fractions, are rounded in floats.
    assert found.low_ns - US <= truth <= found.high_ns + US
    assert found.low_ns <= found.offset_ns <= found.high_ns
    assert abs(truth - found.offset_ns) <= found.error_ns + US
    if clock.drift_low_ppm is not None and clock.drift_high_ppm is not None:
        # Each range's end is off by at most 1 µs over at least a few seconds.
        assert clock.drift_low_ppm - 1 <= ppm <= clock.drift_high_ppm + 1


@settings(deadline=None)
@given(moments, offsets, drifts)
def test_true_delays_lie_within_the_bounds_of_one_way_figures(
    probes: list[tuple[int, int, int]], offset_ns: int, ppm: float
) -> None:
    samples = [probe(at, offset_ns=offset_ns, ppm=ppm, down_ns=d, up_ns=u) for at, d, u in probes]
    clock = NodeClock(samples)
    for sample, (_, down_ns, up_ns) in zip(samples, probes, strict=True):
        found = clock.one_way(sample)
        # The clock runs on during the probe: at most 490 ppm of it.
        slack = 0.001 * (down_ns + up_ns) + US
        assert abs(found.down_ns - down_ns) <= found.error_ns + slack
        assert abs(found.up_ns - up_ns) <= found.error_ns + slack
        assert found.down_ns + found.up_ns == pytest.approx(down_ns + up_ns, abs=slack)


@settings(deadline=None)
@given(moments, offsets)
def test_bounds_of_one_probe_are_its_round_trip(probes: list[tuple[int, int, int]], offset_ns: int) -> None:
    at, down_ns, up_ns = probes[0]
    sample = probe(at, offset_ns=offset_ns, ppm=0.0, down_ns=down_ns, up_ns=up_ns)
    found = NodeClock([sample]).at(sample.at_unix_ns)
    # And what it may drift by meanwhile.
    assert down_ns + up_ns <= found.high_ns - found.low_ns <= 1.001 * (down_ns + up_ns + MS)
    assert found.offset_ns == pytest.approx(offset_ns + (down_ns - up_ns) / 2, abs=1)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), offsets, st.floats(-100, 100))
def test_drift_is_found_among_busy_probes(seed: int, offset_ns: int, ppm: float) -> None:
    # Five minutes, one probe a second; nine of ten wait behind work, in one direction, for up to 80 ms.
    rng = random.Random(seed)  # noqa: S311 - delays, no secret
    samples = []
    for second in range(300):
        down, up = (2 * MS + int(rng.expovariate(1 / (100 * US))) for _ in range(2))
        down += rng.randrange(80 * MS) if rng.random() < 0.9 else 0
        samples.append(probe(second * S, offset_ns=offset_ns, ppm=ppm, down_ns=down, up_ns=up))
    clock = NodeClock(samples)
    assert clock.drift_ppm is not None
    # Of 9 probes in each of 32 stretches the quickest is off by about 4 ms in its middle, over 5 minutes.
    assert abs(clock.drift_ppm - ppm) < 30
    # The best of 300 probes has a round trip of about 4 ms: ± 2 ms, and what the offset drifts away meanwhile.
    middle = clock.at(T0 + 150 * S)
    assert abs(middle.offset_ns - (offset_ns + ppm * 1e-6 * 150 * S)) < 5 * MS


def test_quiet_probes_give_a_sharp_drift() -> None:
    rng = random.Random(1)  # noqa: S311 - delays, no secret
    samples = [
        probe(second * S, offset_ns=90 * S, ppm=37.0, down_ns=900 * US + rng.randrange(100 * US), up_ns=900 * US)
        for second in range(600)
    ]
    clock = NodeClock(samples)
    assert clock.drift_ppm == pytest.approx(37.0, abs=0.5)
    # ± 0.95 ms at both ends of ten minutes: 3.2 ppm each way.
    assert clock.drift_low_ppm is not None
    assert clock.drift_high_ppm is not None
    assert 0 < clock.drift_high_ppm - clock.drift_low_ppm < 7
    found = clock.at(T0 + 300 * S)
    assert found.offset_ns == pytest.approx(90 * S + 37e-6 * 300 * S, abs=0.1 * MS)
    assert found.error_ns < 1.1 * MS


@settings(deadline=None)
@given(st.integers(1, 59), st.sampled_from([-1, 1]), st.integers(200 * MS, 100 * S), drifts)
def test_a_clock_that_was_set_is_noticed(after_s: int, sign: int, step_ns: int, ppm: float) -> None:
    def at(second: int) -> ClockSample:
        offset = sign * step_ns if second >= after_s else 0
        return probe(second * S, offset_ns=offset, ppm=ppm, down_ns=2 * MS, up_ns=3 * MS)

    # What 500 ppm explain in a minute is no step; 200 ms is more.
    clock = NodeClock([at(second) for second in range(61)])
    assert not clock.steady
    # Beside a probe its own bounds hold.
    for second in (0, 60):
        found = clock.at(at(second).at_unix_ns)
        truth = (sign * step_ns if second else 0) + ppm * 1e-6 * second * S
        assert found.low_ns - US <= truth <= found.high_ns + 3 * US


@settings(deadline=None)
@given(st.lists(st.integers(0, 4 * S), min_size=2, max_size=10, unique=True), drifts)
def test_too_short_for_a_drift(moments: list[int], ppm: float) -> None:
    assume(max(moments) - min(moments) < 4.9 * S)
    clock = NodeClock([probe(at, offset_ns=0, ppm=ppm, down_ns=MS, up_ns=MS) for at in moments])
    assert clock.drift_ppm is None
    assert clock.steady
