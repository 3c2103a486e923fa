"""Dispatch without a network: who is asked for what, and which answers count."""

import base64
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.dispatch.output_guard import probe_gains
from bs_coordinator.dispatch.plan_requests import plan_requests
from bs_coordinator.dispatch.readiness import prove_nodes
from bs_coordinator.errors import AnswerError, DispatchError, ExpertsLostError, PlacementError
from bs_coordinator.nodes import admission
from bs_coordinator.nodes.registry import NodeRegistry
from common.clock import ManualClock
from wire import frames, status
from wire.errors import BrokerError
from wire.experts import ExpertId, parse_selector
from wire.frames import ErrorFrame, NodeDurations, PingFrame, PongFrame, RequestId, ResultFrame, Status, WorkFrame
from wire.manifest import Dims, ExpertEntry, FileEntry
from wire.status import DeviceFacts, Holding, NodeStatus
from wire.tensors import Array, WireDtype
from wire.topics import Topics
from wire.transport import Transport
from wire.transports.memory import MemoryBroker

DIMS = Dims(hidden=8, intermediate=16, layers=2, experts=4, top_k=2, vocab=10, max_positions=32)
TOPICS = Topics("test")


def _online(node: str, experts: str, *, boot: str = "b0", model: str = "m") -> NodeStatus:
    return NodeStatus(
        schema=1,
        node=node,
        boot_id=boot,
        state="online",
        since_unix_ms=1,
        holding=Holding(experts=experts, model_sha256=model, dims=DIMS, quantisation="fp32", resident_bytes=1),
    )


def _offline(node: str) -> NodeStatus:
    return NodeStatus(schema=1, node=node, boot_id="b0", state="offline", since_unix_ms=1)


def _fleet(**experts_by_node: str) -> NodeRegistry:
    fleet = NodeRegistry(DIMS, "m")
    for node, experts in experts_by_node.items():
        fleet.apply(_online(node, experts))
    return fleet


gates = st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=4, max_size=4), min_size=1, max_size=12).map(
    lambda rows: np.array(rows, np.float32)
)


@given(gates, st.integers(1, 5))
def test_a_plan_asks_for_every_chosen_expert_exactly_once(gate: Array, max_tokens: int) -> None:
    requests = plan_requests(gate, {0: "a", 1: "b", 2: "a", 3: "c"}, max_tokens=max_tokens)
    rebuilt = np.zeros_like(gate)
    for request in requests:
        assert 1 <= len(request.rows) <= max_tokens
        for expert, tokens, weights in request.experts:
            assert ExpertId(0, expert) in parse_selector(
                {"a": "L*:E0,2", "b": "L*:E1", "c": "L*:E3"}[request.node], layers=2, experts=4
            )
            assert (rebuilt[request.rows[tokens], expert] == 0).all()
            rebuilt[request.rows[tokens], expert] += weights
    np.testing.assert_array_equal(rebuilt, gate)


def test_an_expert_without_a_holder_is_named() -> None:
    with pytest.raises(PlacementError, match="L0-1:E3"):
        _Network(a="L*:E0-2").ask(np.eye(4, dtype=np.float32))


def test_a_fleet_follows_its_nodes() -> None:
    fleet = _fleet(a="L*:E0-1", b="L*:E1-3")
    assert fleet.missing() == []
    assert list(fleet.holders(ExpertId(0, 1))) == ["a", "b"]  # first the one with less to serve
    assert fleet.apply(_offline("a")) is True
    assert list(fleet.holders(ExpertId(0, 1))) == ["b"]
    assert fleet.missing() == [ExpertId(0, 0), ExpertId(1, 0)]
    assert fleet.apply(_online("b", "L*:E1-3", boot="b1")) is True  # restarted: knows nothing of our requests
    assert fleet.apply(_online("b", "L*:E1-3", boot="b1")) is False
    assert fleet.apply(_offline("stranger")) is False


def test_a_node_with_another_model_is_ignored_and_named() -> None:
    fleet = _fleet(a="L*:E0-2")
    fleet.apply(_online("x", "L*:E3", model="other"))
    assert fleet.missing() == [ExpertId(0, 3), ExpertId(1, 3)]
    assert "ignored x" in fleet.describe_missing()


