"""What the live page is fed with: JSON documents, made from these types. Pure.

Numbers are null where nothing was measured. "Down" is from the base station to a node, "up" the other way. Fields that
have their default are left out of the JSON. The page (`static/`) is the only reader, so a change needs no version.
"""

from typing import Literal

from msgspec import Struct

NodeState = Literal["online", "asked last", "left out", "ignored", "lost"]
AlarmKind = Literal["experts", "node", "load", "queue", "heat"]


class LinkView(Struct, frozen=True, kw_only=True):
    """The estimate of a node's link (`links.estimator.LinkEstimate`).

    Attributes:
        rtt_ms: round trip of an empty message.
        down_mbps, up_mbps: goodput in 10⁶ bit/s.
        samples: number of messages that the estimate is based on; 0 for a guess.
        stale: there were no samples for too long.
    """

    rtt_ms: float
    down_mbps: float
    up_mbps: float
    samples: int
    stale: bool


class NodeView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One node.

    Attributes:
        name: that the node gave itself. Names, reasons and all other texts come from the nodes: the page must show them
            as text only.
        state: `asked last` until it answers a ping, `left out` after a failure, `ignored` because it serves another
            model or other frames, `lost` after it was online.
        reason: why it is in this state.
        host: name of its machine.
        device: profile and provider, for people.
        experts: selector of the experts that it holds.
        held: number of these experts.
        measured_ms: moving average of the round trips of its requests while decoding, the node's own time included.
        predicted_ms: moving average of what these requests were predicted to take, as if no other node used the
            channel.
        celsius: the hottest sensor of its processor.
        throttling: why its processor is slowed down now; empty if it is not, None if the device does not tell.
        rssi_dbm: signal strength of its Wi-Fi.
        watts: power of the whole board.
    """

    name: str
    state: NodeState
    reason: str = ""
    host: str = ""
    device: str = ""
    experts: str = ""
    held: int = 0
    link: LinkView | None = None
    measured_ms: float | None = None
    predicted_ms: float | None = None
    celsius: float | None = None
    throttling: str | None = None
    rssi_dbm: int | None = None
    watts: float | None = None


class StepView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step of the model for one or several answers. Its parts add up to its time and the time of drafting.

    Attributes:
        serial: counts up by one per step; the page uses it to ignore steps that it has.
        prefill: the step ran a prompt.
        answers: that got tokens from this step.
        tokens: new tokens of these answers together.
        drafted, accepted: draft tokens, and how many of them were accepted.
        degraded: new tokens that were computed without some preferred expert.
        trunk_ms: attention, norms, gate and selection.
        network_ms: links and broker, for the slowest node of each layer.
        queue_ms: that node's queue, and loading experts into its memory.
        compute_ms: that node's experts.
        packing_ms: packing, unpacking and adding up.
        head_ms: embedding, final norm and LM head.
        draft_ms: drafting, before the step.
    """

    serial: int
    prefill: bool = False
    answers: int = 1
    tokens: int = 1
    drafted: int = 0
    accepted: int = 0
    degraded: int = 0
    trunk_ms: float
    network_ms: float
    queue_ms: float
    compute_ms: float
    packing_ms: float
    head_ms: float
    draft_ms: float = 0.0


class Totals(Struct, frozen=True, kw_only=True):
    """Counts since the base station's start.

    Attributes:
        running: requests that were accepted and are not over.
        ended: requests that are over, the failed ones included.
        failed: requests that ended with an error.
        refused: requests that got no place.
        tokens: new tokens of all answers.
        drafted, accepted, degraded: as in `StepView`.
    """

    running: int
    ended: int
    failed: int
    refused: int
    tokens: int
    drafted: int
    accepted: int
    degraded: int


class Alarm(Struct, frozen=True, kw_only=True):
    """Something that needs attention.

    Attributes:
        kind: what it is about.
        severe: answers fail or are degraded because of it.
        text: one line for people.
    """

    kind: AlarmKind
    severe: bool
    text: str


class Placement(Struct, frozen=True):
    """Which node each expert is asked of.

    Attributes:
        names: of the nodes; `@bs` is the base station itself.
        asked: [layers][experts], index in `names`; −1 where no node can be asked.
    """

    names: list[str]
    asked: list[list[int]]


class ModelFacts(Struct, frozen=True, kw_only=True):
    """What does not change while the base station runs.

    Attributes:
        name: of the model.
        layers, experts: layers with experts, and experts in each of them.
        top_k: experts per token that the model's own router asks.
        quantisation: of the experts.
        policies: how experts are chosen, the base station's own policy first; then others that requests may name.
        drafts: how draft tokens are made; `none` without any.
        chat: the model has a chat template.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    quantisation: str
    policies: list[str]
    drafts: str
    chat: bool


class Snapshot(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of the base station at one moment, and what has happened since the snapshot before.

    Attributes:
        unix_ms: when it was made.
        model: only in a viewer's first snapshot.
        placement: in a viewer's first snapshot, and whenever it has changed.
        cpu_load: processes that want to run, per core of the base station (1-minute average).
        steps: since the last snapshot; in a viewer's first one all that are kept.
        active: [layer, expert, tokens] for each expert that was asked since the last snapshot.
    """

    unix_ms: int
    nodes: list[NodeView]
    alarms: list[Alarm]
    totals: Totals
    cpu_load: float
    model: ModelFacts | None = None
    placement: Placement | None = None
    steps: list[StepView] = []
    active: list[tuple[int, int, int]] = []
