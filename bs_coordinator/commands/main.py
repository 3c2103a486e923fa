"""`wdmoe-bs`: generate text, chat, list nodes, run a broker."""

import functools
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bs_coordinator.commands.place import place
from bs_coordinator.commands.shape import shape
from bs_coordinator.engine.speculation import DRAFT_MODES
from bs_coordinator.errors import PlacementError
from common.console import run as run_console
from common.sizes import parse_bytes
from wire import __version__
from wire.broker_url import Access
from wire.topics import Topics, check_name

if TYPE_CHECKING:
    from rich.table import Table

    from bs_coordinator.base_station import BaseStation
    from bs_coordinator.dispatch.dispatcher import Dispatcher
    from bs_coordinator.engine.sampling import SamplingConfig
    from bs_coordinator.engine.sequence import Sequence, TokenEvent
    from bs_coordinator.links import LinkSample, NodeEstimate

log = logging.getLogger("wdmoe-bs")

_BROKER_HELP = "embedded, mosquitto (both private, loopback only), or mqtt://[user@]host[:port], mqtts://…"

_TELEMETRY_S = 1.2
"""Within which every node tells of itself once."""
_COMPACT: dict[str, Any] = {"pad_edge": False, "show_edge": False, "padding": 0}
"""Tables have to fit into a terminal's usual width with their figures whole."""
_NARROWEST = 80
_UNLIMITED = 10_000


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _access(command: Callable[..., None]) -> Callable[..., None]:
    """Hands what belongs to the connection on as one `access`."""

    @functools.wraps(command)
    def run(
        *, password_file: Path | None, ca_file: Path | None, tls_cert: Path | None, tls_key: Path | None,
        allow_plaintext: bool, **others: Any,
    ) -> None:  # fmt: skip
        access = Access(password_file, ca_file, tls_cert, tls_key, allow_plaintext=allow_plaintext)
        command(access=access, **others)

    return run


_network_options = _options(
    click.option("--bundle", type=click.Path(path_type=Path), required=True, help="From wdmoe-export."),
    click.option("--broker", default="embedded", show_default=True, help=_BROKER_HELP),
    click.option("--broker-port", type=click.IntRange(0, 65535), default=0, help="Of a private broker."),
    click.option("--cluster", default="default", show_default=True, help="As given to the nodes."),
    click.option("--password-file", type=click.Path(path_type=Path), help="Broker password, mode 600."),
    click.option("--ca-file", type=click.Path(path_type=Path, exists=True), help="CA to trust for mqtts://."),
    click.option("--tls-cert", type=click.Path(path_type=Path, exists=True), help="Our certificate for mqtts://."),
    click.option("--tls-key", type=click.Path(path_type=Path), help="Its key, mode 600."),
    click.option("--allow-plaintext", is_flag=True, help="Go without TLS beyond loopback."),
    click.option("--cluster-key", type=click.Path(path_type=Path), help="Authenticate frames with this, mode 600."),
    click.option("--bundle-key", type=click.Path(path_type=Path), help="Take only bundles signed by this public key."),
    _access,
)
_model_options = _options(
    click.option("--device", default="cpu", show_default=True, help="Of the trunk: cpu, cuda, cuda:1."),
    click.option(
        "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True,
        help="Of the trunk.",
    ),
    click.option(
        "--wire", type=click.Choice(["fp16", "int8", "fp32"]), default="fp16", show_default=True,
        help="How hidden states travel.",
    ),
    click.option(
        "--policy", default="topk", show_default=True,
        help="How experts are chosen: name or name:option=value,… (docs/policies.md).",
    ),
    click.option(
        "--nodes-timeout", type=click.FloatRange(0.0), default=60.0, show_default=True,
        help="Seconds to wait for the nodes.",
    ),
    click.option(
        "--layer-timeout", type=click.FloatRange(0.1), default=30.0, show_default=True,
        help="Seconds that one layer may wait for its nodes.",
    ),
    click.option(
        "--degrade/--no-degrade", default=True, show_default=True,
        help="Go on with the next best experts where no node can be had for one; the answer is marked.",
    ),
    click.option("--shared-air", is_flag=True, help="All nodes are on one Wi-Fi channel: air times add up."),
    click.option("--link-log", type=click.Path(path_type=Path), help="Append link samples here ('replay' reads them)."),
    click.option("--resident", metavar="SIZE", help="RAM for experts that are kept here, e.g. 2G.  [default: none]"),
    click.option(
        "--resident-from", type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="latency.csv of a run: which experts to keep at the first start. Later ones know.",
    ),
    click.option("--prepacked", type=click.Path(path_type=Path), help="Keep prepacked --resident experts here."),
    click.option(
        "--draft", type=click.Choice(DRAFT_MODES), default="auto", show_default=True,
        help="DraftToken tokens and check several at once: never, by look-up, with a draft model, or as it pays.",
    ),
    click.option("--draft-model", type=click.Path(path_type=Path), help="Folder.  [default: the bundle's own]"),
    click.option("--stay-awake", is_flag=True, help="Keep this machine's cores from sleeping: faster, takes power."),
    click.option("--stats/--no-stats", default=True, help="Numbers under each answer (on stderr)."),
)  # fmt: skip
_sampling_options = _options(
    click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True),
    click.option(
        "--temperature", type=click.FloatRange(0.0, 10.0), default=0.0, show_default=True,
        help="0 always takes the most probable token.",
    ),
    click.option("--top-p", type=click.FloatRange(0.0, 1.0, min_open=True), default=1.0, show_default=True),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
)  # fmt: skip