class _Network:
    """Nodes that answer each token with gate weight × (expert index + 1), except as set by the attributes below."""

    def __init__(
        self, *, timeout_s: float = 0.2, last_holder_s: float | None = None, probes: bool = False,
        dtype: WireDtype = WireDtype.FP32, **experts_by_node: str,
    ) -> None:  # fmt: skip
        self.dtype = dtype
        self.clock = ManualClock()
        self.broker = MemoryBroker(clock=self.clock, latency_s=0.001)
        self.broker.handle("#", self._forward)
        self.react = self._react
        self.extra: list[tuple[str, bytes]] = []
        self.mute: set[str] = set()
        self.deaf: set[str] = set()
        self.absurd: set[str] = set()
        self.factor = 1e6
        self.copies = 1
        self.asked: list[tuple[str, tuple[int, ...]]] = []
        self.ids: list[RequestId] = []
        self.dispatcher = Dispatcher(
            self.broker.connect(self.broker.address, "bs"), TOPICS, NodeRegistry(DIMS, "m"),
            dtype=dtype, timeout_s=timeout_s,
            last_holder_s=last_holder_s, probe_gains=probe_gains(_manifest()) if probes else None, clock=self.clock,
        )  # fmt: skip
        for node, experts in experts_by_node.items():
            self.announce(_online(node, experts))
        self.dispatcher.pump(0.01)

    def announce(self, document: NodeStatus) -> None:
        self.broker.publish(TOPICS.status(document.node), status.encode_status(document))

    def _forward(self, topic: str, payload: bytes) -> None:
        for answer_topic, answer in self.react(topic, payload):
            self.broker.publish(answer_topic, answer)

    def _react(self, topic: str, payload: bytes) -> Iterable[tuple[str, bytes]]:
        node = topic.split("/")[4]
        if node in self.deaf:
            return
        frame = frames.decode(payload)
        if isinstance(frame, PingFrame):
            yield TOPICS.results(node), frames.encode(PongFrame(frame.id, bytes(frame.reply_bytes)))
            return
        assert isinstance(frame, WorkFrame)
        self.asked.append((node, tuple(s.expert for s in frame.experts)))
        self.ids.append(frame.id)
        yield from self.extra
        if node not in self.mute:
            output = np.zeros(frame.hidden.shape, np.float32)
            for expert, tokens, weights in frame.experts:
                output[tokens] += weights[:, None] * (expert + 1)
            if node in self.absurd:
                output *= self.factor
            for _ in range(self.copies):
                yield TOPICS.results(node), self.result(frame.id, frame.layer, output)

    def result(self, id: RequestId, layer: int, output: Array) -> bytes:
        return frames.encode(ResultFrame(id, layer, output, self.dtype, NodeDurations(1, 2, 3, 4)))

    def ask(self, gate: Array) -> Array:
        output, records, _ = self.dispatcher.apply(0, np.ones((len(gate), 8), np.float32), gate)
        assert all(r.round_trip_ns > 0 and r.durations == NodeDurations(1, 2, 3, 4) for r in records)
        return output


GATE = np.array([[0.75, 0.25, 0, 0], [0, 0, 0.5, 0.5], [0, 1, 0, 0]], np.float32)
EXPECTED = np.repeat(GATE @ np.array([[1], [2], [3], [4]], np.float32), 8, axis=1)


def test_answers_are_added_up() -> None:
    np.testing.assert_allclose(_Network(a="L*:E0-1", b="L*:E2-3").ask(GATE), EXPECTED)


def test_invalid_messages_are_counted_and_change_nothing() -> None:
    network = _Network(a="L*:E0-1", b="L*:E2-3")
    ones = np.ones((3, 8), np.float32)
    stale = network.result(RequestId(1, 2), 0, ones)
    network.ask(GATE)
    session, last, _ = network.ids[-1]  # a forger on the same broker could overhear it
    network.extra = [
        (TOPICS.results("a"), b"garbage"),
        (TOPICS.results("a"), stale),
        (TOPICS.results("b"), network.result(RequestId(session, last + 1), 0, ones)),  # b speaks for a
        (TOPICS.results("a"), stale[:20]),
        (TOPICS.status("a"), b"{"),
        (TOPICS.status("c"), b""),
        ("wdmoe/v1/test/results/a/b", b"?"),
    ]
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    assert {"length", "not awaited", "status status"} <= set(network.dispatcher.dropped)


