"""What happens to a layer's requests when something happens: one pure function from events to commands.

`transition` reads no clock, sends nothing and logs nothing; times and who holds what come as arguments. It changes
only the `LayerRequests` that it is given. The dispatcher turns messages and time into events and executes the commands
(the shape of Dask's `worker_state_machine`).

    SENT ──► ANSWERED                  its node answered
      ├────► REROUTED ──► ANSWERED     overdue; its own answer came before the replacements' were complete
      ├────► SUSPECT                   absurdly large answer, and there is another holder to ask
      └────► FAILED                    its node refused, left, found no finite output, or was the last holder and late
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from bs_coordinator.dispatch.layer_requests import LayerRequests, NodeAnswer, Sent, State, SubRequest
from bs_coordinator.dispatch.output_guard import agree, largest_gain
from bs_coordinator.dispatch.plan_requests import Request, plan_requests
from bs_coordinator.errors import AnswerError, DispatchError, ExpertsLostError
from bs_coordinator.nodes.registry import LOCAL_NODE
from wire.errors import BrokerError
from wire.frames import TARGET_FRAME_BYTES, Status

MAX_CONNECTION_LOSSES = 4
"""Per layer. A broker that restarts is away once; one that refuses what it is sent closes the connection each time."""

_SILENCE_CHECK_S = 0.25
"""While nothing is heard from any node: how often an overdue request is looked at."""


class Planned(NamedTuple):
    """It was decided which node to ask for what; earlier requests no longer count."""

    requests: Sequence[Request]
    now_s: float


class AnswerReceived(NamedTuple):
    """A node or the base station itself computed a sub-request.

    Attributes:
        answer: its output has the sub-request's shape.
        gain: the largest ‖output‖ / ‖input‖ of a row, see `largest_gain`.
        suspicious: `gain` is far above what is known to be right, see `OutputGuard`.
        absurd: `gain` is so large that this is no answer.
    """

    sub: SubRequest
    answer: NodeAnswer
    gain: float
    suspicious: bool
    absurd: bool = False


class ErrorReceived(NamedTuple):
    """A node refused a sub-request."""

    sub: SubRequest
    status: Status
    message: str


class NonsenseReceived(NamedTuple):
    """A node answered a sub-request with something that can't be its output.

    Attributes:
        reason: for the counter of dropped messages.
    """

    sub: SubRequest
    reason: str
    why: str


class NotFiniteReceived(NamedTuple):
    """A node, or the base station itself, found no finite output for a sub-request: it is broken, or the input is such.

    Attributes:
        on_wire: the output is finite, but too large for the wire's dtype.
    """

    sub: SubRequest
    why: str
    on_wire: bool = False


class LocalFailed(NamedTuple):
    """The base station itself could not compute a sub-request."""

    sub: SubRequest
    why: str


class NodeLeft(NamedTuple):
    """A node went offline or was restarted, and will not answer earlier requests."""

    node: str


class TimePassed(NamedTuple):
    """It is `now_s`, and the last message of any node came at `heard_s`, in seconds by `Clock.perf_ns`."""

    now_s: float
    heard_s: float


class ConnectionLost(NamedTuple):
    """The connection to the broker was lost, and with it every answer under way."""

    why: str


Event = (
    Planned
    | AnswerReceived
    | ErrorReceived
    | NonsenseReceived
    | NotFiniteReceived
    | LocalFailed
    | NodeLeft
    | TimePassed
    | ConnectionLost
)


class Send(NamedTuple):
    """Send these requests."""

    sub_requests: Sequence[SubRequest]


class MarkFailed(NamedTuple):
    """Leave a node out for a while; for longer with `quarantine`, if it computes nonsense."""

    node: str
    why: str
    quarantine: bool = False


class Doubt(NamedTuple):
    """Prefer other nodes to this one until it answers a ping: nothing was heard from any node while it was awaited."""

    node: str
    why: str


class CheckNetwork(NamedTuple):
    """Ping all nodes: nothing was heard from any, which may be the network's or the broker's fault."""


class LearnGain(NamedTuple):
    """An answer was right, and its largest gain was this."""

    gain: float


class CountDropped(NamedTuple):
    """Count a message that was of no use."""

    reason: str


class StopLocal(NamedTuple):
    """Ask the base station's own experts no more."""

    why: str


