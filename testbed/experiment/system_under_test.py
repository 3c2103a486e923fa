"""The system that cells run on: broker, nodes and base station, or the model with all experts in this process."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.broker.processes import mosquitto_path, open_broker
from bs_coordinator.config import BaseStationConfig, ResidentConfig
from bs_coordinator.engine.experts import Experts
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.engine.waiting import WaitListener
from bs_coordinator.selection import Policy, TopK
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.interface import Trunk
from bs_coordinator.trunk.load import load_trunk
from common.errors import WdmoeError
from common.sizes import parse_bytes
from testbed.demo_assets import demo_draft
from testbed.evaluation.local_experts import LocalExperts
from testbed.experiment.churn import EmitEvent, churning
from testbed.experiment.networks import Network
from testbed.experiment.plan_files import named_demo_bundle
from testbed.local_nodes import local_nodes
from testbed.plan.schema import Plan
from testbed.run_directory.directory import BundleFacts
from wire.broker_address import BrokerAddress

_SET_BY_PLANS = frozenset({"policy", "degrade", "draft"})
"""Fields that no preset changes: policies are the arms of a run, and a lost expert fails its cell."""


class ObservedModel(DistributedModel):
    """A model that reports each step and stops at a deadline.

    Attributes:
        observe: called with the record of each step.
        on_step: called after each step.
        deadline: seconds on the monotonic clock.
    """

    def __init__(self, trunk: Trunk, experts: Experts, policy: Policy) -> None:
        super().__init__(trunk, experts, policy)
        self.observe: Callable[[StepRecord], None] = lambda record: None
        self.on_step: Callable[[], None] = lambda: None
        self.deadline = float("inf")

    def step(
        self, feeds: Sequence[SequenceInput], *, all_logits: bool = False, waits: WaitListener | None = None
    ) -> tuple[list[Tensor], StepRecord]:
        """Run one forward step (`DistributedModel.step`) and report it.

        Raises:
            WdmoeError: the deadline has passed.
        """
        if time.monotonic() > self.deadline:
            raise WdmoeError("the cell took longer than the plan's cell_timeout_s")
        logits, record = super().step(feeds, all_logits=all_logits, waits=waits)
        self.observe(record)
        self.on_step()
        return logits, record


@dataclass(frozen=True, slots=True)
class SystemUnderTest:
    """A system that is ready for cells.

    Attributes:
        base_station: None if all experts are in this process.
        address: broker of the nodes; None if all experts are in this process.
        cluster: cluster of the nodes.
        local: the experts in this process; None on nodes.
        answers: answers to items with policies that don't use link forecasts, by workload and policy. They are equal
            for all link profiles, so they are evaluated once. Only used if all experts are in this process.
    """

    model: ObservedModel
    tokenizer: Tokenizer
    base_station: BaseStation | None
    address: BrokerAddress | None = None
    cluster: str = ""
    local: LocalExperts | None = None
    answers: dict[tuple[str, Policy], list[Any]] = field(default_factory=dict)

    def settle(self, seconds: float, *, shared_air: bool) -> None:
        """Measure the links for a while, after they have changed."""
        if self.base_station:
            self.base_station.dispatcher.links.shared_air = shared_air
            self.base_station.dispatcher.measure_links(seconds)


@contextmanager
def distributed_system(
    plan: Plan,
    bundle: BundleFacts,
    network: Network,
    folder: Path,
    *,
    broker: str,
    on_progress: Callable[[str], None],
    emit_event: EmitEvent | None = None,
) -> Iterator[SystemUnderTest]:
    """Start a system with nodes, or connect to running nodes, and wait until it is ready.

    Args:
        folder: for the nodes' logs.
        broker: `mosquitto`, `embedded` or a URL.
        emit_event: called when the plan's `churn` kills or restarts a node; without it there is no churn.

    Raises:
        WdmoeError: a part of the system doesn't come up.
    """
    outside = plan.external
    config = BaseStationConfig(
        bundle=Path(bundle.path),
        cluster=outside.cluster if outside else "default",
        preset=plan.preset,
        given=_SET_BY_PLANS | ({"wire"} if plan.wire else set()),
        wire=plan.wire_dtype,
        nodes_timeout_s=plan.nodes_timeout_s,
        layer_timeout_s=plan.layer_timeout_s,
        degrade=False,
        cluster_key=Path(outside.cluster_key) if outside and outside.cluster_key else None,
        resident=ResidentConfig(parse_bytes(plan.resident) if plan.resident else None),
        draft=plan.draft,
        stay_awake=plan.stay_awake,
        priority=plan.priority,
        draft_model=_draft_model(plan, bundle),
    )
    with ExitStack() as stack:
        if outside:
            address = stack.enter_context(open_broker(outside.broker, access=outside.access))
        else:
            address = stack.enter_context(open_broker(broker, host=network.address, priority=plan.priority))
            nodes = plan.node_experts(bundle.experts)
            prefixes = {node: network.prefix(node) for node in nodes}
            local = stack.enter_context(
                local_nodes(
                    config.bundle, address, folder, nodes, prefixes=prefixes, threads=plan.node_threads,
                    options=["--priority", plan.priority],
                )
            )  # fmt: skip
            on_progress("waiting for the nodes")
        # Which experts are still missing only concerns users who start the nodes themselves; a timeout names them.
        on_missing = on_progress if outside else None
        base_station = stack.enter_context(open_base_station(config, address, on_progress=on_missing))
        model = ObservedModel(base_station.model.trunk, base_station.dispatcher, base_station.model.policy)
        model.raises_priority = base_station.model.raises_priority
        if plan.churn and emit_event:
            # Not before the base station is ready: it waits for all nodes.
            seed = f"{plan.seed} {folder.name}"
            stack.enter_context(churning(local, plan.churn, seed=seed, emit_event=emit_event))
        yield SystemUnderTest(model, base_station.tokenizer, base_station, address, config.cluster)


def in_process_system(plan: Plan, bundle: BundleFacts, device: str | None = None) -> SystemUnderTest:
    """The model with all experts in this process, without broker and nodes.

    Args:
        device: what computes the experts (`LocalExperts`).
    """
    folder = Path(bundle.path)
    trunk = load_trunk(folder / "trunk")
    experts = LocalExperts(folder, threads=torch.get_num_threads(), wire=plan.wire_dtype, device=device)
    model = ObservedModel(trunk, experts, TopK(bundle.top_k))
    return SystemUnderTest(model, Tokenizer(folder / "trunk"), None, local=experts)


def broker_of(plan: Plan) -> str:
    """The broker of a plan; `auto` is mosquitto if it is installed, else the embedded broker."""
    if plan.external:
        return plan.external.broker
    if plan.broker == "auto":
        return "mosquitto" if mosquitto_path() else "embedded"
    return plan.broker


def _draft_model(plan: Plan, bundle: BundleFacts) -> Path | None:
    """The draft model of a demo model's bundle, if the plan drafts with one; other bundles have their own."""
    if plan.draft not in ("dense", "auto") or "/" in bundle.name:
        return None
    return demo_draft(model=named_demo_bundle(bundle.name).model)