def test_a_flood_of_statuses_takes_a_bounded_number_of_nodes_and_does_not_hurt_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "MOST_NODES", 6)
    network = _Network(a="L*:E0-1", b="L*:E2-3")
    for number in range(30):
        network.announce(_online(f"ghost{number}", "L0:E0"))
        network.announce(_online("ghost1", "L0:E0", boot=f"b{number}"))
    network.dispatcher.pump(0.01)
    assert len(network.dispatcher.registry.nodes) == 6
    assert network.dispatcher.dropped["status nodes"] == 26
    assert network.dispatcher.dropped["status rate"] == 31 - admission.BURST
    network.announce(_offline("b"))
    network.announce(_online("b", "L*:E2-3", boot="b1"))
    network.dispatcher.pump(0.01)
    assert network.dispatcher.registry.nodes["b"].boot_id == "b1"


def test_an_answer_counts_once() -> None:
    network = _Network(a="L*:E*")
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    replay = network.result(network.ids[-1], 0, np.full((3, 8), 99, np.float32))
    network.extra = [(TOPICS.results("a"), replay)]
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)


def test_silence_is_named_at_the_deadline() -> None:
    network = _Network(a="L*:E0-1", b="L*:E2-3")
    network.mute = {"b"}
    with pytest.raises(DispatchError, match=r"layer 0 from b within 0.2 s"):
        network.ask(GATE)


def test_a_node_that_leaves_is_named_at_once() -> None:
    network = _Network(a="L*:E0-1", b="L*:E2-3")
    network.mute = {"b"}
    network.extra = [(TOPICS.status("b"), status.encode_status(_offline("b")))]
    with pytest.raises(DispatchError, match="'b' left while it was computing L0:E2-3"):
        network.ask(GATE)


def test_a_nodes_refusal_is_an_error_with_its_reason() -> None:
    network = _Network(a="L*:E*")
    network.ask(GATE)
    network.mute = {"a"}
    session, last, _ = network.ids[-1]
    refusal = ErrorFrame(RequestId(session, last + 1), 0, Status.UNKNOWN_EXPERT, "does not hold L00:E0")
    network.extra = [(TOPICS.results("a"), frames.encode(refusal))]
    with pytest.raises(DispatchError, match=r"'a' refused.*unknown_expert, does not hold L00:E0"):
        network.ask(GATE)


def _experienced(**kwargs: Any) -> _Network:
    """A network whose nodes have answered often enough for deadlines to follow from predictions."""
    network = _Network(timeout_s=5.0, **kwargs)
    for _ in range(10):
        for node in network.dispatcher.registry.nodes:
            held = network.dispatcher.registry.nodes[node].unit_ids()
            gate = np.zeros((3, 4), np.float32)
            gate[:, held[0].expert] = 1
            network.dispatcher.ask(node, 0, np.ones((3, 8), np.float32), gate)
    network.asked.clear()
    return network


def test_a_silent_nodes_request_goes_to_another_holder() -> None:
    network = _experienced(a="L*:E0-1", b="L*:E2-3", c="L*:E0-3")
    network.mute = {"b"}
    began_s = network.clock.monotonic_s()
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    assert network.clock.monotonic_s() - began_s < 2  # the layer's own deadline is 5 s
    assert network.dispatcher.resent == {"overdue": 1}
    network.asked.clear()
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    assert "b" not in {node for node, _ in network.asked}  # it is left out from the next layer on


def test_a_failed_request_may_be_split_over_several_holders() -> None:
    network = _experienced(a="L*:E0-3", b="L*:E0-1", c="L*:E2-3")
    network.deaf = {"a"}
    for _ in range(3):
        np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    network.asked.clear()
    network.ask(GATE)
    assert sorted(network.asked) == [("b", (0, 1)), ("c", (2, 3))]


def test_a_node_that_leaves_is_replaced_at_once() -> None:
    network = _experienced(a="L*:E0-1", b="L*:E2-3", c="L*:E0-3")
    network.mute = {"b"}
    network.extra = [(TOPICS.status("b"), status.encode_status(_offline("b")))]
    began_s = network.clock.monotonic_s()
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    assert network.clock.monotonic_s() - began_s < 0.2
    assert network.dispatcher.resent == {"node_left": 1}


