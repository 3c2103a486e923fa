"""Floods of statuses and telemetry, by one node and by many names: what is kept stays bounded, others are not hurt."""

import pytest

from bs_coordinator.nodes import admission
from bs_coordinator.nodes.admission import BURST, MOST_NODES, PER_S, Admission
from bs_coordinator.nodes.telemetry_inbox import TelemetryInbox
from wire.transport import Message


def test_a_node_may_send_a_burst_and_then_a_limited_rate() -> None:
    gate = Admission("statuses")
    taken = [not gate.refusal("a", 100.0 + i / 1000) for i in range(1000)]
    assert taken[:BURST] == [True] * BURST
    assert sum(taken) == BURST + int(0.999 * PER_S)
    assert gate.refusal("a", 100.999) == "rate"
    assert gate.refusal("b", 100.999) == ""  # the others are not concerned
    for second in range(200):  # as a node does that sends one status each second
        assert gate.refusal("c", 200.0 + second) == ""
    assert gate.refusal("a", 300.0) == ""


@pytest.mark.parametrize("moments", [[5.0] * 40, [5.0 - i for i in range(40)], [1e18] * 40])
def test_a_clock_that_stands_still_or_goes_back_gives_no_more_messages(moments: list[float]) -> None:
    gate = Admission("statuses")
    assert sum(not gate.refusal("a", now_s) for now_s in moments) == BURST


def test_the_number_of_nodes_is_limited_and_known_nodes_keep_their_places(caplog: pytest.LogCaptureFixture) -> None:
    gate = Admission("statuses")
    assert gate.refusal("honest", 0.0) == ""
    refused = [gate.refusal(f"ghost{i}", 0.0) for i in range(3 * MOST_NODES)]
    assert refused.count("nodes") == 2 * MOST_NODES + 1
    assert gate.refusal("honest", 3.0) == ""
    assert len(caplog.records) == 1


def test_telemetry_of_many_names_and_of_one_that_floods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MOST_NODES", 8)
    inbox = TelemetryInbox()
    for i in range(50):
        inbox.put("flood", Message("t", b"{}", arrived_ns=10**9 + i))
        inbox.put(f"ghost{i}", Message("t", b"{}", arrived_ns=10**9 + i))
    assert inbox.dropped == {"rate": 50 - BURST, "nodes": 43}
