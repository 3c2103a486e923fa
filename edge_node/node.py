"""A node built from its configuration: bundle, device and experts, proven before the node announces itself."""

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

from common import real_time
from common.config import ConfigError
from common.cpu_idle import cpu_idle_disabled
from edge_node import devices
from edge_node.agent import NodeAgent
from edge_node.config import HoldingConfig, NodeConfig
from edge_node.devices import DetectedDevice
from edge_node.experts.memory import check_memory, fitting, largest, needed_bytes, room_bytes
from edge_node.experts.providers import ChosenProvider, first_that_proves
from edge_node.experts.runtime import ExpertRuntime
from edge_node.failure import failure_published
from edge_node.limits import DeviceLimits
from edge_node.node_status import StatusSource, residency_status
from edge_node.tuning.tune import Variants
from edge_node.worker import Worker
from wire.broker_address import BrokerAddress
from wire.broker_url import parse_broker_url
from wire.device_profiles import Provider
from wire.experts import UnitId, format_selector, parse_selector
from wire.frame_auth import read_node_key
from wire.manifest import Manifest
from wire.signature import load_trusted_manifest
from wire.status import DeviceFacts, Holding
from wire.topics import Topics

log = logging.getLogger("wdmoe-node")

_COUNTED = {"answered": "requests answered", "pings": "pings answered"}


