"""Assembly of a base station: connect, load the model, prove the nodes. Used by the commands and by the testbed."""

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from bs_coordinator.broker.processes import configured_broker
from bs_coordinator.config import BaseStationConfig, ResidentConfig
from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.dispatch.output_guard import probe_gains
from bs_coordinator.dispatch.readiness import measure_broker, prove_nodes, try_local_experts, wait_for_experts
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.sequence import Sequence
from bs_coordinator.engine.speculation import Speculation, load_draft_model
from bs_coordinator.engine.template_process import PROCESSES
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.links import LinkMonitor
from bs_coordinator.links.broker_sockets import BrokerSockets, is_local
from bs_coordinator.links.log import link_log, no_log
from bs_coordinator.nodes.registry import NodeRegistry
from bs_coordinator.selection import Policy, TopK
from bs_coordinator.selection.registry import check_scores, configured_policy
from bs_coordinator.trunk.generic import GenericTrunk
from bs_coordinator.trunk.interface import Trunk
from bs_coordinator.trunk.load import check_device, load_trunk
from common import real_time
from common.config import ConfigError
from common.cores import usable_cores
from common.cpu_idle import cpu_idle_disabled
from wire.broker_address import BrokerAddress
from wire.errors import BundleError
from wire.frame_auth import ClusterKey, read_cluster_key
from wire.manifest import Manifest, verify_file
from wire.signature import load_trusted_manifest
from wire.topics import Topics
from wire.transport import Transport
from wire.transports import connect

if TYPE_CHECKING:
    from bs_coordinator.presets import Choice
    from bs_coordinator.resident import ResidentExperts

log = logging.getLogger(__name__)

_FIRST_LOOK_S = 1.0
"""How long idle links are probed before the first prompt; by then each node has had several sizes."""

_MOST_RESIDENT_THREADS = 4
"""Reading weights is bound by memory, which few cores saturate; the trunk may need the others."""

_FIRST_STATUSES_S = 0.3
"""Time for the retained statuses of running nodes to arrive: experts that none of them holds are kept here first."""

_LAST_HOLDER_S = 1.0
"""How much longer to wait for an overdue answer if no other holder has its experts and `degrade` is allowed."""

_CONNECT_TIMEOUT_S = 10.0
_RECONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class BaseStation:
    """A base station that is ready.

    Attributes:
        broker_ms: median round trip of a small message through the broker.
        nodes_ms: round trip of one token in ms, by node.
        speculation: how its sequences draft tokens.
        config: as it was asked for, with the preset's choice in place of defaults.
        residents: experts kept on the base station itself; None if there are none.
        choice: of the preset; None without one.
    """

    manifest: Manifest
    model: DistributedModel
    tokenizer: Tokenizer
    dispatcher: Dispatcher
    broker_ms: float
    nodes_ms: dict[str, float]
    speculation: Speculation
    config: BaseStationConfig
    residents: "ResidentExperts | None" = None
    choice: "Choice | None" = None

    def new_sequence(self) -> Sequence:
        """An empty sequence."""
        return Sequence(self.model, self.tokenizer, speculation=self.speculation)

    @property
    def levers(self) -> dict[str, str]:
        """What the preset chose, by option, after its own name; empty without a preset."""
        return self.choice.values if self.choice else {}


