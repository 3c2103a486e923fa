"""The clock that tests move by hand."""

import pytest

from common.clock import SYSTEM_CLOCK, Clock, ManualClock


def test_a_manual_clock_moves_only_when_advanced_and_all_its_readings_move_together() -> None:
    clock: Clock = ManualClock(unix_ns=1000)
    assert (clock.monotonic_s(), clock.perf_ns(), clock.unix_ns()) == (0.0, 0, 1000)
    clock.sleep_s(2.5)
    clock.sleep_s(-1.0)
    assert (clock.monotonic_s(), clock.perf_ns(), clock.unix_ns()) == (2.5, 2_500_000_000, 2_500_001_000)


def test_a_manual_clock_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        ManualClock().advance_ns(-1)


def test_the_system_clock_never_sleeps_for_a_negative_time() -> None:
    clock: Clock = SYSTEM_CLOCK
    before_ns = clock.perf_ns()
    clock.sleep_s(-1.0)
    assert clock.perf_ns() >= before_ns