def test_the_first_answer_counts_and_the_late_one_is_dropped() -> None:
    network = _experienced(a="L*:E0-3", b="L*:E0-3")
    network.mute = {"a", "b"}
    asked: list[tuple[str, RequestId]] = []

    def late(topic: str, payload: bytes) -> Iterable[tuple[str, bytes]]:
        frame = frames.decode(payload)
        if isinstance(frame, WorkFrame):
            asked.append((topic.split("/")[4], frame.id))
            if len(asked) == 2:  # the first node was only slow: its answer comes just before the second one's
                for i, (node, id) in enumerate(asked):
                    yield TOPICS.results(node), network.result(id, 0, np.full(frame.hidden.shape, i + 1, np.float32))

    network.react = late
    gate = np.array([[1, 0, 0, 0]], np.float32)
    np.testing.assert_array_equal(network.ask(gate), np.ones((1, 8)))
    network.react = network._react
    network.mute = set()
    dropped = network.dispatcher.dropped["not awaited"]
    network.ask(gate)
    assert network.dispatcher.dropped["not awaited"] == dropped + 1


def test_lost_experts_are_reported_after_the_last_holders_time() -> None:
    network = _experienced(a="L*:E0-1", b="L*:E2-3", last_holder_s=0.5)
    network.deaf = {"b"}
    began_s = network.clock.monotonic_s()
    with pytest.raises(ExpertsLostError, match=r"'b' did not answer L0:E2-3 within 0\.5"):
        network.ask(GATE)
    assert 0.4 < network.clock.monotonic_s() - began_s < 2
    available = network.dispatcher.forecast(0).available
    assert available is not None
    assert available.tolist() == [True, True, False, False]
    with pytest.raises(ExpertsLostError, match="left out for now: 'b'"):
        network.ask(GATE)


def test_a_node_that_recovers_is_proven_by_a_ping_and_used_again() -> None:
    network = _experienced(a="L*:E0-1", b="L*:E2-3", last_holder_s=0.4)
    network.deaf = {"b"}
    with pytest.raises(ExpertsLostError):
        network.ask(GATE)
    network.deaf = set()
    deadline_s = network.clock.monotonic_s() + 5
    while network.dispatcher.forecast(0).available is not None and network.clock.monotonic_s() < deadline_s:
        network.dispatcher.measure_links(0.1)
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)


def test_measuring_finds_a_round_trip_that_changed_while_the_links_were_idle() -> None:
    network = _Network(a="L*:E0-1", b="L*:E2-3")
    for latency_s in (0.001, 0.01, 0.002):
        network.broker.latency_s = latency_s  # of requests; answers take no time
        network.dispatcher.measure_links(1.0)
        known = network.dispatcher.links.estimates(network.clock.monotonic_s())
        assert [one.link.rtt_s for one in known] == pytest.approx([latency_s] * 2, rel=0.25)


@pytest.mark.parametrize("copies", [1, 2])
def test_absurd_answers_put_a_node_into_quarantine(copies: int) -> None:
    network = _experienced(a="L*:E0-3", b="L*:E0-3")
    network.ask(GATE)
    liar = network.asked[-1][0]
    network.absurd, network.copies = {liar}, copies
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    assert network.dispatcher.dropped["absurd"] >= 1
    assert not network.dispatcher.health.usable(liar)


@pytest.mark.parametrize("factor", [1e3, 1e6, 1e12, 1e30])
@pytest.mark.parametrize("liar", ["a", "b"])
def test_absurd_answers_from_the_start_are_found_beside_honest_replicas(factor: float, liar: str) -> None:
    network = _Network(timeout_s=30.0, probes=True, a="L*:E*", b="L*:E*")
    network.absurd, network.factor = {liar}, factor
    for _ in range(5):
        np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    assert not network.dispatcher.health.usable(liar)
    assert network.dispatcher.health.usable("ab".replace(liar, ""))


