"""Measures what a preset decides by, before the first prompt: links by probes, memory, and what the nodes say."""

import platform
from collections import Counter
from collections.abc import Callable

from bs_coordinator.config import BaseStationConfig
from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.dispatch.readiness import wait_for_experts
from bs_coordinator.links.estimator import KNOWN_SAMPLES
from bs_coordinator.presets.facts import Facts, Link
from bs_coordinator.resident.room import needed_room
from common.memory import available_bytes
from wire.experts import UnitId
from wire.manifest import Manifest

_STATUSES_S = 0.3
"""Time for the retained statuses of running nodes to arrive."""
_PROBED_S = 1.0
"""How long idle links are probed; by then each node has had several sizes."""


def look(
    dispatcher: Dispatcher, config: BaseStationConfig, manifest: Manifest, *, scored: bool, why_no_drafts: str,
    on_wait: Callable[[str], None] | None = None,
) -> Facts:  # fmt: skip
    """Wait for the nodes, probe their links for a moment, and give what is known.

    With local experts asked for, nodes are not waited for: there may be none.

    Args:
        scored: whether it is known how the model scores its experts.
        why_no_drafts: why drafts could change answers; empty if they can't.
        on_wait: called with one line about missing experts whenever that changes.

    Raises:
        PlacementError: some expert has no node after `config.nodes_timeout_s`.
    """
    if config.resident is None:
        wait_for_experts(dispatcher, timeout_s=config.nodes_timeout_s, on_wait=on_wait)
    else:
        dispatcher.pump(_STATUSES_S)
    dispatcher.measure_links(_PROBED_S)
    links = tuple(
        Link(1e3 * estimate.link.rtt_s, estimate.link.down_mbps, estimate.link.up_mbps)
        for estimate in dispatcher.links.estimates(dispatcher.clock.perf_ns() / 1e9)
        if estimate.link.samples >= KNOWN_SAMPLES
    )
    nodes, here = dispatcher.registry.nodes, platform.machine()
    room = needed_room(manifest)
    return Facts(
        links=links,
        shared_air=config.shared_air,
        free_bytes=available_bytes(),
        all_experts_bytes=room.all_bytes,
        one_expert_bytes=room.one_bytes,
        sums_units=next((node for node, status in nodes.items() if _several(status.unit_ids())), ""),
        other_arch=next((node for node, status in nodes.items() if status.machine and status.machine.arch != here), ""),
        model_sha256=manifest.model_sha256,
        hidden=manifest.dims.hidden,
        top_k=manifest.dims.top_k,
        scored=scored,
        draft_model=bool(manifest.draft) or config.draft_model is not None,
        why_no_drafts=why_no_drafts or _batch_variant(dispatcher),
    )


def _several(units: tuple[UnitId, ...]) -> bool:
    """Whether some layer has several of these units."""
    return max(Counter(unit.layer for unit in units).values(), default=0) > 1


def _batch_variant(dispatcher: Dispatcher) -> str:
    nodes = dispatcher.registry.batch_variant()
    return f"on {', '.join(nodes)} a token's result depends on the others in its batch" if nodes else ""
