"""The dispatcher's decisions, without a dispatcher: whatever happens to a layer's requests, in whatever order."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_coordinator.dispatch.layer_requests import LayerLimits, LayerRequests, NodeAnswer, Sent, State, SubRequest
from bs_coordinator.dispatch.plan_requests import chosen_experts, plan_requests
from bs_coordinator.dispatch.state_machine import (
    MAX_CONNECTION_LOSSES,
    AnswerReceived,
    CheckNetwork,
    Command,
    ConnectionLost,
    CountDropped,
    Doubt,
    ErrorReceived,
    Event,
    LearnGain,
    LocalFailed,
    MarkFailed,
    NodeLeft,
    NotFiniteReceived,
    Planned,
    Send,
    StopLocal,
    TimePassed,
    transition,
)
from bs_coordinator.engine.step_records import DispatchRecord
from bs_coordinator.errors import AnswerError, DispatchError, ExpertsLostError
from bs_coordinator.nodes.registry import LOCAL_NODE
from wire.errors import BrokerError
from wire.frames import NodeDurations, RequestId, Status
from wire.tensors import Array

NODES = ["a", "b", "c", "d", LOCAL_NODE]
EXPERTS = 4
TIMEOUT_S, OVERDUE_S = 10.0, 1.0
MANY_STEPS = 200


class _World:
    """Nodes that hold experts, and one layer's requests to them: executes commands, and keeps account of them."""

    def __init__(self, gate: Array, holders: Sequence[Sequence[str]], *, last_holder_s: float = TIMEOUT_S) -> None:
        self.holders = holders
        self.unusable: set[str] = set()
        self.now_s = self.heard_s = 0.0
        self.silent = False
        self.give_up_s = last_holder_s
        self.sent: list[tuple[str, int, int]] = []
        self.commands: list[Command] = []
        self._ids = itertools.count()
        hidden = np.ones((len(gate), 2), np.float32)
        self.layer = LayerRequests(3, hidden, gate, LayerLimits(TIMEOUT_S, last_holder_s, max_tokens=3))

    def plan(self) -> None:
        first = {e: self.holders[e][0] for e in chosen_experts(self.layer.gate)}
        self.sent.clear()
        self.happens(Planned(plan_requests(self.layer.gate, first, max_tokens=3), self.now_s))

    def happens(self, event: Event) -> None:
        for command in transition(self.layer, event, self._find_holders):
            self.commands.append(command)
            match command:
                case Send(sub_requests):
                    for sub in sub_requests:
                        self._send(sub)
                case MarkFailed(node, _, _):
                    self.unusable.add(node)
                case StopLocal():
                    self.unusable.add(LOCAL_NODE)

    def _find_holders(self, layer: int, experts: Sequence[int], tried: frozenset[str]) -> Mapping[int, str] | None:
        assert layer == self.layer.layer
        free = {e: [n for n in self.holders[e] if n not in tried and n not in self.unusable] for e in experts}
        return {e: nodes[0] for e, nodes in free.items()} if all(free.values()) else None

    def _send(self, sub: SubRequest) -> None:
        for part in sub.request.experts:
            self.sent += [(sub.node, part.expert, int(row)) for row in sub.request.rows[part.tokens]]
        sent_ns = round(1e9 * self.now_s)
        id = RequestId(0, next(self._ids))
        self.layer.mark_sent(
            sub, Sent(id, sent_ns, sent_ns, 1, 1, 1, 0, self.now_s + OVERDUE_S, self.now_s, self.give_up_s)
        )

    def answer(self, sub: SubRequest, *, suspicious: bool = False, gain: float = 1.0, factor: float = 1.0) -> None:
        """The right answer: gate weight × (expert + 1), sums of which are exact in any order."""
        output = sub.request.gate(*self.layer.gate.shape) @ np.arange(1, EXPERTS + 1, dtype=np.float32)
        rows = factor * np.repeat(output[sub.request.rows][:, None], 2, axis=1)
        record = DispatchRecord(sub.node, (), len(rows), 0, 1, NodeDurations(), 1, 1, 1)
        self.happens(AnswerReceived(sub, NodeAnswer(rows.astype(np.float32), record), gain, suspicious))

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        if not self.silent:
            self.heard_s = self.now_s
        self.happens(TimePassed(self.now_s, self.heard_s))

    @property
    def expected(self) -> Array:
        output = self.layer.gate @ np.arange(1, EXPERTS + 1, dtype=np.float32)
        return np.repeat(output[:, None], 2, axis=1).astype(np.float32)


