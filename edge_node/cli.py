"""`wdmoe-node`: serve experts of a bundle. `serve` is the command when none is named."""

import logging
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import click

from common.console import run as run_console
from common.cpu_idle import cpu_idle_disabled
from common.sizes import parse_bytes
from edge_node.tuning.command import tune
from wire import __version__
from wire.broker_url import Access, parse_broker_url
from wire.device_profiles import PROFILES, DeviceName, Provider
from wire.experts import format_selector, parse_selector
from wire.frame_auth import read_node_authenticator
from wire.topics import Topics, check_name

log = logging.getLogger("wdmoe-node")


class _ServeByDefault(click.Group):
    """A group whose first argument may be an option of `serve`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        unnamed = not args or (args[0].startswith("-") and args[0] not in ("--help", "--version"))
        return super().parse_args(ctx, ["serve", *args] if unnamed else args)


@click.group(cls=_ServeByDefault)
@click.version_option(__version__)
def cli() -> None:
    """An edge node: experts in onnxruntime, answered over MQTT. Without COMMAND: serve."""


@cli.command()
@click.option(
    "--bundle", "bundles", type=click.Path(path_type=Path), required=True, multiple=True,
    help="Folder made by wdmoe-export. Repeatable: the same experts in other quantisations, see --tuned.",
)  # fmt: skip
@click.option(
    "--tuned", type=click.Path(path_type=Path),
    help="Choose bundle and threads by what this file says; measure them and write it if it says nothing that holds.",
)  # fmt: skip
@click.option("--broker", required=True, help="mqtt://[user@]host[:port] or mqtts://…")
@click.option("--id", "node", required=True, help="Name of this node, unique in its cluster.")
@click.option("--experts", "selector", required=True, help="For example 'L*:E3' or 'L0-14:E0,2 L15:E*'.")
@click.option("--cluster", default="default", show_default=True, help="Keeps clusters on one broker apart.")
@click.option(
    "--profile", type=click.Choice(["auto", *PROFILES]), default="auto", show_default=True,
    help="What this device is: decides threads and provider.",
)  # fmt: skip
@click.option(
    "--provider", type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]), default="auto", show_default=True,
    help="What to compute with; a GPU that does not prove itself is left for the CPU.  [auto: the profile's]",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 256), help="Cores to compute with.  [default: the profile's]")
@click.option("--memory-budget", help="Refuse to take more RAM than this, e.g. 800M or 2G.")
@click.option(
    "--residency", type=click.Choice(["all", "lru"]), default="all", show_default=True,
    help="Keep all experts in memory, or as many as fit and load others when they are asked for.",
)  # fmt: skip
@click.option("--max-temperature", type=click.FloatRange(0), help="Take no work above, in °C.  [default: no limit]")
@click.option("--min-free-memory", default="64M", show_default=True, help="Take no work with less RAM available.")
@click.option("--prepacked", type=click.Path(path_type=Path), help="Keep prepacked experts here: disk for RAM.")
@click.option("--telemetry/--no-telemetry", default=True, help="Tell every second of radio, heat and power.")
@click.option("--stay-awake", is_flag=True, help="Keep this device's cores from sleeping: faster, takes power.")
@click.option("--password-file", type=click.Path(path_type=Path), help="Broker password, file of mode 600.")
@click.option("--ca-file", type=click.Path(path_type=Path, exists=True), help="CA to trust for mqtts://.")
@click.option("--tls-cert", type=click.Path(path_type=Path, exists=True), help="Our certificate for mqtts://.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its key, mode 600.")
@click.option("--allow-plaintext", is_flag=True, help="Go without TLS beyond loopback.")
@click.option("--frame-key", type=click.Path(path_type=Path), help="This node's frame key, mode 600.")
@click.option("--bundle-key", type=click.Path(path_type=Path), help="Take only bundles signed by this public key.")
def serve(
    bundles: tuple[Path, ...],
    tuned: Path | None,
    broker: str,
    node: str,
    selector: str,
    cluster: str,
    profile: Literal["auto"] | DeviceName,
    provider: Literal["auto"] | Provider,
    threads: int | None,
    memory_budget: str | None,
    residency: Literal["all", "lru"],
    max_temperature: float | None,
    min_free_memory: str,
    prepacked: Path | None,
    telemetry: bool,
    stay_awake: bool,
    password_file: Path | None,
    ca_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    allow_plaintext: bool,
    frame_key: Path | None,
    bundle_key: Path | None,
) -> None:
    """Serve experts of a bundle to the base station over MQTT."""
    try:
        topics = Topics(check_name("cluster", cluster))
        check_name("node id", node)
        budget = parse_bytes(memory_budget) if memory_budget else None
        free_bytes = parse_bytes(min_free_memory)
        address = parse_broker_url(
            broker, Access(password_file, ca_file, tls_cert, tls_key, allow_plaintext=allow_plaintext)
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None

    authenticator = read_node_authenticator(frame_key, cluster, node) if frame_key else None

    from edge_node import devices

    device = devices.detect() if profile == "auto" else devices.named(profile)
    providers = device.profile.providers if provider == "auto" else (provider,)
    if tuned is not None:
        from edge_node.tuning.tune import Variants

        try:
            variants = Variants(
                bundles, selector, key=bundle_key, budget=budget, all_resident=residency == "all",
                most_threads=devices.threads_for(device), threads=[threads] if threads else [], providers=providers,
            )  # fmt: skip
        except ValueError as error:
            raise click.UsageError(f"--experts: {error}") from None
        bundle, tuning = variants.chosen(tuned)
        threads = tuning.threads
        log.info("serving from %s: %s", bundle, tuning.why)
    elif len(bundles) > 1:
        raise click.UsageError(
            "several --bundle are variants to choose from: say where the choice is kept, --tuned FILE"
        )
    else:
        (bundle,) = bundles

    stop = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        # `set` takes a lock that the interrupted `wait`, or the handler of a signal just before, may hold.
        # Signals do come in bursts: a dying parent's threads each send one.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=stop.set, daemon=True).start()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    from edge_node.agent import NodeAgent, residency_status
    from edge_node.experts.memory import check_memory, fitting, largest, needed_bytes, room_bytes
    from edge_node.experts.providers import first_that_proves
    from edge_node.experts.runtime import ExpertRuntime
    from edge_node.failure import failure_told
    from edge_node.limits import Limits
    from edge_node.worker import Worker
    from wire.signature import load_trusted_manifest
    from wire.status import DeviceFacts, Holding

    with failure_told(address, topics, node):
        manifest = load_trusted_manifest(bundle, bundle_key)
    dims = manifest.dims
    try:
        ids = parse_selector(selector, layers=dims.layers, experts=dims.experts)
    except ValueError as error:
        raise click.UsageError(f"--experts: {error}") from None
    entries, scheme = manifest.entries(ids), manifest.quantisation.scheme
    most_loaded = max(1, fitting(entries, scheme, room_bytes(budget))) if residency == "lru" else len(entries)
    needed = needed_bytes(largest(entries, most_loaded), scheme)
    threads = threads or devices.threads_for(device)
    log.info("profile %s (%s), %d threads", device.name, device.because, threads)
    if tuned is None and (better := devices.advice(device, scheme)):
        log.warning("%s", better)
    began = time.monotonic()
    with failure_told(address, topics, node):
        check_memory(needed, budget=budget)
        runtime, chosen = first_that_proves(
            providers,
            lambda computes: ExpertRuntime(
                bundle, manifest, ids, threads=threads, prepacked=prepacked, provider=computes,
                most_loaded=most_loaded if most_loaded < len(ids) else None,
            ),
        )  # fmt: skip
    seconds = time.monotonic() - began
    log.info("proved %d experts (%s) with %s in %.1f s", len(ids), manifest.quantisation, chosen.provider, seconds)
    if runtime.most_loaded is not None:
        log.info("there is room for %d of them at once: others are loaded when they are asked for", most_loaded)
    worker = Worker(runtime, authenticator=authenticator)
    agent = NodeAgent(
        node=node,
        topics=topics,
        address=address,
        worker=worker,
        threads=threads,
        telemetry=telemetry,
        device=DeviceFacts(
            profile=device.name,
            because=device.because,
            provider=chosen.provider,
            provider_reason=chosen.reason,
            batch_invariant=runtime.same_in_batch,
        ),
        folder=bundle,
        limits=Limits(max_celsius=max_temperature, min_available_bytes=free_bytes),
        holding=Holding(
            experts=format_selector(ids),
            model_sha256=manifest.model_sha256,
            dims=dims,
            quantisation=str(manifest.quantisation),
            resident_bytes=needed,
        ),
        residency=lambda: residency_status(runtime),
    )
    with cpu_idle_disabled() if stay_awake else nullcontext():
        agent.run(stop, on_ready=lambda: log.info("'%s' serves %s at %s", node, format_selector(ids), address))
    log.info("'%s' stopped; %s", node, ", ".join(f"{k} {n}" for k, n in worker.counts.items()) or "no work came")


cli.add_command(tune)


def main() -> None:
    """Console entry."""
    run_console(cli, "wdmoe-node")
