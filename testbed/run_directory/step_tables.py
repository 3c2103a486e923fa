"""Tables made from the step records of the model: one row per token, per layer and per request to a node."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from bs_coordinator.engine.step_records import DispatchRecord, LayerRecord, StepRecord, TimeSplit
from testbed.run_directory.columns import BOOL, INT, NAME, Column, Table


@dataclass(frozen=True)  # no slots: what is worked out once per token is cached
class TokenRecord:
    """One generated token, or one step of a batch where nothing is generated.

    Attributes:
        answer: which answer, batch or text of the cell; -1 in the warm-up.
        token_id: None where nothing is generated.
        steps: the model's steps that made the token; none for an accepted draft token.
        top_k: experts per token and layer that plain top-k asks for.
        predicted: whether the forecasts of `steps` predict their layers' time.
        log_ns: time spent on logging this token.
        probe_down_bytes, probe_up_bytes: of probes of all links, since the last token.
    """

    answer: int
    token: int
    warm_up: bool
    token_id: int | None
    steps: tuple[StepRecord, ...]
    ended_unix_ns: int
    ended_monotonic_ns: int
    log_ns: int
    top_k: int
    predicted: bool = True
    probe_down_bytes: int = 0
    probe_up_bytes: int = 0

    @cached_property
    def layers(self) -> list[LayerRecord]:
        """All layers of all steps."""
        return [layer for step in self.steps for layer in step.layers]

    @cached_property
    def dispatches(self) -> list[DispatchRecord]:
        """All requests of all layers."""
        return [dispatch for layer in self.layers for dispatch in layer.dispatches]

    @cached_property
    def split(self) -> TimeSplit:
        """Time of all steps along the critical path, in ns."""
        splits = [step.split_ns() for step in self.steps]
        return TimeSplit(
            trunk=sum(s.trunk for s in splits),
            network=sum(s.network for s in splits),
            compute=sum(s.compute for s in splits),
            wait=sum(s.wait for s in splits),
            framing=sum(s.framing for s in splits),
        )

    @cached_property
    def draft_ns(self) -> int:
        """Time that drafting took."""
        return sum(step.draft_ns for step in self.steps)

    @cached_property
    def total_ns(self) -> int:
        """Time of all steps and of drafting."""
        return sum(step.total_ns for step in self.steps) + self.draft_ns

    def layer_rows(self) -> Iterator["LayerRow"]:
        """The token's rows of `layers`."""
        for number, step in enumerate(self.steps):
            for layer in step.layers:
                yield LayerRow(self, number, layer)

    def request_rows(self) -> Iterator["RequestRow"]:
        """The token's rows of `latency`."""
        for step in self.steps:
            for layer in step.layers:
                for dispatch in layer.dispatches:
                    yield RequestRow(self, step, layer, dispatch)


class LayerRow(NamedTuple):
    """One layer of one of a token's steps."""

    token: TokenRecord
    step: int
    layer: LayerRecord


class RequestRow(NamedTuple):
    """One request of one layer."""

    token: TokenRecord
    step: StepRecord
    layer: LayerRecord
    dispatch: DispatchRecord


_ANSWER_NUMBER = "number of the answer, batch or text in the cell; −1 in the warm-up"
_NUMBER_IN_ANSWER = "number of the token or step in it"
_WARM_UP = "whether the row belongs to the warm-up, which all results leave out"
_PHASE = "prefill or decode"
_TRUNK = "attention, norms, gate and selection on the base station"
_DISPATCH = "from the chosen experts to their combined output: the layer wait"

TOKENS = Table[TokenRecord](
    "tokens",
    "one row per generated token, or per step of a batch where nothing is generated",
    (
        Column("answer", INT, _ANSWER_NUMBER),
        Column("token", INT, _NUMBER_IN_ANSWER),
        Column("warm_up", BOOL, _WARM_UP),
        Column("token_id", INT, "id of the generated token; empty where nothing is generated"),
        Column("phase", NAME, _PHASE, lambda t: t.steps[-1].phase if t.steps else "decode"),
        Column(
            "step_tokens", INT, "tokens that went through the model", lambda t: sum(step.tokens for step in t.steps)
        ),
        Column("began_unix_ns", INT, "start, wall clock", lambda t: t.ended_unix_ns - t.total_ns),
        Column("began_monotonic_ns", INT, "start, steady clock", lambda t: t.ended_monotonic_ns - t.total_ns),
        Column(
            "total_ns", INT, "time of the token: the sum of trunk, network, compute, wait, framing and draft"
        ),
        Column(
            "trunk_ns", INT, "attention, norms, gate, selection and head on the base station",
            lambda t: t.split.trunk,
        ),
        Column(
            "network_ns", INT, "of each layer's slowest request: links, broker, MQTT clients",
            lambda t: t.split.network,
        ),
        Column("compute_ns", INT, "of each layer's slowest request: the node's experts", lambda t: t.split.compute),
        Column(
            "wait_ns", INT, "of each layer's slowest request: the node's queue and its reading of experts from disk",
            lambda t: t.split.wait,
        ),
        Column("framing_ns", INT, "the rest: packing, unpacking, adding up", lambda t: t.split.framing),
        Column(
            "pairs", INT, "(token, expert) pairs that the policy asked for",
            lambda t: sum(layer.pairs for layer in t.layers),
        ),
        Column(
            "full_pairs", INT, "(token, expert) pairs that plain top-k would have asked for",
            lambda t: sum(step.tokens * len(step.layers) for step in t.steps) * t.top_k,
        ),
        Column(
            "down_bytes", INT, "base station to nodes, whole frames",
            lambda t: sum(d.down_bytes for d in t.dispatches),
        ),
        Column("up_bytes", INT, "nodes to base station, whole frames", lambda t: sum(d.up_bytes for d in t.dispatches)),
        Column("drafted", INT, "draft tokens in the token's steps", lambda t: sum(step.drafted for step in t.steps)),
        Column("accepted", INT, "draft tokens that were right", lambda t: sum(step.accepted for step in t.steps)),
        Column("draft_ns", INT, "making the draft tokens; part of `total_ns`"),
        Column("log_ns", INT, "spent on logging this token"),
        Column("probe_down_bytes", INT, "frames of probes to nodes since the last token, of all links"),
        Column("probe_up_bytes", INT, "frames of answers to probes since the last token"),
    ),
)  # fmt: skip