gates = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=EXPERTS, max_size=EXPERTS), min_size=1, max_size=7
).map(lambda rows: np.array(rows, np.float32))
holder_lists = st.lists(
    st.lists(st.sampled_from(NODES), unique=True, min_size=1), min_size=EXPERTS, max_size=EXPERTS
)  # fmt: skip
happenings = [
    "answer",
    "answer",
    "suspicious",
    "infinite",
    "NaN",
    "refusal",
    "departure",
    "overdue",
    "duplicate",
    "loss",
]


@given(gates, holder_lists, st.sampled_from([TIMEOUT_S, 2.5]), st.data())
def test_for_any_events_every_row_is_answered_once_or_there_is_an_error(
    gate: Array, holders: list[list[str]], last_holder_s: float, data: st.DataObject
) -> None:
    world = _World(gate, holders, last_holder_s=last_holder_s)
    world.plan()
    layer = world.layer
    every: list[SubRequest] = []
    for _ in range(MANY_STEPS):
        every += [sub for sub in layer.open() if sub not in every]
        if layer.done or layer.error:
            break
        in_flight = layer.in_flight()
        assert in_flight, "a layer that is neither done nor failed waits for something"
        sub = data.draw(st.sampled_from(in_flight))
        match data.draw(st.sampled_from(happenings)):
            case "answer":
                world.answer(sub)
            case "suspicious":
                world.answer(sub, suspicious=True)
            case "infinite":
                world.answer(sub, gain=float("inf"))
            case "NaN":
                world.happens(NotFiniteReceived(sub, "NaN"))
            case "refusal":
                world.happens(ErrorReceived(sub, Status.INTERNAL, "broken"))
            case "departure" if sub.node == LOCAL_NODE:
                world.happens(LocalFailed(sub, "broken"))
            case "departure":
                world.unusable.add(sub.node)
                world.happens(NodeLeft(sub.node))
            case "overdue":
                world.wait(OVERDUE_S)
            case "duplicate":
                before = layer.output(layer.answers()) if layer.planned else None
                for old in every:
                    if old.state is State.ANSWERED:
                        world.answer(old, factor=99.0)
                assert before is None or (layer.output(layer.answers()) == before).all()
            case "loss":
                world.happens(ConnectionLost("lost"))
                if layer.error is None and not layer.done:
                    world.plan()
                    every.clear()
        assert len(world.sent) == len(set(world.sent)), "no node is asked twice for the same row of an expert"
    if layer.error is None:
        assert layer.done
        counted = np.zeros_like(gate)
        for sub, _ in layer.answers():
            counted += sub.request.gate(*gate.shape)
        np.testing.assert_array_equal(counted, gate)
        np.testing.assert_array_equal(layer.output(layer.answers()), world.expected)
    else:
        assert isinstance(layer.error, DispatchError | BrokerError | AnswerError)


@given(gates, holder_lists, st.sampled_from([TIMEOUT_S, 2.5]))
def test_silence_ends_with_an_error_at_the_deadline(
    gate: Array, holders: list[list[str]], last_holder_s: float
) -> None:  # fmt: skip
    world = _World(gate, holders, last_holder_s=last_holder_s)
    world.plan()
    while not world.layer.done and world.layer.error is None:
        due_s = world.layer.next_due_s()
        assert due_s > world.now_s, "the loop around it must not spin"
        world.wait(due_s - world.now_s)
    assert world.layer.error is not None or not gate.any()
    assert world.now_s <= TIMEOUT_S


def _started(holders: str = "ab", **kwargs: float) -> tuple[_World, SubRequest]:
    world = _World(np.array([[1, 0, 0, 0]], np.float32), [list(holders)] * EXPERTS, **kwargs)
    world.plan()
    return world, world.layer.sub_requests[0]


def test_an_overdue_request_goes_to_another_holder_and_the_first_answer_counts() -> None:
    world, first = _started()
    world.wait(OVERDUE_S)
    assert first.state is State.REROUTED
    assert [c.node for c in world.commands if isinstance(c, MarkFailed)] == ["a"]
    (second,) = first.replacements
    assert second.node == "b"
    world.answer(first)
    assert world.layer.done
    assert [sub for sub, _ in world.layer.answers()] == [first]
    world.answer(second)
    assert world.commands[-1] == CountDropped("not awaited")