@pytest.mark.parametrize("last_holder_s", [None, 0.4])
def test_an_absurd_answer_of_the_only_holder_is_an_error(last_holder_s: float | None) -> None:
    network = _Network(timeout_s=30.0, last_holder_s=last_holder_s, probes=True, a="L*:E*")
    network.absurd = {"a"}
    with pytest.raises(ExpertsLostError, match="'a' answered L0:E0-3 with nonsense: absurdly large values"):
        network.ask(GATE)


def test_large_answers_of_the_only_holder_are_believed() -> None:
    network = _Network(timeout_s=30.0, probes=True, a="L*:E*")
    network.absurd, network.factor = {"a"}, 400.0
    np.testing.assert_allclose(network.ask(GATE), 400 * EXPECTED)
    assert network.dispatcher.health.usable("a")


def test_an_output_names_its_largest_answer() -> None:
    network = _Network(timeout_s=30.0, probes=True, a="L*:E0-1", b="L*:E2-3")
    network.absurd, network.factor = {"b"}, 100.0
    largest = network.dispatcher.apply(0, np.ones((3, 8), np.float32), GATE).largest
    assert largest is not None
    assert largest.node == "b"
    assert 50 < largest.excess < 200
    network.dispatcher.quarantine("b", "infinite logits")
    assert not network.dispatcher.health.usable("b")


def test_of_two_large_answers_that_differ_the_smaller_counts() -> None:
    network = _Network(timeout_s=30.0, probes=True, a="L*:E*", b="L*:E*")
    factors = {"a": 400.0, "b": 9e4}  # whichever is asked first

    def react(topic: str, payload: bytes) -> Iterable[tuple[str, bytes]]:
        node = topic.split("/")[4]
        network.absurd, network.factor = {node}, factors.get(node, 1.0)
        return network._react(topic, payload)

    network.react = react
    np.testing.assert_allclose(network.ask(GATE), 400 * EXPECTED)
    assert network.dispatcher.health.usable("a")
    assert not network.dispatcher.health.usable("b")


def test_large_answers_that_two_nodes_agree_on_are_believed_and_learnt() -> None:
    network = _experienced(a="L*:E0-3", b="L*:E0-3")
    network.ask(GATE)
    network.absurd = {"a", "b"}
    for asked in (4, 2):  # two experts; the second time nobody else is asked for them
        network.asked.clear()
        np.testing.assert_allclose(network.ask(GATE[:1]), 1e6 * EXPECTED[:1])
        assert len(network.asked) == asked
    assert not network.dispatcher.dropped["absurd"]


def test_a_broker_that_hangs_up_on_every_request_ends_the_layer() -> None:
    joined = 0
    broker = MemoryBroker(clock=ManualClock(), latency_s=0.001)

    def hang_up(topic: str, payload: bytes) -> None:
        if isinstance(frames.decode(payload), WorkFrame):
            raise BrokerError("the broker closed the connection")

    def connect() -> Transport:
        nonlocal joined
        joined += 1
        transport = broker.connect(broker.address, "bs")
        transport.subscribe(TOPICS.status("+"))
        broker.publish(TOPICS.status("a"), status.encode_status(_online("a", "L*:E*")))  # the node's heartbeat
        return transport

    broker.handle(TOPICS.work("+"), hang_up)
    dispatcher = Dispatcher(
        connect(), TOPICS, NodeRegistry(DIMS, "m"), dtype=WireDtype.FP32, timeout_s=1.0, reconnect=connect,
        clock=broker.clock,
    )  # fmt: skip
    dispatcher.pump(0.01)
    with pytest.raises(BrokerError, match=r"layer 1 .*message_size_limit"):
        dispatcher.apply(1, np.ones((3, 8), np.float32), GATE)
    assert 2 <= joined <= 6


def test_the_fleet_knows_which_nodes_results_depend_on_the_batch() -> None:
    fleet = NodeRegistry(DIMS, "m")
    for node, found in (("a", True), ("b", None), ("c", False)):
        device = DeviceFacts(profile="pi4", because="told", provider="cpu", batch_invariant=found)
        sent = msgspec.structs.replace(_online(node, "L0-1:E0-3"), device=device)
        fleet.apply(status.decode_status(status.encode_status(sent), node))
    fleet.apply(_online("older", "L0-1:E0-3"))
    assert fleet.batch_variant() == ["c"]
    fleet.apply(_offline("c"))
    assert fleet.batch_variant() == []