Command = Send | MarkFailed | Doubt | CheckNetwork | LearnGain | CountDropped | StopLocal


class FindHolders(Protocol):
    """Which usable node holds each expert, among those not tried yet; None if an expert has no such node."""

    def __call__(self, layer: int, experts: Sequence[int], tried: frozenset[str]) -> Mapping[int, str] | None: ...


def transition(layer: LayerRequests, event: Event, find_holders: FindHolders) -> list[Command]:
    """Take in an event: change `layer` accordingly, and return what is to be done, in this order.

    A layer that can't be completed gets its `error`; nothing more is sent for it then.
    """
    if isinstance(event, AnswerReceived):
        return _answer_received(layer, event, find_holders)
    if isinstance(event, Planned):
        return _planned(layer, event)
    if isinstance(event, TimePassed):
        return _time_passed(layer, event, find_holders)
    if isinstance(event, ErrorReceived):
        return _error_received(layer, event, find_holders)
    if isinstance(event, NonsenseReceived):
        return _nonsense(layer, event.sub, event.reason, event.why, find_holders)
    if isinstance(event, NotFiniteReceived):
        return _not_finite(layer, event, find_holders)
    if isinstance(event, LocalFailed):
        return _local_failed(layer, event, find_holders)
    if isinstance(event, NodeLeft):
        return _node_left(layer, event.node, find_holders)
    _connection_lost(layer, event.why)
    return []


def _planned(layer: LayerRequests, event: Planned) -> list[Command]:
    layer.clear()
    layer.planned = True
    layer.error = None
    layer.planned_s = event.now_s
    layer.deadline_s = event.now_s + layer.limits.timeout_s
    layer.sub_requests = [SubRequest(request, frozenset([request.node])) for request in event.requests]
    return [Send(layer.sub_requests)]


def _answer_received(layer: LayerRequests, event: AnswerReceived, find_holders: FindHolders) -> list[Command]:
    sub = event.sub
    if not _awaited(layer, sub):
        return [CountDropped("not awaited")]
    if not math.isfinite(event.gain) and np.isfinite(layer.rows(sub.request)).all():
        return _nonsense(layer, sub, "absurd", "values too large to add up", find_holders)
    if event.absurd:
        return _nonsense(layer, sub, "absurd", "absurdly large values", find_holders)
    commands: list[Command] = []
    if event.suspicious:
        if sub.replacements or (commands := _reroute(layer, sub, find_holders)):
            sub.state, sub.answer = State.SUSPECT, event.answer
            layer.suspects.append(sub)
            return commands
    else:
        commands.append(LearnGain(event.gain))
    # Without another holder to compare with, a large answer is taken as it is, and nothing is learnt from it.
    sub.state, sub.answer = State.ANSWERED, event.answer
    return commands + _verdicts(layer)


def _error_received(layer: LayerRequests, event: ErrorReceived, find_holders: FindHolders) -> list[Command]:
    sub = event.sub
    if not _awaited(layer, sub):
        return [CountDropped("not awaited")]
    status = event.status.name.lower()
    why = f"node '{sub.node}' refused {layer.describe(sub)}: {status}, {event.message}"
    return [MarkFailed(sub.node, why), *_fail(layer, sub, why, find_holders)]


def _nonsense(layer: LayerRequests, sub: SubRequest, reason: str, why: str, find_holders: FindHolders) -> list[Command]:
    if not _awaited(layer, sub):
        return [CountDropped("not awaited")]
    why = f"node '{sub.node}' answered {layer.describe(sub)} with nonsense: {why}"
    return [
        CountDropped(reason),
        MarkFailed(sub.node, why, quarantine=True),
        *_fail(layer, sub, why, find_holders),
    ]


