"""What one step of the model cost, by the base station's clock. All latency logs are made from these records."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from bs_coordinator.selection.demand import predicted_s
from bs_coordinator.selection.forecast import LayerForecast
from wire.frames import NodeDurations
from wire.tensors import Array

Phase = Literal["prefill", "decode"]


class DispatchRecord(Struct, frozen=True):
    """One request to one node.

    Attributes:
        node: name of the node.
        experts: indices of the experts asked for.
        tokens: rows of hidden states sent.
        sent_unix_ns: wall clock at sending, to align logs; durations are never computed from it.
        round_trip_ns: from handing the request to the network to reading its answer from the socket.
        durations: the node's own measurements.
        down_bytes: length of the frame to the node.
        up_bytes: length of the frame from the node.
        predicted_ns: the round trip predicted at sending, as if no other node used the channel.
        planned_ns: from the chosen experts to handing the request to the network: choosing holders and encoding.
    """

    node: str
    experts: tuple[int, ...]
    tokens: int
    sent_unix_ns: int
    round_trip_ns: int
    durations: NodeDurations
    down_bytes: int
    up_bytes: int
    predicted_ns: int
    planned_ns: int = 0

    @property
    def network_ns(self) -> int:
        """Round trip minus the time the node reports for itself: link, broker and both MQTT clients."""
        return max(0, self.round_trip_ns - self.durations.total_ns)

    def of_experts(self, slices: int) -> "DispatchRecord":
        """This record of a request for slices, with the experts that they belong to, each once."""
        if slices == 1:
            return self
        return replace(self, experts=tuple(dict.fromkeys(unit // slices for unit in self.experts)))


@dataclass(frozen=True, slots=True, eq=False)
class LayerRecord:
    """One layer of one step.

    Attributes:
        layer: index of the layer.
        trunk_ns: attention, norms, gate and selection, for all micro-batches of the step.
        dispatch_ns: from the chosen experts to their combined output. Where the trunk worked on another micro-batch
            meanwhile, only the time it then still had to wait.
        asked: for each micro-batch, gate weights float32 [tokens, experts] and the forecast they were chosen by.
        dispatches: the requests to nodes.
        degraded: tokens of the step whose preferred experts were lost, so others were asked.
    """

    layer: int
    trunk_ns: int
    dispatch_ns: int
    asked: tuple[tuple[Array, LayerForecast], ...]
    dispatches: tuple[DispatchRecord, ...] = ()
    degraded: tuple[int, ...] = ()

    # Computed on demand: between two layers a GPU would have to wait for it.

    @property
    def pairs(self) -> int:
        """Number of (token, expert) pairs that the policy chose."""
        return sum(int(np.count_nonzero(gate)) for gate, _ in self.asked)

    @property
    def predicted_ns(self) -> int:
        """Time of the slowest node by the layer's forecasts, in ns."""
        return max(int(1e9 * predicted_s(gate > 0, forecast)) for gate, forecast in self.asked)

    @property
    def critical(self) -> DispatchRecord | None:
        """The request with the longest round trip; None when nothing was dispatched."""
        return max(self.dispatches, key=lambda d: d.round_trip_ns, default=None)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One forward step: chunks of prompts (prefill), or one token per sequence and its draft tokens (decode).

    Attributes:
        phase: prefill or decode.
        position: of the first sequence's first token in this step.
        tokens: tokens that went through the model, of all sequences.
        total_ns: wall time of the step.
        head_ns: embedding, final norm and LM head.
        layers: one record per layer.
        drafted: draft tokens in the step, of the sequence that this record is kept for.
        accepted: draft tokens that were accepted.
        draft_ns: time spent drafting, before the step.
        began_unix_ns: wall clock at its start, to align logs; 0 if it is not known.
    """

    phase: Phase
    position: int
    tokens: int
    total_ns: int
    head_ns: int
    layers: tuple[LayerRecord, ...] = field(repr=False)
    drafted: int = 0
    accepted: int = 0
    draft_ns: int = 0
    began_unix_ns: int = 0

    @property
    def degraded(self) -> frozenset[int]:
        """Tokens of the step, drafts included, for which some layer lacked a preferred expert."""
        return frozenset(token for layer in self.layers for token in layer.degraded)

    def split_ns(self) -> "TimeSplit":
        """How the step's time was spent along the critical path; the parts add up to `total_ns`."""
        trunk = self.head_ns + sum(layer.trunk_ns for layer in self.layers)
        network = compute = wait = 0
        for layer in self.layers:
            if (slowest := layer.critical) is not None:
                # The trunk's work on another micro-batch may hide a part of a round trip: only the rest counts.
                share = min(1.0, layer.dispatch_ns / max(1, slowest.round_trip_ns))
                durations = slowest.durations
                network += int(share * slowest.network_ns)
                compute += int(share * durations.compute_ns)
                wait += int(share * (durations.queue_ns + durations.load_ns))
        return TimeSplit(trunk, network, compute, wait, self.total_ns - trunk - network - compute - wait)


@dataclass(frozen=True, slots=True)
class TimeSplit:
    """A step's time along its critical path, in ns.

    Attributes:
        trunk: attention, norms, gate, selection and head on the base station.
        network: links and broker, for the slowest node of each layer.
        compute: that node's experts.
        wait: that node's queue, and loading experts into its memory.
        framing: the rest: packing, unpacking and adding up, on both sides.
    """

    trunk: int
    network: int
    compute: int
    wait: int
    framing: int