def test_when_all_nodes_were_left_out_they_recover_while_nothing_is_asked() -> None:
    network = _experienced(a="L*:E0-1", b="L*:E2-3", last_holder_s=0.4)
    network.deaf = {"a", "b"}
    with pytest.raises(DispatchError):
        network.ask(GATE)
    network.deaf = set()
    network.dispatcher.pump(5.0)
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)


def _nonsense(kind: str, id: RequestId, layer: int, shape: tuple[int, ...]) -> bytes:
    output, dtype = np.ones(shape, np.float32), WireDtype.FP32
    match kind:
        case "another layer":
            layer += 1
        case "more rows":
            output = np.ones((shape[0] + 1, shape[1]), np.float32)
        case "another width":
            output = output[:, :4]
        case "another dtype":
            dtype = WireDtype.FP16
        case "NaN":
            output = output * np.float32(np.nan)
        case "infinity":
            output = output * np.float32(np.inf)
    return frames.encode(ResultFrame(id, layer, output, dtype, NodeDurations(1, 2, 3, 4)))


@pytest.mark.parametrize("kind", ["another layer", "more rows", "another width", "another dtype", "NaN", "infinity"])
@pytest.mark.parametrize("last_holder_s", [None, 0.4])
def test_nonsense_is_rerouted_at_once_and_leaves_a_node_out_for_minutes_even_if_it_restarts(
    kind: str, last_holder_s: float | None
) -> None:
    network = _Network(timeout_s=30.0, last_holder_s=last_holder_s, a="L*:E*", b="L*:E*")

    def react(topic: str, payload: bytes) -> Iterable[tuple[str, bytes]]:
        frame = frames.decode(payload)
        if topic == TOPICS.work("a") and isinstance(frame, WorkFrame):
            return [(TOPICS.results("a"), _nonsense(kind, frame.id, frame.layer, frame.hidden.shape))]
        return network._react(topic, payload)

    network.react = react
    began_s = network.clock.monotonic_s()
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    assert network.clock.monotonic_s() - began_s < 0.1
    network.announce(_online("a", "L*:E*", boot="b1"))
    network.dispatcher.pump(100.0)
    assert not network.dispatcher.health.usable("a")
    network.dispatcher.pump(600.0)
    assert network.dispatcher.health.usable("a")


def _not_finite(network: _Network, nodes: str, kind: str) -> None:
    """From now on `nodes` find no finite output: experts' own, or too large for fp16 on the wire."""

    def react(topic: str, payload: bytes) -> Iterable[tuple[str, bytes]]:
        frame, node = frames.decode(payload), topic.split("/")[4]
        if node not in nodes or not isinstance(frame, WorkFrame):
            return network._react(topic, payload)
        network.asked.append((node, ()))
        if kind == "own":
            return [(TOPICS.results(node), frames.encode(ErrorFrame(frame.id, frame.layer, Status.NOT_FINITE, "NaN")))]
        output = np.full(frame.hidden.shape, 7e4, np.float32)
        result = ResultFrame(frame.id, frame.layer, output, network.dtype, NodeDurations(1, 2, 3, 4))
        return [(TOPICS.results(node), frames.encode(result))]

    network.react = react


@pytest.mark.parametrize(("kind", "advice"), [("own", "can't continue this prompt"), ("wire", "--wire fp32")])
def test_where_no_holder_finds_a_finite_output_only_the_caller_fails(kind: str, advice: str) -> None:
    network = _Network(timeout_s=30.0, last_holder_s=0.4, dtype=WireDtype.FP16, a="L*:E*", b="L*:E*", c="L*:E*")
    _not_finite(network, "abc", kind)
    for _ in range(3):
        with pytest.raises(AnswerError, match=f"found no finite output of L0:E.*and so did others: .*{advice}"):
            network.ask(GATE)
    assert network.dispatcher.health.all_usable
    network.react = network._react
    np.testing.assert_allclose(network.ask(GATE), EXPECTED, rtol=1e-3)