@dataclass(frozen=True, slots=True)
class Node:
    """A node that has proven its experts and is not connected yet.

    Attributes:
        real_time: whether the thread that runs it gets real-time priority.
    """

    config: NodeConfig
    address: BrokerAddress
    worker: Worker
    agent: NodeAgent
    selector: str
    real_time: bool

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set.

        Raises:
            BrokerError: the broker can't be reached at the first try, or refuses this node.
            DuplicateNodeError: another live process has this node's id.
        """
        name = self.config.node
        with (
            cpu_idle_disabled() if self.config.stay_awake else nullcontext(),
            real_time.raised() if self.real_time else nullcontext(),
        ):
            self.agent.run(stop, on_ready=lambda: log.info("'%s' serves %s at %s", name, self.selector, self.address))
        counts = ", ".join(f"{_COUNTED.get(what, what)} {n}" for what, n in self.worker.counts.items())
        log.info("'%s' stopped; %s", name, counts or "no work came")


def choose_variant(config: NodeConfig) -> NodeConfig:
    """The config with the one bundle and the threads that `config.tuned` says, measured first where it must be.

    Raises:
        ConfigError: the experts make no sense, or there are several bundles and no file to keep the choice in.
        TuningError: no bundle can be used, or the file is something else.
        BundleError: a bundle is damaged, or lacks an expert.
    """
    if config.tuned is None:
        if len(config.bundles) > 1:
            raise ConfigError("--bundle: several bundles are variants to choose from: add --tuned FILE for the choice")
        return config
    bundle, tuning = variants_of(config, (config.threads,) if config.threads else ()).chosen(config.tuned)
    log.info("serving from %s: %s", bundle, tuning.why)
    return replace(config, bundles=(bundle,), threads=tuning.threads)


def variants_of(config: HoldingConfig, threads: tuple[int, ...]) -> Variants:
    """The bundles of a config, to choose from.

    Args:
        threads: numbers to try; chosen by the device if empty.

    Raises:
        ConfigError: the experts make no sense.
        TuningError: the bundles are not variants of one model.
        BundleError: a bundle is damaged, or lacks an expert.
    """
    device = _device(config)
    try:
        return Variants(
            config.bundles,
            config.experts,
            key=config.bundle_key,
            budget=config.memory_budget_bytes,
            all_resident=config.residency == "all",
            most_threads=devices.threads_for(device),
            threads=threads,
            providers=_providers(config, device),
        )
    except ValueError as error:
        raise ConfigError(f"--experts: {error}") from None


def build_node(config: NodeConfig) -> Node:
    """Load and prove the experts of a node.

    Args:
        config: with one bundle (`choose_variant`).

    Raises:
        ConfigError: the experts, or the broker's URL, make no sense.
        BundleError, SignatureError: the bundle is damaged, or not signed with `config.bundle_key`.
        KeyFileError, BrokerAuthError, PlaintextError: a key or password can't be read, or TLS is missing.
        MemoryBudgetError: the experts need more RAM than there is.
        ProbeError: an expert does not compute what it did where it was exported.
    """
    address, topics = _address(config), Topics(config.cluster)
    node_key = read_node_key(config.frame_key, config.cluster, config.node) if config.frame_key else None
    device = _device(config)
    (bundle,) = config.bundles
    with failure_published(address, topics, config.node):
        manifest = load_trusted_manifest(bundle, config.bundle_key)
    held = _held(config, manifest)
    threads = config.threads or devices.threads_for(device)
    log.info("profile %s (%s), %d threads", device.name, device.because, threads)
    if config.tuned is None and (better := devices.advice(device, manifest.quantisation.scheme)):
        log.warning("%s", better)
    with failure_published(address, topics, config.node):
        runtime, chosen = _load(config, manifest, held, threads, _providers(config, device))
    worker = Worker(runtime, node_key=node_key)
    raises = _raises_priority(config)
    about = StatusSource(
        config.node,
        worker,
        Holding(
            experts=held.selector,
            model_sha256=manifest.model_sha256,
            dims=manifest.dims,
            quantisation=str(manifest.quantisation),
            resident_bytes=held.resident_bytes,
        ),
        threads=threads,
        device=DeviceFacts(
            profile=device.name,
            because=device.because,
            provider=chosen.provider,
            provider_reason=chosen.reason,
            batch_invariant=runtime.same_in_batch,
            real_time=raises,
        ),
        residency=lambda: residency_status(runtime),
        folder=bundle,
    )
    agent = NodeAgent(
        about=about,
        topics=topics,
        address=address,
        worker=worker,
        limits=DeviceLimits(max_celsius=config.max_celsius, min_available_bytes=config.min_free_bytes),
        telemetry=config.telemetry,
        home_assistant=config.home_assistant,
    )
    return Node(config, address, worker, agent, held.selector, raises)


def _raises_priority(config: NodeConfig) -> bool:
    if config.priority == "normal":
        return False
    if refusal := real_time.why_not():
        log.info("no real-time priority: %s", refusal)
    return not refusal


class _Held(NamedTuple):
    """The experts, or slices of experts, that a node holds.

    Attributes:
        slices: into which the bundle cuts each expert.
        most_loaded: how many of them are in memory at once.
        resident_bytes: RAM that these need at most.
    """

    ids: tuple[UnitId, ...]
    slices: int
    most_loaded: int
    resident_bytes: int

    @property
    def selector(self) -> str:
        return format_selector(self.ids, self.slices)


def _held(config: NodeConfig, manifest: Manifest) -> _Held:
    dims = manifest.dims
    try:
        ids = parse_selector(config.experts, layers=dims.layers, experts=dims.experts, slices=dims.slices)
    except ValueError as error:
        raise ConfigError(f"--experts: {error}") from None
    entries, scheme = manifest.entries(ids), manifest.quantisation.scheme
    most_loaded = len(entries)
    if config.residency == "lru":
        most_loaded = max(1, fitting(entries, scheme, room_bytes(config.memory_budget_bytes)))
    return _Held(ids, dims.slices, most_loaded, needed_bytes(largest(entries, most_loaded), scheme))


def _load(
    config: NodeConfig, manifest: Manifest, held: _Held, threads: int, providers: Sequence[Provider]
) -> tuple[ExpertRuntime, ChosenProvider]:
    """The experts, proven, with the first provider that proves itself."""
    (bundle,) = config.bundles
    began_s = time.monotonic()
    check_memory(held.resident_bytes, budget=config.memory_budget_bytes)
    runtime, chosen = first_that_proves(
        providers,
        lambda provider: ExpertRuntime(
            bundle, manifest, held.ids, threads=threads, prepacked=config.prepacked, provider=provider,
            most_loaded=held.most_loaded if held.most_loaded < len(held.ids) else None,
        ),
    )  # fmt: skip
    log.info(
        "proved %d %s (%s) with %s in %.1f s",
        len(held.ids), "experts" if held.slices == 1 else "slices", manifest.quantisation, chosen.provider,
        time.monotonic() - began_s,
    )  # fmt: skip
    if runtime.most_loaded is not None:
        log.info("%d of them fit into memory at once: the others are loaded when they are asked for", held.most_loaded)
    return runtime, chosen


def _address(config: NodeConfig) -> BrokerAddress:
    try:
        return parse_broker_url(config.broker, config.access)
    except ValueError as error:
        raise ConfigError(f"--broker: {error}") from None


def _device(config: HoldingConfig) -> DetectedDevice:
    return devices.detect() if config.profile == "auto" else devices.named(config.profile)


def _providers(config: HoldingConfig, device: DetectedDevice) -> tuple[Provider, ...]:
    return device.profile.providers if config.provider == "auto" else (config.provider,)