@click.group()
@click.version_option(__version__)
def cli() -> None:
    """The base station: runs a Mixtral's trunk and asks edge nodes for its experts."""
    signal.signal(signal.SIGTERM, _interrupt)


@cli.command()
@_network_options
@_model_options
@_sampling_options
@click.option("--prompt", required=True, help="Or '-' to read it from stdin.")
@click.option("--system", help="System prompt of a chat model.")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without the chat template.")
@click.option(
    "--session",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep the answer in this file; the same command after a crash goes on where it ended.",
)
def generate(
    prompt: str, system: str | None, raw: bool, session: Path | None, max_tokens: int, temperature: float,
    top_p: float, seed: int, stats: bool, **options: Any,
) -> None:  # fmt: skip
    """Answer one prompt; the text streams to stdout."""
    prompt = _unicode("--prompt", sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt))
    system = _unicode("--system", os.fsencode(system)) if system else None
    if not prompt.strip():
        raise click.UsageError("--prompt is empty")
    with _station(**options) as station:
        tokenizer = station.tokenizer
        if raw or not tokenizer.has_chat_template:
            ids = tokenizer.encode(prompt)
        else:
            ids = tokenizer.encode_chat([*_system(system), {"role": "user", "content": prompt}])
        config = _sampling(max_tokens, temperature, top_p, seed)
        if session is None:
            _answer(station, station.new_sequence(), ids, config, stats)
        else:
            _answer_in_session(station, session, ids, config, stats)


@cli.command()
@_network_options
@_model_options
@_sampling_options
@click.option("--system", help="System prompt.")
def chat(
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stats: bool,
    **options: Any,
) -> None:
    """Talk with the model; an empty line or Ctrl-D ends."""
    system = _unicode("--system", os.fsencode(system)) if system else None
    with _station(**options) as station:
        if not station.tokenizer.has_chat_template:
            raise click.UsageError("this model has no chat template: use 'wdmoe-bs generate --raw'")
        sequence, messages = station.new_sequence(), _system(system)
        config = _sampling(max_tokens, temperature, top_p, seed)
        while typed := _read_line("> ", while_waiting=lambda: station.dispatcher.pump(0.1)):
            line = _unicode("this line", typed)
            messages.append({"role": "user", "content": line})
            ids = station.tokenizer.encode_chat(messages)
            text = _answer(station, sequence, ids, config, stats)
            messages.append({"role": "assistant", "content": text})


