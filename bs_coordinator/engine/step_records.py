"""What one step of the model cost, by the base station's own clock: the raw material of every latency log."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from bs_coordinator.selection.demand import predicted_s
from bs_coordinator.selection.forecast import LayerForecast
from wire.frames import NodeDurations
from wire.tensors import Array

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class DispatchRecord:
    """One request to one node.

    Attributes:
        experts: indices of the experts asked for.
        tokens: rows of hidden states sent.
        sent_unix_ns: wall clock at sending, to line logs up; durations never come from it.
        round_trip_ns: from handing the request to the network to reading its answer off the socket.
        durations: the node's own account.
        down_bytes: frame towards the node.
        up_bytes: frame from the node.
        predicted_ns: the round trip that was expected at sending, alone on the air.
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

    @property
    def network_ns(self) -> int:
        """Round trip less what the node says it took: link, broker and both MQTT clients."""
        return max(0, self.round_trip_ns - self.durations.total_ns)


@dataclass(frozen=True, slots=True, eq=False)
class LayerRecord:
    """One layer of one step.

    Attributes:
        trunk_ns: attention, norms, gate and selection, of all pieces of the step.
        dispatch_ns: from the chosen experts to their combined output; of what was under way while the trunk worked on
            another piece of the step, only what the trunk then still waited.
        asked: of each piece of the step, gate weights float32 [tokens, experts] and the forecast they were chosen by.
        degraded: tokens of the step whose experts were lost, so that others were asked.
    """

    layer: int
    trunk_ns: int
    dispatch_ns: int
    asked: tuple[tuple[Array, LayerForecast], ...]
    dispatches: tuple[DispatchRecord, ...] = ()
    degraded: tuple[int, ...] = ()

    # Worked out when somebody reads them: a GPU would wait for that between two layers.

    @property
    def pairs(self) -> int:
        """(token, expert) pairs that the policy asked for."""
        return sum(int(np.count_nonzero(gate)) for gate, _ in self.asked)

    @property
    def predicted_ns(self) -> int:
        """What the layer's forecasts gave for the slowest node."""
        return max(int(1e9 * predicted_s(gate > 0, forecast)) for gate, forecast in self.asked)

    @property
    def critical(self) -> DispatchRecord | None:
        """The request that the layer waited for longest; None when nothing was dispatched."""
        return max(self.dispatches, key=lambda d: d.round_trip_ns, default=None)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One forward step: pieces of prompts (prefill), or one token per sequence and guesses of the next (decode).

    Attributes:
        position: of the step's first token in its sequence (the first one's, of several).
        tokens: tokens that went in, of all sequences.
        head_ns: embedding, final norm, LM head and choice of the token.
        total_ns: wall time of the step.
        drafted: tokens of the step that were guesses, of the sequence that this record is kept for.
        accepted: guesses that were right.
        draft_ns: what making them took, before the step.
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

    @property
    def degraded(self) -> frozenset[int]:
        """Tokens of the step for which some layer had to do without an expert."""
        return frozenset(token for layer in self.layers for token in layer.degraded)

    def split_ns(self) -> "TimeSplit":
        """Where the step's time went along the critical path; the parts add up to `total_ns`."""
        trunk = self.head_ns + sum(layer.trunk_ns for layer in self.layers)
        network = compute = wait = 0
        for layer in self.layers:
            if (slowest := layer.critical) is not None:
                # Of a round trip that another piece's trunk has hidden in part, the rest counts.
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
        network: links and broker, of the slowest node of each layer.
        compute: that node's experts.
        wait: that node's queue, and its reading of experts into memory.
        framing: the rest: packing, unpacking and adding up, on both sides.
    """

    trunk: int
    network: int
    compute: int
    wait: int
    framing: int