@pytest.mark.parametrize("kind", ["own", "wire"])
def test_a_node_that_alone_finds_no_finite_output_is_quarantined(kind: str) -> None:
    network = _Network(timeout_s=30.0, dtype=WireDtype.FP16, a="L*:E*", b="L*:E*")
    _not_finite(network, "a", kind)
    np.testing.assert_allclose(network.ask(GATE), EXPECTED, rtol=1e-3)
    assert network.dispatcher.health.quarantined("a")


@pytest.mark.parametrize(("kind", "usable"), [("own", False), ("wire", True)])
def test_an_only_holder_that_finds_no_finite_output_is_not_quarantined(kind: str, usable: bool) -> None:
    network = _Network(timeout_s=30.0, last_holder_s=0.4, dtype=WireDtype.FP16, a="L*:E*")
    _not_finite(network, "a", kind)
    with pytest.raises(AnswerError, match="'a' found no finite output"):
        network.ask(GATE)
    assert network.dispatcher.health.usable("a") is usable
    network.react = network._react
    network.dispatcher.pump(2.0)
    np.testing.assert_allclose(network.ask(GATE), EXPECTED, rtol=1e-3)


@pytest.mark.parametrize(
    ("value", "reason"), [(65520.0, "--wire fp32"), (-7e4, "fp16 on the wire"), (np.nan, "not finite")]
)
def test_hidden_states_that_do_not_fit_the_wire_are_not_sent(value: float, reason: str) -> None:
    network = _Network(dtype=WireDtype.FP16, a="L*:E*")
    hidden = np.ones((len(GATE), 8), np.float32)
    hidden[1, 3] = value
    with pytest.raises(AnswerError, match=reason):
        network.dispatcher.begin(0, hidden, GATE)
    hidden[1, 3] = 65519.0
    network.dispatcher.apply(0, hidden, GATE)
    assert len(network.asked) == 1


def test_nonsense_for_a_request_that_is_not_awaited_changes_nothing() -> None:
    network = _Network(a="L*:E*")
    network.ask(GATE)
    stale = _nonsense("NaN", network.ids[-1], 0, (3, 8))
    other = _nonsense("NaN", RequestId(1, 2), 0, (3, 8))
    network.extra = [(TOPICS.results("a"), stale), (TOPICS.results("a"), other), (TOPICS.results("b"), other)]
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    assert network.dispatcher.health.usable("a")


def _manifest() -> Any:
    """What `prove_nodes` reads of a manifest; the nodes' expert e gives e + 1 everywhere."""

    def output(expert: int) -> str:
        return base64.b64encode(np.full(8, expert + 1, "<f2").tobytes()).decode()

    entries = [
        ExpertEntry(
            layer=layer, expert=e, files=(FileEntry(path="x", bytes=1, sha256="0" * 64),), probe_output=output(e),
            error=0.0, source_sha256="0" * 64,
        )
        for layer in range(2)
        for e in range(4)
    ]  # fmt: skip
    return SimpleNamespace(dims=DIMS, experts=entries)


@pytest.mark.parametrize("fault", ["mute", "deaf", "absurd"])
def test_a_spare_node_that_fails_its_proof_is_left_out_and_an_only_holder_is_an_error(fault: str) -> None:
    network = _Network(timeout_s=30.0, a="L*:E*", b="L*:E*")
    getattr(network, fault).add("a")
    assert list(prove_nodes(network.dispatcher, _manifest())) == ["b"]
    assert not network.dispatcher.health.usable("a")
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    network = _Network(timeout_s=30.0, a="L*:E0-1", b="L*:E*")
    getattr(network, fault).add("b")
    with pytest.raises(DispatchError, match="b"):
        prove_nodes(network.dispatcher, _manifest())
    network = _Network(timeout_s=30.0, a="L*:E*", b="L*:E*")
    getattr(network, fault).update("ab")
    with pytest.raises(DispatchError, match="b"):
        prove_nodes(network.dispatcher, _manifest())


def test_values_too_large_to_add_up_are_refused_from_the_first_answer_on() -> None:
    network = _Network(timeout_s=5.0, a="L*:E*", b="L*:E*")
    network.factor = 1e30
    network.absurd = {"a"}
    for _ in range(2):
        np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    assert network.dispatcher.health.usable("b")
    assert not network.dispatcher.health.usable("a")
    assert network.dispatcher.dropped["absurd"] == 1


