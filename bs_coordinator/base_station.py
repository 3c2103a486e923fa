"""Everything of a base station put together and proven ready: used by the command line and by the testbed."""

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.dispatch.readiness import measure_broker, prove_nodes, try_residents, wait_for_experts
from bs_coordinator.engine.model import DistributedMixtral
from bs_coordinator.engine.sequence import Sequence, Tokenizer
from bs_coordinator.engine.speculation import DraftMode, Speculation, load_draft_model
from bs_coordinator.links import LinkMonitor
from bs_coordinator.links.broker_sockets import BrokerSockets, is_local
from bs_coordinator.links.log import link_log, no_log
from bs_coordinator.nodes.registry import NodeRegistry
from bs_coordinator.selection import Policy, TopK, parse_policy
from bs_coordinator.trunk.trunk import Trunk, TrunkDtype, check_device
from common.cpu_idle import cpu_idle_disabled
from wire.broker_url import BrokerAddress
from wire.errors import BundleError
from wire.frame_auth import read_cluster_key
from wire.manifest import Manifest, load_manifest, verify_file
from wire.mqtt import MqttTransport
from wire.tensors import WireDtype
from wire.topics import Topics

if TYPE_CHECKING:
    from bs_coordinator.resident import ResidentExperts, ResidentHolder

log = logging.getLogger(__name__)

_FIRST_LOOK_S = 1.0
"""How long idle links are probed before the first prompt; by then each node has had several sizes."""

_MOST_RESIDENT_THREADS = 4
"""Reading weights is bound by memory, which few cores saturate; the trunk may need the others."""

_FIRST_STATUSES_S = 0.3
"""For the retained statuses of nodes that are there: what none of them holds is kept here first."""

_LAST_HOLDER_S = 1.0
"""How long an overdue answer is awaited whose experts nobody else holds, where going on without them is allowed."""


@dataclass(frozen=True, slots=True)
class ResidentConfig:
    """Experts that the base station keeps itself.

    Attributes:
        budget_bytes: RAM for them.
        traffic: file in which the experts' traffic is kept for the next start; not kept if None.
        begin_with: latency.csv of a run, whose traffic counts where there is no such file yet.
        prepacked: see `edge_node.experts.prepacked`.
    """

    budget_bytes: int
    traffic: Path | None = None
    begin_with: Path | None = None
    prepacked: Path | None = None


@dataclass(frozen=True, slots=True)
class BaseStationConfig:
    """How a base station runs.

    Attributes:
        device: of the trunk, as torch names it.
        policy: name and options, as `bs_coordinator.selection.parse_policy` reads them.
        nodes_timeout_s: how long to wait for nodes before giving up.
        layer_timeout_s: how long one layer may wait for its nodes.
        degrade: go on without experts that are lost, see `DistributedMixtral`.
        shared_air: all links share one half-duplex Wi-Fi channel.
        link_log: file that every link sample is appended to, for replay.
        cluster_key: file of the key that frames are authenticated with.
        resident: experts to keep here; none if None.
        draft: how tokens are guessed; it changes how long answers take, not what they say. `auto` makes sure of
            that; the other modes are taken as they are asked for.
        draft_model: folder of a draft model, instead of the bundle's own.
        stay_awake: keep this machine's cores from sleeping, see `common.cpu_idle`.
    """

    bundle: Path
    cluster: str = "default"
    device: str = "cpu"
    dtype: TrunkDtype = "fp32"
    wire: WireDtype = WireDtype.FP16
    policy: str = "topk"
    nodes_timeout_s: float = 60.0
    layer_timeout_s: float = 30.0
    degrade: bool = False
    shared_air: bool = False
    link_log: Path | None = None
    cluster_key: Path | None = None
    resident: ResidentConfig | None = None
    draft: DraftMode = "none"
    draft_model: Path | None = None
    stay_awake: bool = False


@dataclass(frozen=True, slots=True)
class BaseStation:
    """A base station that is ready.

    Attributes:
        broker_ms: median round trip of a small message through the broker.
        nodes_ms: round trip of one token, by node.
        speculation: what its sequences guess with.
        residents: experts that are kept here, if any.
    """

    manifest: Manifest
    model: DistributedMixtral
    tokenizer: Tokenizer
    dispatcher: Dispatcher
    broker_ms: float
    nodes_ms: dict[str, float]
    speculation: Speculation
    residents: "ResidentExperts | None" = None

    def new_sequence(self) -> Sequence:
        """An empty sequence."""
        return Sequence(self.model, self.tokenizer, speculation=self.speculation)


