"""Replays routing traces over channel draws: the requests of each policy to the devices, and their times.

Each draw is one channel and one batch of tokens: a whole prompt (prefill) or a single token of one (decode).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from bs_coordinator.airtime.allocation import Float, allocate_common, allocate_layer, layer_seconds
from bs_coordinator.selection import Policy
from testbed.errors import SimulationError
from testbed.radio.setting import Cell
from testbed.radio.traces import PromptRouting, RoutingTrace

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
Allocation = Literal["uniform", "optimal", "per-layer"]
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "optimal", "per-layer")
"""Bandwidth shares: equal, optimal for all layers of a batch together (as in the papers), or optimal per layer."""


def batches(trace: RoutingTrace, phase: Phase, draws: int, seed: int) -> list[PromptRouting]:
    """Routing of the tokens that each draw sends.

    Prompts take turns. In the phase `decode` a draw sends one token of its prompt, chosen by `seed`.
    """
    prompts = [trace.prompts[draw % len(trace.prompts)] for draw in range(draws)]
    if phase == "prefill":
        return prompts
    at = np.random.default_rng(seed).random(draws)
    return [prompt.token(int(x * prompt.tokens)) for prompt, x in zip(prompts, at, strict=True)]


def replay(policy: Policy, batches: Sequence[PromptRouting], cell: Cell, *, top_k: int) -> Float:
    """Number of hidden states sent to each device, float64 [draws, layers, devices]; draw d sends batch d.

    Args:
        policy: chooses experts by gate and forecast.
        batches: result of `batches`.
        cell: simulated cell, with one device per expert.
        top_k: the model's own number of experts per token.

    Raises:
        SimulationError: the number of devices differs from the number of experts per layer.
    """
    devices = len(cell.row_compute_s)
    _, layers, experts = batches[0].scores.shape
    if experts != devices:
        raise SimulationError(
            f"the setting has {devices} devices, the model {experts} experts per layer: "
            "each device must hold one expert"
        )
    rows = np.empty((len(batches), layers, devices))
    for draw, batch in enumerate(batches):
        for layer in range(layers):
            gate = policy.select(batch.layer(layer, top_k), cell.forecast(draw, layer))
            rows[draw, layer] = np.count_nonzero(gate, axis=0)
    return rows


def batch_seconds(cell: Cell, rows: Float, allocation: Allocation) -> Float:
    """Time in seconds that each draw's batch waits for devices, summed over layers, float64 [draws].

    Args:
        cell: simulated cell.
        rows: result of `replay`.
        allocation: how bandwidth is shared.
    """
    compute_s = rows * cell.row_compute_s
    if allocation == "per-layer":
        bandwidth = allocate_layer(cell.links.each_layer(), rows, compute_s, cell.total_hz)
    elif allocation == "optimal":
        bandwidth = allocate_common(cell.links, rows, compute_s, cell.total_hz)[:, None]
    else:
        bandwidth = np.full_like(rows, cell.total_hz / rows.shape[-1])
    seconds: Float = layer_seconds(cell.links.each_layer(), bandwidth, rows, compute_s).sum(axis=-1)
    return seconds
