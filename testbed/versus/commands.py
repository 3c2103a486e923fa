"""`wdmoe-testbed versus`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from bs_coordinator.config import TrunkDtype
from common.options import Command

if TYPE_CHECKING:
    from wire.manifest import Dims

_F = TypeVar("_F", bound=Callable[..., Any])
_CHANNELS = ("dedicated", "shared")


def register(group: click.Group) -> None:
    """Add the command to `wdmoe-testbed`."""
    group.add_command(versus)


def _program(name: str, help: str) -> Callable[[_F], _F]:
    """Option that names an executable file."""
    kind = click.Path(path_type=Path, exists=True, dir_okay=False, executable=True, resolve_path=True)
    return click.option(name, type=kind, help=help)


def _model(name: str, help: str) -> Callable[[_F], _F]:
    """Option that names a file of weights or tokens."""
    return click.option(
        name, type=click.Path(path_type=Path, exists=True, dir_okay=False, resolve_path=True), help=help
    )


@click.command(
    cls=Command,
    example="""\
wdmoe-testbed versus --llama-server bin/llama-server --llama-rpc bin/rpc-server --gguf model.gguf
wdmoe-testbed versus --arm ours --arm ours-drafts --rtt-ms 5 --channel dedicated --prompts 2""",
)
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Bundle of our arms.  [default: the demo model's, int4]"
)
@click.option("--draft-model", type=click.Path(path_type=Path), help="Draft model.  [default: the bundle's or demo's]")
@_program("--llama-server", "llama.cpp's llama-server, built with RPC.")
@_program("--llama-rpc", "llama.cpp's RPC server.")
@_model("--gguf", "The same model for llama.cpp.")
@_program("--dllama", "distributed-llama's dllama, for its workers.")
@_program("--dllama-api", "distributed-llama's dllama-api, for its root.")
@_model("--dllama-model", "The same model for distributed-llama.")
@_model("--dllama-tokenizer", "Its tokenizer for distributed-llama.")
@click.option(
    "--arm", "arms", multiple=True,
    help="ours, ours-drafts, ours-fast, llama (one device), llama-N (layers on N workers) or dllama-N (N nodes); "
    "repeatable.  [default: all whose files are named]",
)  # fmt: skip
@click.option(
    "--rtt-ms", "rtts_ms", type=click.FloatRange(0), multiple=True, default=(2.0, 5.0, 10.0), show_default=True,
    help="Round trip of each link; repeatable.",
)  # fmt: skip
@click.option(
    "--channel", "channels", type=click.Choice(_CHANNELS), multiple=True, default=_CHANNELS, show_default=True,
    help="A link for each device, or one channel for all; repeatable.",
)  # fmt: skip
@click.option("--mbps", type=click.FloatRange(0, min_open=True), default=100, show_default=True, help="Rate of a link.")
@click.option("--devices", type=click.IntRange(1, 64), default=8, show_default=True, help="Besides the base station.")
@click.option("--prompts", type=click.IntRange(1, 52), default=4, show_default=True, help="Number of prompts.")
@click.option("--prompt", "texts", multiple=True, help="A prompt of your own instead; repeatable.")
@click.option("--tokens", type=click.IntRange(2), default=48, show_default=True, help="Longest answer.")
@click.option(
    "--ignore-eos", is_flag=True, help="Answers do not end before --tokens; for weights whose answers mean nothing."
)
@click.option("--device", default="cpu", show_default=True, help="Device of our arms' trunk, as wdmoe-bs takes it.")
@click.option(
    "--dtype", type=click.Choice(get_args(TrunkDtype)), default="fp32", show_default=True,
    help="Number format of our arms' trunk.",
)  # fmt: skip
@click.option(
    "--cores", is_flag=True,
    help="Run all programs of a device on one core of its own, everything else on the remaining cores.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of each program on a device."
)
@click.option(
    "--head-threads", type=click.IntRange(1), help="Of each program on the base station.  [default: as --threads]"
)
@click.option(
    "--deadline", "deadline_s", type=click.FloatRange(0, min_open=True), default=60, show_default=True,
    help="Seconds of silence after which an answer counts as hung.",
)  # fmt: skip
@click.option(
    "--start-deadline", "start_s", type=click.FloatRange(0, min_open=True), default=300, show_default=True,
    help="Seconds that an arm may take to be ready.",
)  # fmt: skip
@click.option("--kill/--no-kill", default=True, show_default=True, help="At the end, kill a device of each arm.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/versus"), show_default=True,
    help="Folder for samples, tables, plot and the programs' logs.",
)  # fmt: skip
def versus(
    bundle: Path | None, draft_model: Path | None, arms: tuple[str, ...], rtts_ms: tuple[float, ...],
    channels: tuple[str, ...], mbps: float, devices: int, prompts: int, texts: tuple[str, ...], tokens: int,
    ignore_eos: bool, device: str, dtype: str, cores: bool, threads: int, head_threads: int | None, deadline_s: float,
    start_s: float, kill: bool, out: Path, **files: Path | None,
) -> None:  # fmt: skip
    """Compare with llama.cpp and distributed-llama on the same emulated links, as root.

    All arms answer the same prompts in turns, greedily. Their programs and models are yours: this project contains
    none of them.
    """
    from rich.console import Console

    from testbed.bench.chat_prompts import CHAT_PROMPTS
    from testbed.bench.system import why_not
    from testbed.demo_assets import demo_bundle, demo_draft
    from testbed.errors import PrivilegeError
    from testbed.network.uniform import Links
    from testbed.node_shares import choose_cores, read_siblings
    from testbed.versus.arms import Peers, check_arm, default_arms
    from testbed.versus.floors import Shape
    from testbed.versus.results import RESULTS
    from testbed.versus.run import run_versus
    from testbed.versus.settings import Settings
    from wire.manifest import load_manifest

    peers = Peers(**files)
    if not all(text.strip() for text in texts):
        raise click.BadParameter("it is empty: give a text to answer", param_hint="--prompt")
    if peers.gguf is not None:
        _check_gguf(peers.gguf)
    for name in arms:
        try:
            check_arm(name, peers, devices)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    own = choose_cores(read_siblings(), devices) if cores else None
    if own is not None and len(set(own.station) | set(own.nodes)) <= devices:
        here = len(own.station)
        raise click.UsageError(f"--cores needs a core for each of {devices} devices and one more, there are {here}")
    if (out / RESULTS).exists():
        raise click.BadParameter(
            f"'{out}' has the results of another run, which may still be going: name another folder, or remove it",
            param_hint="--out",
        )
    if why := why_not():
        raise PrivilegeError(why)
    console = Console()
    if bundle is None:
        bundle = demo_bundle("int4", console=console)
        draft_model = draft_model or demo_draft(console=console)
    manifest = load_manifest(bundle)
    config = json.loads((bundle / "trunk" / "config.json").read_text(encoding="utf-8"))
    dims = manifest.dims
    if peers.gguf is not None:
        _check_gguf(peers.gguf, dims)
    shape = Shape(dims.hidden, dims.layers, dims.top_k, config.get("num_key_value_heads", 1), dims.slices)
    settings = Settings(
        bundle=bundle, draft_model=draft_model, shape=shape, dims=dims,
        arms=list(dict.fromkeys(arms)) or default_arms(peers, shape, devices),
        links=[
            Links(rtt, mbps, channel == "shared")
            for channel in dict.fromkeys(channels)
            for rtt in dict.fromkeys(rtts_ms)
        ],
        devices=[f"node{k}" for k in range(devices)], prompts=texts or CHAT_PROMPTS[:prompts], tokens=tokens,
        ignore_eos=ignore_eos, threads=threads, head_threads=head_threads or threads,
        trunk={"--device": device, "--dtype": dtype}, cores=own, deadline_s=deadline_s, start_s=start_s, kill=kill,
        folder=out, console=console,
    )  # fmt: skip
    run_versus(settings, peers)


def _check_gguf(path: Path, dims: "Dims | None" = None) -> None:
    """Refuse a file with a damaged header, or one of another shape than `dims`."""
    from exporter.demo_model.gguf_header import check_fields
    from testbed.versus.gguf_file import other_shape

    difference = ""
    try:
        if dims is None:
            check_fields(path)
        else:
            difference = other_shape(path, dims)
    except (ValueError, OSError) as error:
        raise click.BadParameter(f"'{path}' is no GGUF file, or is damaged: {error}", param_hint="--gguf") from None
    if difference:
        raise click.BadParameter(f"'{path}' is another model than the bundle's: {difference}", param_hint="--gguf")
