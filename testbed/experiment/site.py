"""A running system for cells: broker, nodes, base station; or the model with all experts in this process."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.broker.processes import mosquitto_path, open_broker
from bs_coordinator.config import BaseStationConfig, ResidentConfig
from bs_coordinator.engine.experts import Experts
from bs_coordinator.engine.model import DistributedMixtral
from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import Policy, TopK
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.trunk import Trunk
from common.errors import WdmoeError
from common.sizes import parse_bytes
from testbed.demo_assets import demo_draft
from testbed.evaluation.local_experts import LocalExperts
from testbed.experiment.churn import Tell, churning
from testbed.experiment.networks import Network
from testbed.experiment.plan import Plan
from testbed.experiment.rundir import BundleFacts
from testbed.local_nodes import local_nodes
from wire.broker_url import BrokerAddress
from wire.tensors import WireDtype


class ObservedMixtral(DistributedMixtral):
    """A model that shows every step's record to somebody, and stops at a deadline.

    Attributes:
        observe: called after each step.
        on_step: called after each step as well, for who only wants to know that there was one.
        deadline: on the monotonic clock, in seconds.
    """

    def __init__(self, trunk: Trunk, experts: Experts, policy: Policy) -> None:
        super().__init__(trunk, experts, policy)
        self.observe: Callable[[StepRecord], None] = lambda record: None
        self.on_step: Callable[[], None] = lambda: None
        self.deadline = float("inf")

    def step(self, feeds: Sequence[SequenceInput], *, all_logits: bool = False) -> tuple[list[Tensor], StepRecord]:
        """See `DistributedMixtral.step`.

        Raises:
            WdmoeError: the deadline has passed.
        """
        if time.monotonic() > self.deadline:
            raise WdmoeError("the cell's time is up (cell_timeout_s)")
        logits, record = super().step(feeds, all_logits=all_logits)
        self.observe(record)
        self.on_step()
        return logits, record


@dataclass(frozen=True, slots=True)
class Site:
    """Where cells run.

    Attributes:
        station: None in this process.
        address: of the nodes' broker, None in this process.
        cluster: of the nodes.
        local: the experts in this process, None on nodes.
        chosen: in this process, by workload and policy: answers of policies that do not look at links, which are the
            same on all of them.
    """

    model: ObservedMixtral
    tokenizer: Tokenizer
    station: BaseStation | None
    address: BrokerAddress | None = None
    cluster: str = ""
    local: LocalExperts | None = None
    chosen: dict[tuple[str, Policy], list[int]] = field(default_factory=dict)

    def settle(self, seconds: float, *, shared_air: bool) -> None:
        """After a change of the links: let time pass and measure them again."""
        if self.station:
            self.station.dispatcher.links.shared_air = shared_air
            self.station.dispatcher.measure_links(seconds)


@contextmanager
def distributed_site(
    plan: Plan, bundle: BundleFacts, network: Network, folder: Path, *, broker: str, say: Callable[[str], None],
    tell: Tell | None = None,
) -> Iterator[Site]:  # fmt: skip
    """Start what the plan does not find running, and prove it ready.

    Args:
        folder: for the nodes' logs.
        broker: `mosquitto`, `embedded` or an URL.
        tell: told of nodes that are lost and come back by the plan's `churn`; there is none without it.

    Raises:
        WdmoeError: something does not come up.
    """
    outside = plan.external
    config = BaseStationConfig(
        bundle=Path(bundle.path),
        cluster=outside.cluster if outside else "default",
        wire=WireDtype.named(plan.wire),
        nodes_timeout_s=plan.nodes_timeout_s,
        layer_timeout_s=plan.layer_timeout_s,
        degrade=False,
        cluster_key=Path(outside.cluster_key) if outside and outside.cluster_key else None,
        resident=ResidentConfig(parse_bytes(plan.resident)) if plan.resident else None,
        draft=plan.draft,
        stay_awake=plan.stay_awake,
        draft_model=demo_draft() if plan.draft in ("dense", "auto") and "/" not in bundle.name else None,
    )
    with ExitStack() as stack:
        if outside:
            address = stack.enter_context(open_broker(outside.broker, access=outside.access))
        else:
            address = stack.enter_context(open_broker(broker, host=network.address))
            nodes = plan.node_experts(bundle.experts)
            prefixes = {node: network.prefix(node) for node in nodes}
            fleet = stack.enter_context(
                local_nodes(config.bundle, address, folder, nodes, prefixes=prefixes, threads=plan.node_threads)
            )
            # What is missing is no news while nodes start, and nothing for the user to start; a timeout names it.
            say("waiting for the nodes")
        station = stack.enter_context(open_base_station(config, address, on_progress=say if outside else None))
        model = ObservedMixtral(station.model.trunk, station.dispatcher, station.model.policy)
        if plan.churn and tell:
            # Not before the station is ready: what it waits for would never be there.
            stack.enter_context(churning(fleet, plan.churn, seed=f"{plan.seed} {folder.name}", tell=tell))
        yield Site(model, station.tokenizer, station, address, config.cluster)


def in_process_site(plan: Plan, bundle: BundleFacts) -> Site:
    """The same model without nodes."""
    folder = Path(bundle.path)
    trunk = Trunk(folder / "trunk")
    experts = LocalExperts(folder, threads=os.cpu_count() or 1, wire=WireDtype.named(plan.wire))
    model = ObservedMixtral(trunk, experts, TopK(bundle.top_k))
    return Site(model, Tokenizer(folder / "trunk", fallback_eos=trunk.eos_id), None, local=experts)


def broker_of(plan: Plan) -> str:
    """What `broker: auto` means on this machine."""
    if plan.external:
        return plan.external.broker
    if plan.broker == "auto":
        return "mosquitto" if mosquitto_path() else "embedded"
    return plan.broker