def _not_finite(layer: LayerRequests, event: NotFiniteReceived, find_holders: FindHolders) -> list[Command]:
    """Ask another holder. If it finds no finite output either, the input is such, and no node is to blame."""
    sub = event.sub
    if not _awaited(layer, sub):
        return [CountDropped("not awaited")]
    who = "the base station" if sub.node == LOCAL_NODE else f"node '{sub.node}'"
    why = f"{who} found no finite output of {layer.describe(sub)}: {event.why}"
    if layer.only_node is not None:  # it was asked for a known input
        return [MarkFailed(sub.node, why, quarantine=True), *_fail(layer, sub, why, find_holders)]
    agreed = any(other.not_finite and other.node in sub.tried for other in layer.suspects)
    sub.state, sub.not_finite = State.FAILED, why
    layer.suspects.append(sub)
    if sub.replacements or layer.error:
        return []
    if not agreed and (send := _reroute(layer, sub, find_holders)):
        return send
    advice = "with --wire fp32 larger values fit" if event.on_wire else "the model can't continue this prompt"
    layer.error = AnswerError(f"{why}{', and so did others' if agreed else ''}: {advice}")
    # The only holder of an expert may be broken: a short pause, since a prompt must not take it from other callers.
    alone = not agreed and not event.on_wire and sub.node != LOCAL_NODE
    return [MarkFailed(sub.node, why)] if alone else []


def _local_failed(layer: LayerRequests, event: LocalFailed, find_holders: FindHolders) -> list[Command]:
    sub = event.sub
    if not _awaited(layer, sub):
        return []
    why = f"the base station could not compute {layer.describe(sub)}: {event.why}"
    return [StopLocal(event.why), *_fail(layer, sub, why, find_holders)]


def _node_left(layer: LayerRequests, node: str, find_holders: FindHolders) -> list[Command]:
    commands: list[Command] = []
    for sub in layer.in_flight():
        if sub.node == node:
            why = f"node '{node}' left while it was computing {layer.describe(sub)}"
            commands += _fail(layer, sub, why, find_holders)
    return commands


def _time_passed(layer: LayerRequests, event: TimePassed, find_holders: FindHolders) -> list[Command]:
    if layer.error or layer.done:
        return []
    if event.now_s >= layer.deadline_s:
        return _deadline_passed(layer, event)
    commands: list[Command] = []
    for sub in layer.in_flight():
        if sub.state is State.SENT and sub.sent is not None and event.now_s >= sub.sent.overdue_s:
            commands += _overdue(layer, sub, sub.sent, event, find_holders)
    return commands


def _deadline_passed(layer: LayerRequests, event: TimePassed) -> list[Command]:
    late = {sub.node: sub.sent for sub in layer.in_flight()}
    layer.error = DispatchError(
        f"no answer for layer {layer.layer} from {', '.join(sorted(late))} within {layer.limits.timeout_s:g} s"
        ": is the device overloaded or its link down? (--layer-timeout)"
    )
    return [
        _late(node, "did not answer in time", silent=sent is not None and event.heard_s <= sent.waiting_since_s)
        for node, sent in sorted(late.items())
        if node != LOCAL_NODE
    ]


def _overdue(
    layer: LayerRequests, sub: SubRequest, sent: Sent, event: TimePassed, find_holders: FindHolders
) -> list[Command]:
    """Ask other holders. Where there are none, wait on, for as long as the last holder may take.

    If nothing was heard from any node meanwhile, the network, the broker or this machine may have stood still: then
    the node is not to blame, and its time begins again once others answer pings.
    """
    now_s = event.now_s
    silent = event.heard_s <= sent.waiting_since_s
    waited_s = now_s - sent.waiting_since_s
    why = f"node '{sub.node}' did not answer {layer.describe(sub)} within {waited_s:.2f} s"
    late = [_late(sub.node, why, silent=silent), *([CheckNetwork()] if silent else [])]
    if send := _reroute(layer, sub, find_holders):
        sub.state = State.REROUTED
        return [*send, *late]
    if sent.give_up_s >= layer.limits.timeout_s:  # the layer's own deadline comes first
        sub.sent = sent._replace(overdue_s=math.inf)
    elif silent:
        sub.sent = sent._replace(overdue_s=now_s + _SILENCE_CHECK_S, waiting_since_s=now_s)
        return late
    elif waited_s >= sent.give_up_s:
        return [*late, *_fail(layer, sub, why, find_holders)]
    else:
        sub.sent = sent._replace(overdue_s=sent.waiting_since_s + sent.give_up_s)
    return []


