"""Alerts begin and end once, whatever is seen."""

from hypothesis import given
from hypothesis import strategies as st

from testbed.experiment.alerts import Alerts, Key, MachineState, RunnerState
from testbed.plan.limits import RunLimits

LIMITS = RunLimits()
_seen = st.builds(
    MachineState,
    name=st.sampled_from(["a", "b"]),
    silent_s=st.floats(0, 60),
    gone=st.sampled_from(["", "stopped"]),
    celsius=st.none() | st.floats(0, 120),
    throttled=st.sampled_from([None, "", "under-voltage"]),
    disk_free_bytes=st.none() | st.integers(0, 2**40),
    clock_ms=st.none() | st.floats(-1e6, 1e6),
)
_progress = st.builds(
    RunnerState,
    quiet_s=st.none() | st.floats(0, 1e4),
    growth_bytes=st.none() | st.integers(-(2**32), 2**32),
    broker=st.sampled_from(["", "gone"]),
)


@given(st.lists(st.tuples(st.lists(_seen, max_size=3, unique_by=lambda s: s.name), _progress), max_size=8))
def test_beginnings_and_ends_take_turns(history: list[tuple[list[MachineState], RunnerState]]) -> None:
    alerts = Alerts(LIMITS)
    on: set[Key] = set()
    for machines, progress in history:
        for change in alerts.update(machines, progress):
            assert change.begins == (change.key not in on)
            on ^= {change.key}
        assert on == set(alerts.on)
    assert all(not change.begins for change in alerts.update([], RunnerState()))
    assert not alerts.on


def _kinds(alerts: Alerts, seen: MachineState | None = None, progress: RunnerState | None = None) -> dict[str, bool]:
    return {c.key.kind: c.begins for c in alerts.update([seen] if seen else [], progress or RunnerState())}


def test_a_limit_ends_with_a_margin() -> None:
    alerts = Alerts(LIMITS)
    assert _kinds(alerts, MachineState("n", celsius=81)) == {"hot": True}
    assert _kinds(alerts, MachineState("n", celsius=79)) == {}
    assert _kinds(alerts, MachineState("n", celsius=74)) == {"hot": False}
    assert _kinds(alerts, MachineState("n", disk_free_bytes=500 << 20)) == {"disk_low": True}
    assert _kinds(alerts, MachineState("n", disk_free_bytes=520 << 20)) == {}
    assert _kinds(alerts, MachineState("n", disk_free_bytes=700 << 20)) == {"disk_low": False}


def test_a_lost_nodes_other_alerts_end() -> None:
    alerts = Alerts(LIMITS)
    assert _kinds(alerts, MachineState("n", celsius=90, throttled="under-voltage")) == {"hot": True, "throttled": True}
    lost = _kinds(alerts, MachineState("n", silent_s=13, celsius=90, throttled="under-voltage"))
    assert lost == {"node_lost": True, "hot": False, "throttled": False}


def test_a_clock_is_only_off_beyond_its_bound() -> None:
    alerts = Alerts(LIMITS)
    assert _kinds(alerts, MachineState("n", clock_ms=90_000, clock_error_ms=89_600)) == {}
    assert _kinds(alerts, MachineState("n", clock_ms=-90_000, clock_error_ms=1500)) == {"clock_off": True}


def test_the_runner_itself() -> None:
    alerts = Alerts(LIMITS)
    assert _kinds(alerts, progress=RunnerState(quiet_s=601)) == {"no_progress": True}
    assert _kinds(alerts, progress=RunnerState(growth_bytes=2 << 30)) == {"no_progress": False, "memory_growth": True}
    assert _kinds(alerts, progress=RunnerState(growth_bytes=1000 << 20)) == {}
    assert _kinds(alerts, progress=RunnerState(growth_bytes=100 << 20, broker="gone")) == {
        "memory_growth": False,
        "broker_lost": True,
    }