@contextmanager
def open_base_station(
    config: BaseStationConfig, address: BrokerAddress, *, say: Callable[[str], None] = lambda line: None
) -> Iterator[BaseStation]:
    """Load the trunk, connect, wait for the nodes and prove each with one token.

    Args:
        say: told what is being waited for.

    Raises:
        ValueError: the policy is unknown or its options are wrong.
        BundleError, BrokerError, PlacementError, DispatchError: see there.
    """
    manifest = load_manifest(config.bundle)
    policy = parse_policy(config.policy, top_k=manifest.dims.top_k, model_sha256=manifest.model_sha256)
    for file in manifest.trunk:
        verify_file(config.bundle, file)
    check_device(config.device)
    cluster_key = read_cluster_key(config.cluster_key, config.cluster) if config.cluster_key else None
    client_id = f"wdmoe-bs-{secrets.token_hex(4)}"
    topics = Topics(config.cluster)
    # The broker first: a wrong address should not cost the time that a trunk takes to load. By a connection of its
    # own: nobody keeps one alive while a slow machine loads.
    with closing(MqttTransport(address, client_id)) as transport:
        broker_ms = measure_broker(transport, topics.echo(client_id))
    with ExitStack() as stack:
        if config.stay_awake:
            stack.enter_context(cpu_idle_disabled())
        folder = config.bundle / "trunk"
        trunk = Trunk(folder, device=config.device, dtype=config.dtype)
        tokenizer = Tokenizer(folder, fallback_eos=trunk.eos_id)
        # Elsewhere what a token gets depends on those beside it: a little, which can turn the balance between two
        # tokens, or, where a policy looks at links and loads, by design.
        speculation = _speculation(config, manifest, tokenizer, _why_no_drafts(config, trunk, manifest, policy))
        sample_log = stack.enter_context(link_log(config.link_log)) if config.link_log else no_log
        sockets = BrokerSockets()
        if is_local(address.host):
            stack.enter_context(sockets.watching(address.port))
        links = LinkMonitor(shared_air=config.shared_air, log=sample_log)
        here = stack.enter_context(_residents(config, manifest, links)) if config.resident else None
        dispatcher = Dispatcher(
            MqttTransport(address, client_id),
            topics,
            NodeRegistry(manifest.dims, manifest.model_sha256),
            dtype=config.wire,
            timeout_s=config.layer_timeout_s,
            reconnect=lambda: MqttTransport(address, client_id, timeout_s=5.0),
            last_holder_s=_LAST_HOLDER_S if config.degrade else None,
            links=links,
            broker_sockets=sockets.take,
            cluster_key=cluster_key,
            here=here,
        )
        stack.callback(dispatcher.close)
        if here:
            dispatcher.pump(_FIRST_STATUSES_S)
            dispatcher.fill_residents()
        wait_for_experts(dispatcher, timeout_s=config.nodes_timeout_s, on_wait=say)
        nodes_ms = prove_nodes(dispatcher, manifest)
        try_residents(dispatcher, manifest)
        if speculation.mode == "auto" and (unsure := dispatcher.fleet.batch_variant()):
            log.info("no drafts: on %s a token's result depends on those beside it", ", ".join(unsure))
            speculation = Speculation()
        dispatcher.measure_links(_FIRST_LOOK_S)
        model = DistributedMixtral(trunk, dispatcher, policy, degrade=config.degrade)
        residents = here.experts if here else None
        yield BaseStation(manifest, model, tokenizer, dispatcher, broker_ms, nodes_ms, speculation, residents)


@contextmanager
def _residents(config: BaseStationConfig, manifest: Manifest, links: LinkMonitor) -> "Iterator[ResidentHolder]":
    """Room for experts; nothing is loaded yet."""
    # onnxruntime is imported only where experts are kept.
    from bs_coordinator.resident import ResidentExperts, ResidentHolder, Traffic, read_traffic, traffic_of_log

    wanted = config.resident
    assert wanted is not None  # noqa: S101 - asked by the caller
    if wanted.begin_with is not None and not (wanted.traffic and wanted.traffic.exists()):
        traffic = traffic_of_log(wanted.begin_with, manifest.dims)
    elif wanted.traffic is not None:
        traffic = read_traffic(wanted.traffic, manifest.dims, manifest.model_sha256)
    else:
        traffic = Traffic(manifest.dims)
    experts = ResidentExperts(
        config.bundle,
        manifest,
        budget_bytes=wanted.budget_bytes,
        wire=config.wire,
        threads=max(1, min(_MOST_RESIDENT_THREADS, (os.cpu_count() or 1) // 2)),
        traffic=traffic,
        traffic_path=wanted.traffic,
        prepacked=wanted.prepacked,
    )
    try:
        log.info("room for %d of %d experts here", experts.slots, len(manifest.experts))
        yield ResidentHolder(experts, links)
    finally:
        experts.close()


def _why_no_drafts(config: BaseStationConfig, trunk: Trunk, manifest: Manifest, policy: Policy) -> str:
    """Why answers with drafts would not be those without; empty where they are."""
    if not trunk.batch_invariant:
        return f"the trunk runs on {config.device} in {config.dtype}, not on cpu in fp32"
    if manifest.quantisation.scheme == "int8-dynamic":
        return "experts are int8-dynamic"
    if not isinstance(policy, TopK):
        return f"the policy {config.policy} looks at links and loads"
    return ""


def _speculation(config: BaseStationConfig, manifest: Manifest, tokenizer: Tokenizer, why_not: str) -> Speculation:
    if config.draft == "auto" and why_not:
        log.info("no drafts, with which answers could differ: %s", why_not)
        return Speculation()
    model = None
    if config.draft in ("dense", "auto"):
        model = load_draft_model(
            config.bundle, manifest, tokenizer.ids, folder=config.draft_model, device=config.device
        )  # fmt: skip
    if config.draft == "dense" and model is None:
        raise BundleError(
            "--draft dense: the bundle brings no draft model: make one with 'wdmoe-export draft BUNDLE', or name one "
            "with --draft-model"
        )
    return Speculation(config.draft, model)
