"""Measures what a preset decides by, before the first prompt: links by probes, memory, and what the nodes say."""

import math
import platform
from collections import Counter
from collections.abc import Callable

from bs_coordinator.config import BaseStationConfig
from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.dispatch.readiness import wait_for_experts
from bs_coordinator.links.estimator import KNOWN_SAMPLES, rate_known, rtt_known
from bs_coordinator.presets.facts import Facts, Link
from bs_coordinator.resident.room import needed_room
from common.memory import available_bytes
from wire.experts import UnitId
from wire.manifest import Manifest

_STATUSES_S = 0.3
"""Time for the retained statuses of running nodes to arrive."""
_PROBED_S = 1.0
"""How long idle links are probed at least."""
_LONGEST_S = 5.0
"""And at most, if some link is not known by then."""
_MORE_S = 0.25


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
    if not config.resident.budget_bytes:
        wait_for_experts(dispatcher, timeout_s=config.nodes_timeout_s, on_wait=on_wait)
    else:
        dispatcher.pump(_STATUSES_S)
    nodes, here = dispatcher.registry.nodes, platform.machine()
    room = needed_room(manifest)
    return Facts(
        links=_measured_links(dispatcher),
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


def _measured_links(dispatcher: Dispatcher) -> tuple[Link, ...]:
    """The links whose round trips are known by then; a rate that is not known yet counts as unlimited."""
    until_s = dispatcher.clock.monotonic_s() + _LONGEST_S
    dispatcher.measure_links(_PROBED_S)
    while len(known := _known_links(dispatcher)) < len(dispatcher.registry.nodes):
        if dispatcher.clock.monotonic_s() >= until_s:
            break
        dispatcher.measure_links(_MORE_S)
    return known


def _known_links(dispatcher: Dispatcher) -> tuple[Link, ...]:
    estimates = [estimate.link for estimate in dispatcher.links.estimates(dispatcher.clock.perf_ns() / 1e9)]
    return tuple(
        Link(1e3 * link.rtt_s, _rate(link.down_mbps, link.down_std_mbps), _rate(link.up_mbps, link.up_std_mbps))
        for link in estimates
        if link.samples >= KNOWN_SAMPLES and rtt_known(link.rtt_s, link.rtt_std_s)
    )


def _rate(mbps: float, std_mbps: float) -> float:
    return mbps if rate_known(mbps, std_mbps) else math.inf


def _several(units: tuple[UnitId, ...]) -> bool:
    """Whether some layer has several of these units."""
    return max(Counter(unit.layer for unit in units).values(), default=0) > 1


def _batch_variant(dispatcher: Dispatcher) -> str:
    nodes = dispatcher.registry.batch_variant()
    return f"on {', '.join(nodes)} a token's result depends on the others in its batch" if nodes else ""