def _late(node: str, why: str, *, silent: bool) -> Command:
    return Doubt(node, why) if silent else MarkFailed(node, why)


def _connection_lost(layer: LayerRequests, why: str) -> None:
    if layer.done:
        return  # its answers are all here
    layer.clear()
    layer.connection_losses += 1
    if layer.connection_losses > MAX_CONNECTION_LOSSES:
        layer.error = BrokerError(
            f"{why}; it was the {layer.connection_losses}th time while layer {layer.layer} was asked for: does the "
            f"broker refuse messages of {TARGET_FRAME_BYTES >> 10} KiB "
            "(mosquitto: message_size_limit, max_packet_size)?"
        )


def _awaited(layer: LayerRequests, sub: SubRequest) -> bool:
    """Whether an answer to `sub` would count: not if its rows are answered, by itself or by others."""
    if not sub.in_flight:
        return False
    if len(sub.tried) == 1 and not sub.replacements:
        return True  # no other node was ever asked, which is nearly always so
    return any(sub is other for other in layer.in_flight())


def _fail(layer: LayerRequests, sub: SubRequest, why: str, find_holders: FindHolders) -> list[Command]:
    """Its node will not answer: leave it to the replacements, or send some; without any, the layer has failed."""
    sub.state = State.FAILED
    if sub.replacements or layer.error:
        return []
    send = _reroute(layer, sub, find_holders)
    if not send:
        layer.error = ExpertsLostError(why)
    return send


def _reroute(layer: LayerRequests, sub: SubRequest, find_holders: FindHolders) -> list[Command]:
    """Have other holders asked for a sub-request's rows; nothing if an expert has no other holder."""
    if layer.only_node is not None or layer.error:
        return []
    holders = find_holders(layer.layer, [s.expert for s in sub.request.experts], sub.tried)
    if holders is None:
        return []
    gate = sub.request.gate(*layer.gate.shape)
    requests = plan_requests(gate, holders, max_tokens=layer.limits.max_tokens)
    sub.replacements = [SubRequest(request, sub.tried | {request.node}) for request in requests]
    return [Send(sub.replacements)]


def _verdicts(layer: LayerRequests) -> list[Command]:
    """Once a layer is done: was each suspect answer wrong, or do the replacements say the same?

    A node that found no finite output was wrong, since others found one.
    """
    if not layer.suspects or not layer.done:
        return []
    return [command for sub in layer.suspects for command in _verdict(layer, sub)]


def _verdict(layer: LayerRequests, sub: SubRequest) -> list[Command]:
    if sub.not_finite:
        wrong = StopLocal(sub.not_finite) if sub.node == LOCAL_NODE else MarkFailed(sub.node, sub.not_finite, True)
        return [CountDropped("not-finite"), wrong]
    assert sub.answer is not None  # noqa: S101 - that is what makes it suspect
    others = np.zeros_like(layer.hidden)
    for other, answer in sub.answers():
        others[other.request.rows] += answer.output
    rows = sub.request.rows
    if agree(sub.answer.output, others[rows]):
        return [LearnGain(largest_gain(layer.rows(sub.request), sub.answer.output))]
    liar = sub
    largest, answer = max(sub.answers(), key=lambda found: float(np.linalg.norm(found[1].output)))
    if largest.node != LOCAL_NODE and np.linalg.norm(answer.output) > np.linalg.norm(sub.answer.output):
        # Large, but right for all that is known: the other one's is larger still.
        liar, sub.state = largest, State.ANSWERED
    why = f"node '{liar.node}' answered {layer.describe(liar)} with absurdly large values"
    return [CountDropped("absurd"), MarkFailed(liar.node, why, quarantine=True)]