@contextmanager
def open_base_station(
    config: BaseStationConfig, address: BrokerAddress | None = None, *, on_progress: Callable[[str], None] | None = None
) -> Iterator[BaseStation]:
    """Check the bundle, connect, load the trunk, wait for the nodes, and prove each of them with one token.

    Args:
        address: a broker that is already running, instead of `config.broker`.
        on_progress: called with one line whenever what the base station is waiting for changes.

    Raises:
        ConfigError: the policy is unknown or its options are wrong, or the broker's URL is.
        BundleError: the bundle is missing, damaged, or not signed with `config.bundle_key`.
        BrokerError: the broker does not answer, or delays messages.
        PlacementError: no node holds some expert after `config.nodes_timeout_s`.
        DispatchError: a node does not answer, or not with this model's experts.
        TrunkError, MemoryBudgetError, KeyFileError, StorageError: as their names say.
    """
    manifest = load_trusted_manifest(config.bundle, config.bundle_key)
    configured_policy(config, manifest)
    for file in manifest.trunk:
        verify_file(config.bundle, file)
    check_device(config.device)
    cluster_key = read_cluster_key(config.cluster_key, config.cluster) if config.cluster_key else None
    with ExitStack() as stack:
        if address is None:
            address = stack.enter_context(configured_broker(config))
        client = _Client(address, Topics(config.cluster), f"wdmoe-bs-{secrets.token_hex(4)}", cluster_key)
        # Before the trunk is loaded, so that a wrong address is reported at once; on a connection of its own, because
        # nothing would keep it alive while a slow machine loads.
        with closing(client.connect()) as transport:
            broker_ms = measure_broker(transport, client.topics.echo(client.id))
        if config.stay_awake:
            stack.enter_context(cpu_idle_disabled())
        began_s = time.monotonic()
        trunk = _load(config, manifest)
        log.info("the trunk is loaded, after %.1f s; looking for nodes", time.monotonic() - began_s)
        choice = _choice(config, manifest, client, trunk, on_progress)
        if choice is not None:
            config = choice.config
        policy = configured_policy(config, manifest)
        tokenizer = Tokenizer(config.bundle / "trunk")
        if tokenizer.has_chat_template:
            PROCESSES.start()  # it is ready by the time that nodes are
        speculation = _speculation(config, manifest, tokenizer, trunk, policy)
        dispatcher, residents = stack.enter_context(_connect(config, manifest, client))
        nodes_ms = _prove(config, manifest, dispatcher, on_progress)
        if speculation.mode == "auto" and (nodes := dispatcher.registry.batch_variant()):
            log.info("no drafts: on %s a token's result depends on the others in its batch", ", ".join(nodes))
            speculation = Speculation()
        model = DistributedModel(
            trunk, dispatcher, policy, degrade=config.degrade,
            quarantine=dispatcher.quarantine, acquit=dispatcher.acquit,
        )  # fmt: skip
        if config.priority == "auto":
            if refusal := real_time.why_not():
                log.info("no real-time priority: %s", refusal)
            model.raises_priority = not refusal
        yield BaseStation(
            manifest, model, tokenizer, dispatcher, broker_ms, nodes_ms, speculation, config, residents, choice
        )  # fmt: skip


class _Client(NamedTuple):
    """How this base station appears on the broker."""

    address: BrokerAddress
    topics: Topics
    id: str
    cluster_key: ClusterKey | None

    def connect(self, *, timeout_s: float = _CONNECT_TIMEOUT_S) -> Transport:
        return connect(self.address, self.id, timeout_s=timeout_s)


def _load(config: BaseStationConfig, manifest: Manifest) -> Trunk:
    trunk = load_trunk(
        config.bundle / "trunk", device=config.device, dtype=config.dtype, quantisation=config.trunk_quantisation
    )  # fmt: skip
    if trunk.layers != manifest.dims.layers:
        raise BundleError(
            f"the model asks experts in {trunk.layers} layers, the manifest lists {manifest.dims.layers}: export "
            "the bundle again"
        )
    if config.draft in ("ngram", "dense") and not trunk.can_truncate:
        raise ConfigError(f"--draft {config.draft}: this model's recurrent layers can't take tokens back; use none")
    if not trunk.scored:
        try:
            check_scores(config.policy, configured_policy(config, manifest), top_k=manifest.dims.top_k)
        except ValueError as error:
            raise ConfigError(f"--policy: {error}") from None
    return trunk


def _choice(
    config: BaseStationConfig, manifest: Manifest, client: _Client, trunk: Trunk,
    on_progress: Callable[[str], None] | None,
) -> "Choice | None":  # fmt: skip
    """What the config's preset chooses with nodes and links as they are; None without a preset.

    They are looked at on a connection of its own: the choice decides how messages are encoded.
    """
    if config.preset is None:
        return None
    from bs_coordinator.presets import choose
    from bs_coordinator.presets.look import look

    with _connect(replace(config, resident=ResidentConfig(0), link_log=None), manifest, client) as (dispatcher, _):
        facts = look(
            dispatcher, config, manifest, scored=trunk.scored, why_no_drafts=_why_no_drafts(config, trunk, manifest),
            on_wait=on_progress,
        )  # fmt: skip
    choice = choose(config.preset, config, facts)
    for line in choice.lines:
        log.info("%s", line)
    return choice


