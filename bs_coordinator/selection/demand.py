"""What a choice of experts demands of the nodes, and the gate weights that follow from it. Shared by the policies."""

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.selection.forecast import LayerForecast
from wire.tensors import Array

Chosen = NDArray[np.bool_]
Counts = NDArray[np.int64]


def demand(chosen: Chosen, on_node: Array) -> tuple[Counts, Counts]:
    """Rows and distinct experts that each node is asked for, int64 [nodes] each, as `LayerForecast.node_s` takes them.

    A token that asks several experts of one node is one row of the request to it.

    Args:
        chosen: bool [tokens, experts].
        on_node: from `LayerForecast.node_map`.
    """
    rows = np.count_nonzero(chosen.astype(np.float32) @ on_node, axis=0)
    experts = chosen.any(axis=0).astype(np.float32) @ on_node
    return np.asarray(rows, np.int64), experts.astype(np.int64)


def predicted_s(chosen: Chosen, forecast: LayerForecast) -> float:
    """Predicted time of the layer in seconds if `chosen`, bool [tokens, experts], is asked."""
    return forecast.layer_s(*demand(chosen, forecast.node_map()))


def shares_of(scores: Array, chosen: Chosen) -> Array:
    """The chosen experts' scores, scaled to add up to 1 in each row: float32 [tokens, experts]."""
    shares = np.where(chosen, scores, np.float32(0))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


def no_slower(chosen: Chosen, fallback: Chosen, forecast: LayerForecast) -> Chosen:
    """`chosen`, unless the layer is predicted to take longer with it than with `fallback`."""
    on_node = forecast.node_map()
    slower = forecast.layer_s(*demand(chosen, on_node)) > forecast.layer_s(*demand(fallback, on_node))
    return fallback if slower else chosen


def assign_by_preference(
    preference: Array, holder: NDArray[np.intp], room: NDArray[np.int64]
) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Assign each applicant the expert it prefers among those whose nodes have room; earlier applicants choose first.

    Args:
        preference: float32 [applicants, experts], zero for an expert that an applicant must not get.
        holder: intp [experts], each expert's node.
        room: int64 [nodes], rows that each node may still take.

    Returns:
        intp [applicants], an expert or -1; and int64 [nodes], the room that is left.
    """
    placed = np.full(len(preference), -1, np.intp)
    room = np.maximum(room, 0)
    waiting = np.arange(len(preference))
    nodes = np.arange(len(room))
    while len(waiting):
        open_ = preference[waiting] * (room > 0)[holder]
        best = open_.argmax(axis=1)
        possible = open_.max(axis=1) > 0
        waiting, best = waiting[possible], best[possible]
        asks = holder[best][:, None] == nodes
        turn = (asks.cumsum(axis=0) * asks).sum(axis=1)
        served = turn <= room[holder[best]]
        placed[waiting[served]] = best[served]
        room = room - asks[served].sum(axis=0)
        # Applicants not served met a node that is full now, so each round fills a node or serves all.
        waiting = waiting[~served]
    return placed, room