@cli.command()
@_network_options
@_model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True)
@click.option("--max-live", type=click.IntRange(1, 256), default=8, show_default=True, help="Answers made at once.")
@click.option("--max-waiting", type=click.IntRange(0), default=16, show_default=True, help="More are told to retry.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="Callers must know this key; mode 600.")
def serve(
    host: str, port: int, max_live: int, max_waiting: int, api_key_file: Path | None, stats: bool, **options: Any
) -> None:  # fmt: skip
    """Answer HTTP requests as OpenAI's clients send them."""
    from bs_coordinator.commands.serve import read_api_key, serve_station

    api_key = read_api_key(api_key_file, host=host)
    with _station(**options) as station:
        serve_station(
            station, host=host, port=port, max_live=max_live, max_waiting=max_waiting, api_key=api_key,
            layer_timeout_s=options["layer_timeout"],
        )  # fmt: skip


@cli.command()
@_network_options
def nodes(
    bundle: Path,
    broker: str,
    broker_port: int,
    cluster: str,
    **trust: Any,
) -> None:
    """List the nodes that are online and the experts that nobody holds."""
    from rich.table import Table

    from bs_coordinator.nodes.telemetry_inbox import describe

    with _fleet(bundle, broker, broker_port, cluster, **trust) as dispatcher:
        fleet = dispatcher.fleet
        if fleet.nodes:
            dispatcher.pump(_TELEMETRY_S)
        told = dispatcher.telemetry.latest()
    table = Table(**_COMPACT)
    for column in ("node", "host", "experts", "quantisation", "experts'\nRAM", "free\nRAM", "device", "now"):
        figures = column.endswith("RAM")
        table.add_column(
            column, justify="right" if figures else "left", no_wrap=figures or column == "quantisation", overflow="fold"
        )
    for name, status in sorted(fleet.nodes.items()):
        holding, machine = status.holding, status.machine
        if holding and machine:
            ram = f"{holding.resident_bytes / 2**20:.0f} MiB", f"{machine.available_bytes / 2**20:.0f} MiB"
            device = f"{status.device.profile}, {status.device.provider}" if status.device else ""
            now = describe(told[name].telemetry) if name in told else ""
            table.add_row(name, machine.host, holding.experts, holding.quantisation, *ram, device, now)
    _print_table(table)
    for name, why in sorted(fleet.ignored.items()):
        click.echo(f"ignored {name}: {why}")
    if fleet.missing():
        click.echo(fleet.describe_missing())


@cli.command()
@_network_options
@click.option("--seconds", type=click.FloatRange(0.5, 3600), default=5.0, show_default=True, help="Of probing.")
@click.option("--link-log", type=click.Path(path_type=Path), help="Append link samples here ('replay' reads them).")
def links(
    bundle: Path, broker: str, broker_port: int, cluster: str, seconds: float, link_log: Path | None, **trust: Any
) -> None:  # fmt: skip
    """Probe the idle links of all nodes and say what they can do."""
    from bs_coordinator.links.log import link_log as open_log
    from bs_coordinator.links.log import no_log

    with ExitStack() as stack:
        log = stack.enter_context(open_log(link_log)) if link_log else no_log
        dispatcher = stack.enter_context(_fleet(bundle, broker, broker_port, cluster, link_log=log, **trust))
        if not dispatcher.fleet.nodes:
            raise PlacementError("no node is online")
        dispatcher.measure_links(seconds)
        _print_links(dispatcher.links.estimates(time.perf_counter()))


@cli.command()
@click.argument("log_path", metavar="LOG", type=click.Path(path_type=Path))
@click.option("--shared-air", is_flag=True, help="As it was recorded.")
def replay(log_path: Path, shared_air: bool) -> None:
    """Estimate links again from the samples of a --link-log, and say how well each next one was foretold."""
    from bs_coordinator.links.log import read_link_log
    from bs_coordinator.links.replay import replay as replay_samples

    replayed = replay_samples(read_link_log(log_path), shared_air=shared_air)
    _print_links([node.estimate for node in replayed])
    for node in replayed:
        click.echo(
            f"{node.estimate.node}: {node.samples} samples; link's part of each next request off by "
            f"{100 * node.error:.1f} % (median), {100 * node.error_p90:.1f} % (90th percentile)"
        )


@cli.command()
@click.option("--kind", type=click.Choice(["embedded", "mosquitto"]), default="embedded", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=1883, show_default=True)
def broker(kind: str, port: int) -> None:
    """Run a private broker on loopback until Ctrl-C, for trying things out on one machine."""
    from bs_coordinator.broker.processes import open_broker

    with open_broker(kind, port=port) as address:
        click.echo(f"{kind} broker at {address}; Ctrl-C ends it")
        threading.Event().wait()


cli.add_command(place)
cli.add_command(shape)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _topics(cluster: str) -> Topics:
    try:
        return Topics(check_name("cluster", cluster))
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _system(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _sampling(max_tokens: int, temperature: float, top_p: float, seed: int) -> "SamplingConfig":
    from bs_coordinator.engine.sampling import SamplingConfig

    return SamplingConfig(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)


@contextmanager
def _broker(spec: str, port: int, access: Access) -> Iterator[Any]:
    from bs_coordinator.broker.processes import PRIVATE_BROKERS, open_broker

    with ExitStack() as stack:
        try:
            address = stack.enter_context(open_broker(spec, port=port, access=access))
        except ValueError as error:
            raise click.UsageError(f"--broker: {error}") from None
        if spec in PRIVATE_BROKERS:
            log.info("broker at %s: start nodes with --broker %s", address, address)
        yield address


@contextmanager
def _fleet(
    bundle: Path, broker: str, broker_port: int, cluster: str,
    *, access: Access, cluster_key: Path | None, bundle_key: Path | None,
    link_log: "Callable[[LinkSample], None] | None" = None,
) -> Iterator["Dispatcher"]:  # fmt: skip
    """Whoever is online, without a model."""
    from bs_coordinator.dispatch.dispatcher import Dispatcher
    from bs_coordinator.links import LinkMonitor
    from bs_coordinator.links.log import no_log
    from bs_coordinator.nodes.registry import NodeRegistry
    from wire.frame_auth import read_cluster_key
    from wire.mqtt import MqttTransport
    from wire.signature import load_trusted_manifest
    from wire.tensors import WireDtype

    manifest = load_trusted_manifest(bundle, bundle_key)
    key = read_cluster_key(cluster_key, cluster) if cluster_key else None
    with (
        _broker(broker, broker_port, access) as address,
        closing(MqttTransport(address, f"wdmoe-bs-look-{time.time_ns():x}")) as transport,
    ):
        fleet = NodeRegistry(manifest.dims, manifest.model_sha256)
        links = LinkMonitor(log=link_log or no_log)
        dispatcher = Dispatcher(
            transport, _topics(cluster), fleet, dtype=WireDtype.FP16, timeout_s=5.0, links=links, cluster_key=key
        )
        dispatcher.pump(1.0)
        yield dispatcher


def _print_table(table: "Table") -> None:
    """Text folds at a terminal's edge, which wraps lines itself if it is narrower than tables are made for; what is
    piped has lines as long as they need be."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, _NARROWEST) if console.is_terminal else _UNLIMITED
    console.print(table)


def _print_links(estimates: "list[NodeEstimate]") -> None:
    from rich.table import Table

    table = Table(title="links: estimate ± one standard deviation", **_COMPACT)
    for column in (
        "node", "RTT\nms", "down\nMbit/s", "up\nMbit/s", "jitter\nms", "samples", "ms per\nrequest", "ms per\nexpert",
    ):  # fmt: skip
        text = column == "node"
        table.add_column(column, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for node in estimates:
        link = node.link
        known = node.requests > 0
        table.add_row(
            node.node + (" (stale)" if node.stale else ""),
            f"{1e3 * link.rtt_s:.2f}±{1e3 * link.rtt_std_s:.2f}",
            _rate(link.down_mbps, link.down_std_mbps),
            _rate(link.up_mbps, link.up_std_mbps),
            f"{1e3 * link.noise_s:.2f}",
            str(link.samples),
            f"{1e3 * node.fixed_s:.2f}" if known else "–",
            f"{1e3 * (node.expert_s + node.row_s):.2f}" if known else "–",
        )
    _print_table(table)


def _rate(mbps: float, std_mbps: float) -> str:
    if std_mbps < 0.5 * mbps:
        return f"{mbps:.1f}±{std_mbps:.1f}"
    # So fast that our messages take no time that could be told from the round trip.
    return f"> {mbps / (1 + 2 * std_mbps / mbps):.0f}"


@contextmanager
def _station(
    *, bundle: Path, broker: str, broker_port: int, cluster: str, access: Access,
    cluster_key: Path | None, bundle_key: Path | None, device: str, dtype: Any, wire: str, policy: str,
    nodes_timeout: float, layer_timeout: float, degrade: bool, shared_air: bool, link_log: Path | None,
    resident: str | None, resident_from: Path | None, prepacked: Path | None,
    draft: Any, draft_model: Path | None, stay_awake: bool,
) -> Iterator["BaseStation"]:  # fmt: skip
    import platformdirs

    from bs_coordinator.base_station import BaseStationConfig, ResidentConfig, open_base_station
    from bs_coordinator.selection import parse_policy
    from wire.signature import load_trusted_manifest
    from wire.tensors import WireDtype

    # Reports a wrong folder or policy before a broker is started.
    manifest = load_trusted_manifest(bundle, bundle_key)
    try:
        parse_policy(policy, top_k=manifest.dims.top_k)
    except ValueError as error:
        raise click.UsageError(f"--policy: {error}") from None
    try:
        budget_bytes = parse_bytes(resident) if resident else 0
    except ValueError as error:
        raise click.UsageError(f"--resident: {error}") from None
    traffic = platformdirs.user_state_path("wdmoe") / "traffic" / f"{manifest.model_sha256[:16]}.json"
    config = BaseStationConfig(
        bundle=bundle,
        cluster=_topics(cluster).cluster,
        device=device,
        dtype=dtype,
        wire=WireDtype.named(wire),
        policy=policy,
        nodes_timeout_s=nodes_timeout,
        layer_timeout_s=layer_timeout,
        degrade=degrade,
        shared_air=shared_air,
        link_log=link_log,
        cluster_key=cluster_key,
        resident=ResidentConfig(budget_bytes, traffic, resident_from, prepacked) if budget_bytes else None,
        draft=draft,
        draft_model=draft_model,
        stay_awake=stay_awake,
    )
    with (
        _broker(broker, broker_port, access) as address,
        open_base_station(config, address, say=lambda line: log.info("waiting: %s", line)) as station,
    ):
        slowest = max(station.nodes_ms.values(), default=0.0)
        log.info(
            "%d nodes ready; broker round trip %.2f ms, slowest node %.1f ms",
            len(station.nodes_ms), station.broker_ms, slowest,
        )  # fmt: skip
        yield station
        if station.dispatcher.dropped:
            counts = ", ".join(f"{why} {n}" for why, n in sorted(station.dispatcher.dropped.items()))
            log.warning("dropped messages that were no awaited answers: %s", counts)


def _answer(
    station: "BaseStation", sequence: "Sequence", ids: list[int], config: "SamplingConfig", show_stats: bool,
    *, keep: "Callable[[TokenEvent], str]" = lambda event: event.text,
) -> str:  # fmt: skip
    from bs_coordinator.engine.answer_stats import one_line, summarise

    events: list[TokenEvent] = []
    try:
        for event in sequence.generate(ids, config):
            events.append(event)
            click.echo(keep(event), nl=False)
            sys.stdout.flush()
    finally:
        click.echo()
        if events and show_stats:
            click.echo(one_line(summarise(events)), err=True)
        degraded = sum(any(step.degraded for step in event.steps) for event in events)
        if degraded:
            log.warning("degraded: %d of %d tokens had to do without an expert", degraded, len(events))
    return "".join(event.text for event in events)


def _answer_in_session(
    station: "BaseStation", path: Path, prompt: list[int], config: "SamplingConfig", show_stats: bool
) -> None:
    """The whole answer goes to stdout, what a process before this one made included."""
    from bs_coordinator.engine.session_file import Asked, session_file

    manifest = station.manifest
    quantisation = str(manifest.quantisation)
    asked = Asked.of(prompt, config, model_sha256=manifest.model_sha256, quantisation=quantisation)
    with session_file(path, asked) as session:
        stream = station.tokenizer.stream()
        click.echo("".join(stream.push(id) for id in session.ids), nl=session.finished)
        if session.finished:
            return

        def keep(event: "TokenEvent") -> str:
            session.add(event.id, last=event.stop is not None)
            # Not the event's own text: the decoder must know what came before.
            return "" if event.stop == "eos" else stream.push(event.id)

        left = replace(config, max_tokens=config.max_tokens - len(session.ids), skip=len(session.ids))
        _answer(station, station.new_sequence(), prompt + session.ids, left, show_stats, keep=keep)


def _unicode(what: str, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{what} is not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}") from None


def _read_line(prompt: str, *, while_waiting: Callable[[], None]) -> bytes:
    """A line from the terminal, empty at its end; meanwhile the connection is kept alive from this thread."""
    lines: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        try:
            lines.put(os.fsencode(input(prompt)))
        except EOFError:
            lines.put(b"")
        except UnicodeDecodeError as error:  # a terminal's, which is more strict than a pipe's
            lines.put(error.object)

    threading.Thread(target=read, daemon=True).start()
    while True:
        while_waiting()
        try:
            return lines.get_nowait().strip()
        except queue.Empty:
            continue


def main() -> None:
    """Console entry."""
    run_console(cli, "wdmoe-bs")
