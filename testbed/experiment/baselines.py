"""Measures how fast the parts of a system are on their own, at the start and end of every session.

Each baseline is one short answer with top-k. Baselines tell differences between days or places from differences between
policies:

station    all experts in this process, no network
one-node   one node process with all experts, over the plan's network
loopback   the plan's nodes as processes on this machine's loopback
wired      the plan's nodes over cable: running nodes that reach the broker by cable, or the emulated network's profile
           `wired` or `lan`
wifi       the plan's nodes over Wi-Fi: running nodes on Wi-Fi, or the emulated network with each profile of the plan
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.sequence import Sequence
from bs_coordinator.selection import TopK
from common.errors import one_line
from edge_node.experts import check_memory, needed_bytes
from testbed.experiment.networks import Loopback, Network
from testbed.experiment.system_under_test import SystemUnderTest, in_process_system
from testbed.plan.schema import BaselineKind, Plan
from testbed.run_directory.baselines import Baseline, Phase, append_baseline
from testbed.run_directory.directory import BundleFacts, RunDir
from wire.manifest import load_manifest

Route = Literal["wired", "wifi"]
OnProgress = Callable[[str], None]
_WIRED_PROFILES = ("wired", "lan")
_ALL_EXPERTS = "L*:E*"


class _NotApplicableError(Exception):
    """The baseline doesn't apply to the plan's network; the message says why."""


OpenSystem = Callable[[Plan, BundleFacts, Network], AbstractContextManager[SystemUnderTest]]
Routes = Callable[[], Mapping[str, Route | None]]
"""Returns how each running node reaches the broker; None for nodes that don't report it."""


def measure_baselines(
    run: RunDir,
    network: Network,
    open_system: OpenSystem,
    routes: Routes,
    *,
    session: int,
    phase: Phase,
    on_progress: OnProgress,
) -> None:
    """Measure all baselines of the plan and append them to the run's file.

    A baseline that can't be measured is recorded with the reason instead of being raised.

    Args:
        open_system: starts a system with nodes (`distributed_system`).

    Raises:
        StorageError: the file can't be written.
    """
    plan = run.plan
    if plan.baselines is None:
        return
    bundle = run.manifest.bundles[0]
    for kind in plan.baselines.kinds:
        on_progress(f"baseline {kind}, {phase}")
        for profile in _profiles(kind, plan, network):
            made = Baseline(session=session, phase=phase, kind=kind, bundle=bundle.name, unix_ns=time.time_ns())
            try:
                with _system(kind, profile, plan, bundle, network, open_system) as system:
                    over = _over(kind, profile, routes() if plan.external else {})
                    made = _measured(msgspec.structs.replace(made, over=over), system, plan, bundle.top_k)
            except Exception as error:  # noqa: BLE001 (libraries raise errors of any class: cells must run all the same)
                made = msgspec.structs.replace(made, why_not=one_line(error))
            append_baseline(run, made)


def _profiles(kind: BaselineKind, plan: Plan, network: Network) -> Iterable[str]:
    """Link profiles to measure a baseline with; one empty name if the network has none."""
    if kind == "wifi":
        return plan.profiles or network.profiles[:1] or ("",)
    if kind == "wired":
        return [name for name in _WIRED_PROFILES if name in network.profiles][:1] or ("",)
    return network.profiles[:1] if kind == "one-node" and network.profiles else ("",)


@contextmanager
def _system(
    kind: BaselineKind, profile: str, plan: Plan, bundle: BundleFacts, network: Network, open_system: OpenSystem
) -> Iterator[SystemUnderTest]:
    """The system that a baseline is measured on.

    Raises:
        _NotApplicableError: the plan's network has no such system.
    """
    plan = msgspec.structs.replace(plan, churn=None)
    if kind == "station":
        manifest = load_manifest(Path(bundle.path))
        check_memory(needed_bytes(manifest.experts, manifest.quantisation.scheme), budget=None)
        yield in_process_system(plan, bundle)
        return
    if kind == "loopback":
        if plan.external:
            raise _NotApplicableError("the nodes run on other machines")
        plan, network = msgspec.structs.replace(plan, network="localhost", profiles=()), Loopback()
    elif kind == "one-node":
        if plan.external:
            raise _NotApplicableError("running nodes hold different experts")
        plan = msgspec.structs.replace(plan, nodes={next(iter(plan.node_experts(bundle.experts))): _ALL_EXPERTS})
    elif not plan.external and not network.profiles:
        raise _NotApplicableError("the nodes are on this machine's loopback")
    elif kind == "wired" and not plan.external and not profile:
        raise _NotApplicableError(f"the emulated network has no profile {' or '.join(_WIRED_PROFILES)}")
    if profile:
        network.set_profile(profile)
    with open_system(plan, bundle, network) as system:
        yield system


def _over(kind: BaselineKind, profile: str, routes: Mapping[str, Route | None]) -> str:
    """The network that a baseline is measured over, in words.

    Raises:
        _NotApplicableError: running nodes reach the broker in another way.
    """
    if kind == "station":
        return "no network"
    if not routes:
        return profile or "loopback"
    found = {route: sorted(node for node, r in routes.items() if r == route) for route in ("wired", "wifi", None)}
    all_wired = len(found["wired"]) == len(routes)
    if (kind == "wired") != all_wired:
        raise _NotApplicableError(
            "every node uses a cable" if all_wired else "not every node reports that it uses a cable"
        )
    return "; ".join(f"{route or 'unknown'}: {', '.join(nodes)}" for route, nodes in found.items() if nodes)


def _measured(made: Baseline, system: SystemUnderTest, plan: Plan, top_k: int) -> Baseline:
    assert plan.baselines is not None  # noqa: S101 (checked by the caller)
    system.model.policy = TopK(top_k)
    system.model.deadline = time.monotonic() + plan.cell_timeout_s
    ids = system.tokenizer.encode(plan.baselines.prompt)
    config = SamplingConfig(max_tokens=plan.baselines.tokens)
    times: list[int] = []
    # Twice: the first answer fills caches and settles the link estimates.
    for _ in range(2):
        times, began_ns = [], time.perf_counter_ns()
        for _event in Sequence(system.model, system.tokenizer).generate(ids, config):
            now_ns = time.perf_counter_ns()
            times.append(now_ns - began_ns)
            began_ns = now_ns
    base_station = system.base_station
    return msgspec.structs.replace(
        made,
        first_token_ns=times[0],
        token_ns=times[1:],
        broker_ms=base_station.broker_ms if base_station else None,
        nodes_ms=base_station.nodes_ms if base_station else {},
    )