def test_values_returned_by_getters_do_not_change_later() -> None:
    network = _Network(a="L*:E*")
    registry, dropped = network.dispatcher.registry, network.dispatcher.dropped
    before, holders = registry.nodes, registry.holders(ExpertId(0, 0))
    registry.apply(_offline("a"))
    network.broker.publish(TOPICS.results("a"), b"garbage")
    network.dispatcher.pump(0.1)
    assert list(before) == list(holders) == ["a"]
    assert not registry.nodes
    assert not dropped
    with pytest.raises(TypeError):
        before["b"] = before["a"]  # type: ignore[index]


def _pause(network: _Network, seconds: float) -> None:
    """Let the broker stand still from now on: what is sent meanwhile is delivered, in order, when it goes on."""
    resumes_s = network.clock.monotonic_s() + seconds

    def held(topic: str, payload: bytes) -> Iterable[tuple[str, bytes]]:
        for answer_topic, answer in network._react(topic, payload):
            left_s = max(0.0, resumes_s - network.clock.monotonic_s())
            network.broker.publish(answer_topic, answer, delay_s=left_s + network.broker.latency_s)
        return ()

    network.react = held


@pytest.mark.parametrize("last_holder_s", [None, 0.4])
@pytest.mark.parametrize("experts_by_node", [{"a": "L*:E0-1", "b": "L*:E2-3"}, {"a": "L*:E*", "b": "L*:E*"}])
def test_a_pause_of_the_network_costs_its_time_and_nothing_else(
    last_holder_s: float | None, experts_by_node: dict[str, str]
) -> None:
    network = _experienced(last_holder_s=last_holder_s, **experts_by_node)
    _pause(network, 3.0)
    began_s = network.clock.monotonic_s()
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    assert 3.0 <= network.clock.monotonic_s() - began_s < 3.5
    network.dispatcher.pump(0.6)
    assert network.dispatcher.describe_lost() == ""
    assert network.dispatcher.health.all_usable
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)


def test_a_pause_of_this_process_is_not_blamed_on_nodes() -> None:
    network = _experienced(a="L*:E0-1", b="L*:E2-3", last_holder_s=0.4)
    pending = network.dispatcher.begin(0, np.ones((3, 8), np.float32), GATE)
    network.clock.advance_ns(60 * 10**9)
    np.testing.assert_allclose(pending.result().output, EXPECTED)
    assert network.dispatcher.health.all_usable


def test_a_layer_whose_nodes_are_all_left_out_is_still_asked() -> None:
    network = _experienced(a="L*:E0-1", b="L*:E2-3", last_holder_s=0.4)
    for node in ("a", "b"):
        network.dispatcher.health.failed(node, network.clock.monotonic_s(), "was late")
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    assert "left out for now: 'a' (was late), 'b' (was late)" in network.dispatcher.describe_lost()


def test_nodes_in_quarantine_are_not_asked_even_if_there_are_no_others() -> None:
    for last_holder_s in (None, 0.4):
        network = _experienced(a="L*:E*", last_holder_s=last_holder_s)
        network.dispatcher.health.failed("a", network.clock.monotonic_s(), "nonsense", quarantine=True)
        with pytest.raises(ExpertsLostError, match="nonsense"):
            network.ask(GATE)


@pytest.mark.parametrize("last_holder_s", [None, 0.4])
def test_a_new_node_that_never_answers_costs_seconds_if_others_hold_its_experts(last_holder_s: float | None) -> None:
    network = _Network(timeout_s=30.0, last_holder_s=last_holder_s, a="L*:E*", b="L*:E*")
    network.mute = {"a"}  # it still answers pings
    began_s = network.clock.monotonic_s()
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)
    assert network.clock.monotonic_s() - began_s < 5
    assert not network.dispatcher.health.usable("a")


@pytest.mark.parametrize("last_holder_s", [None, 0.4])
def test_a_slow_new_node_is_waited_for_if_no_other_holds_its_experts(last_holder_s: float | None) -> None:
    network = _Network(timeout_s=30.0, last_holder_s=last_holder_s, a="L*:E*")
    network.broker.latency_s = 12.0
    np.testing.assert_allclose(network.ask(GATE), EXPECTED)