def test_without_another_holder_an_overdue_request_waits_for_as_long_as_the_last_holder_may_take() -> None:
    world, sub = _started("a", last_holder_s=2.5)
    world.wait(OVERDUE_S)
    assert world.layer.next_due_s() == 2.5
    world.wait(1.0)
    assert sub.in_flight
    world.wait(0.5)
    assert not sub.in_flight
    assert isinstance(world.layer.error, ExpertsLostError)
    assert "'a' did not answer L3:E0 within 2.50 s" in str(world.layer.error)


def test_if_no_node_is_heard_none_is_left_out() -> None:
    world, first = _started()
    world.silent = True
    world.wait(OVERDUE_S)
    assert [c.node for c in world.commands if isinstance(c, Doubt)] == ["a"]
    assert CheckNetwork() in world.commands
    assert not [c for c in world.commands if isinstance(c, MarkFailed)]
    assert first.state is State.REROUTED, "another holder is asked all the same"
    world.answer(first)
    assert world.layer.done


def test_the_last_holder_s_time_begins_when_the_network_is_heard_again() -> None:
    world, sub = _started("a", last_holder_s=2.5)
    world.silent = True
    while world.now_s < 6.0:
        world.wait(world.layer.next_due_s() - world.now_s)
    assert sub.in_flight
    world.silent = False
    began_s = world.now_s
    while sub.in_flight:
        world.wait(world.layer.next_due_s() - world.now_s)
    assert 2.5 <= world.now_s - began_s <= 2.5 + OVERDUE_S
    assert [c.node for c in world.commands if isinstance(c, MarkFailed)] == ["a"]


def test_a_node_that_is_not_known_yet_may_take_the_layer_s_whole_time_if_no_other_holds_its_experts() -> None:
    world = _World(np.array([[1, 0, 0, 0]], np.float32), [["a"]] * EXPERTS, last_holder_s=2.5)
    world.give_up_s = TIMEOUT_S
    world.plan()
    (sub,) = world.layer.sub_requests
    world.wait(OVERDUE_S)
    world.wait(8.0)
    assert sub.in_flight
    world.answer(sub)
    assert world.layer.done


def test_a_time_in_which_this_machine_stood_still_does_not_count() -> None:
    world, sub = _started()
    world.now_s = 0.5
    world.layer.postpone(0.25, 60.25)
    assert world.layer.next_due_s() == OVERDUE_S + 60
    assert world.layer.deadline_s == TIMEOUT_S + 60
    world.wait(60.0)
    assert sub.state is State.SENT


def test_a_suspect_answer_is_judged_by_the_other_holders() -> None:
    for factor, quarantined in ((1.0, False), (1e6, True)):
        world, first = _started()
        world.answer(first, suspicious=True, factor=factor)
        assert first.state is State.SUSPECT
        world.answer(first.replacements[0])
        np.testing.assert_array_equal(world.layer.output(world.layer.answers()), world.expected)
        found = [c for c in world.commands if isinstance(c, MarkFailed)]
        assert [(c.node, c.quarantine) for c in found] == ([("a", True)] if quarantined else [])
        learnt = [c for c in world.commands if isinstance(c, LearnGain)]
        assert len(learnt) == (1 if quarantined else 2)


def test_values_that_overflow_are_no_answer_and_nothing_is_learnt_from_them() -> None:
    world, first = _started()
    world.answer(first, gain=float("inf"))
    assert first.state is State.FAILED
    assert MarkFailed in map(type, world.commands)
    assert LearnGain not in map(type, world.commands)
    world.answer(first.replacements[0])
    assert world.layer.done


def test_a_layer_that_may_ask_one_node_only_is_not_rerouted() -> None:
    world, _ = _started()
    world.layer.only_node = "a"
    world.happens(NodeLeft("a"))
    assert isinstance(world.layer.error, ExpertsLostError)


def test_a_broker_that_is_lost_again_and_again_ends_the_layer() -> None:
    world, _ = _started()
    for _ in range(MAX_CONNECTION_LOSSES):
        world.happens(ConnectionLost("lost"))
        assert world.layer.error is None
    world.happens(ConnectionLost("lost"))
    with pytest.raises(BrokerError, match=r"5th time while layer 3 .*message_size_limit"):
        raise world.layer.error or AssertionError