LAYERS = Table[LayerRow](
    "layers",
    "one row per token and layer",
    (
        Column("answer", INT, _ANSWER_NUMBER, lambda r: r.token.answer),
        Column("token", INT, _NUMBER_IN_ANSWER, lambda r: r.token.token),
        Column("warm_up", BOOL, _WARM_UP, lambda r: r.token.warm_up),
        Column("step", INT, "number of the step among the token's; long prompts take several"),
        Column("layer", INT, "layer of the model, from 0", lambda r: r.layer.layer),
        Column("trunk_ns", INT, _TRUNK, lambda r: r.layer.trunk_ns),
        Column("dispatch_ns", INT, _DISPATCH, lambda r: r.layer.dispatch_ns),
        Column("pairs", INT, "(token, expert) pairs that the policy asked for", lambda r: r.layer.pairs),
        Column(
            "slowest", NAME, "node that the layer waited for longest",
            lambda r: r.layer.critical.node if r.layer.critical else None,
        ),
        Column(
            "predicted_ns", INT, "layer wait as predicted before the requests left; empty where the tokens of a step "
            "chose their experts separately", lambda r: r.layer.predicted_ns if r.token.predicted else None,
        ),
    ),
)  # fmt: skip

LATENCY = Table[RequestRow](
    "latency",
    "one row per request to a node",
    (
        Column("answer", INT, _ANSWER_NUMBER, lambda r: r.token.answer),
        Column("token", INT, _NUMBER_IN_ANSWER, lambda r: r.token.token),
        Column("warm_up", BOOL, _WARM_UP, lambda r: r.token.warm_up),
        Column("phase", NAME, _PHASE, lambda r: r.step.phase),
        Column("position", INT, "position of the step's first token in its sequence", lambda r: r.step.position),
        Column("step_tokens", INT, "tokens that went through the model in the step", lambda r: r.step.tokens),
        Column("layer", INT, "layer of the model, from 0", lambda r: r.layer.layer),
        Column("trunk_ns", INT, f"{_TRUNK}, of the layer", lambda r: r.layer.trunk_ns),
        Column("dispatch_ns", INT, _DISPATCH, lambda r: r.layer.dispatch_ns),
        Column("node", NAME, "id of the node", lambda r: r.dispatch.node),
        Column("experts", NAME, "indices of the requested experts", lambda r: " ".join(map(str, r.dispatch.experts))),
        Column("tokens", INT, "hidden states sent", lambda r: r.dispatch.tokens),
        Column("sent_unix_ns", INT, "time of sending, wall clock", lambda r: r.dispatch.sent_unix_ns),
        Column(
            "round_trip_ns", INT, "from publishing to reading the answer off the socket",
            lambda r: r.dispatch.round_trip_ns,
        ),
        Column(
            "network_ns", INT, "round trip minus the node's own durations: links, broker and MQTT clients",
            lambda r: r.dispatch.network_ns,
        ),
        Column(
            "node_queue_ns", INT, "waiting in the node's queue, node's clock",
            lambda r: r.dispatch.durations.queue_ns,
        ),
        Column("node_decode_ns", INT, "unpacking, node's clock", lambda r: r.dispatch.durations.decode_ns),
        Column("node_compute_ns", INT, "running the experts, node's clock", lambda r: r.dispatch.durations.compute_ns),
        Column("node_encode_ns", INT, "packing, node's clock", lambda r: r.dispatch.durations.encode_ns),
        Column("down_bytes", INT, "base station to node, whole frame", lambda r: r.dispatch.down_bytes),
        Column("up_bytes", INT, "node to base station, whole frame", lambda r: r.dispatch.up_bytes),
        Column("predicted_ns", INT, "round trip as predicted before sending", lambda r: r.dispatch.predicted_ns),
        Column("node_load_ns", INT, "reading experts from disk, node's clock", lambda r: r.dispatch.durations.load_ns),
        Column(
            "planned_ns", INT, "from the chosen experts to publishing: choosing holders and packing",
            lambda r: r.dispatch.planned_ns,
        ),
    ),
)  # fmt: skip