@contextmanager
def _connect(
    config: BaseStationConfig, manifest: Manifest, client: _Client
) -> "Iterator[tuple[Dispatcher, ResidentExperts | None]]":
    """A connected dispatcher, which knows of no node yet, and room for the base station's own experts."""
    with ExitStack() as stack:
        sample_log = stack.enter_context(link_log(config.link_log)) if config.link_log else no_log
        sockets = BrokerSockets()
        if not client.address.in_process and is_local(client.address.host):
            stack.enter_context(sockets.watching(client.address.port))
        links = LinkMonitor(shared_air=config.shared_air, log=sample_log)
        residents = None
        if budget_bytes := config.resident.budget_bytes:
            residents = stack.enter_context(_residents(config, budget_bytes, manifest))
        dispatcher = Dispatcher(
            client.connect(),
            client.topics,
            NodeRegistry(manifest.dims, manifest.model_sha256, tagged=client.cluster_key is not None),
            dtype=config.wire,
            timeout_s=config.layer_timeout_s,
            reconnect=lambda: client.connect(timeout_s=_RECONNECT_TIMEOUT_S),
            last_holder_s=_LAST_HOLDER_S if config.degrade else None,
            links=links,
            broker_sockets=sockets.take,
            cluster_key=client.cluster_key,
            local_experts=residents,
            probe_gains=probe_gains(manifest),
        )
        stack.callback(dispatcher.close)
        yield dispatcher, residents


def _prove(
    config: BaseStationConfig, manifest: Manifest, dispatcher: Dispatcher, on_progress: Callable[[str], None] | None
) -> dict[str, float]:
    """Wait until every expert has a holder, and ask each holder; the nodes' round trips in ms."""
    if dispatcher.local is not None:
        dispatcher.pump(_FIRST_STATUSES_S)
        dispatcher.local.fill(dispatcher.pump)
    wait_for_experts(dispatcher, timeout_s=config.nodes_timeout_s, on_wait=on_progress)
    nodes_ms = prove_nodes(dispatcher, manifest)
    try_local_experts(dispatcher, manifest)
    dispatcher.measure_links(_FIRST_LOOK_S)
    return nodes_ms


@contextmanager
def _residents(config: BaseStationConfig, budget_bytes: int, manifest: Manifest) -> "Iterator[ResidentExperts]":
    """Room for experts; nothing is loaded yet."""
    resident = config.resident
    # onnxruntime is imported only where experts are kept.
    from bs_coordinator.resident import ResidentExperts, Traffic, read_traffic, traffic_of_log

    if resident.begin_with is not None and not (resident.traffic and resident.traffic.exists()):
        traffic = traffic_of_log(resident.begin_with, manifest.dims)
    elif resident.traffic is not None:
        traffic = read_traffic(resident.traffic, manifest.dims, manifest.model_sha256)
    else:
        traffic = Traffic(manifest.dims)
    experts = ResidentExperts(
        config.bundle,
        manifest,
        budget_bytes=budget_bytes,
        wire=config.wire,
        threads=max(1, min(_MOST_RESIDENT_THREADS, usable_cores() // 2)),
        traffic=traffic,
        traffic_path=resident.traffic,
        prepacked=resident.prepacked,
    )
    try:
        log.info("room for %d of %d experts here", experts.slots, len(manifest.experts) // manifest.dims.slices)
        yield experts
    finally:
        experts.close()


def _why_no_drafts(config: BaseStationConfig, trunk: Trunk, manifest: Manifest) -> str:
    """Why drafts could change answers, whatever the policy; empty if they can't.

    A batch of tokens must give each of them what it gets alone. Elsewhere the difference is small, but it can decide
    between two tokens of nearly equal probability.
    """
    if not trunk.can_truncate:
        return "the model has recurrent layers, which can't take tokens back"
    if isinstance(trunk, GenericTrunk):
        return "transformers' own model rounds several tokens differently from one"
    if not trunk.batch_invariant:
        if config.device == "cpu" and config.dtype == "fp32":
            return f"products in {config.trunk_quantisation} round several tokens differently from one here"
        return f"the trunk runs on {config.device} in {config.dtype}, not on cpu in fp32"
    if manifest.quantisation.scheme == "int8-dynamic":
        return "experts are int8-dynamic"
    return ""


def _speculation(
    config: BaseStationConfig, manifest: Manifest, tokenizer: Tokenizer, trunk: Trunk, policy: Policy
) -> Speculation:  # fmt: skip
    why_not = _why_no_drafts(config, trunk, manifest)
    if not why_not and not isinstance(policy, TopK):
        # Such policies choose by what else is in a batch.
        why_not = f"the policy {config.policy} looks at links and loads"
    if config.draft == "auto" and why_not:
        log.info("no drafts, which could change answers: %s", why_not)
        return Speculation()
    model = None
    if config.draft in ("dense", "auto"):
        model = load_draft_model(
            config.bundle, manifest, tokenizer.ids, folder=config.draft_model, device=config.device
        )  # fmt: skip
    if config.draft == "dense" and model is None:
        raise BundleError(
            "--draft dense: the bundle has no draft model: make one with 'wdmoe-export draft BUNDLE', or name one "
            "with --draft-model"
        )
    return Speculation(config.draft, model)
