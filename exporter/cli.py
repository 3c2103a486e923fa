"""`wdmoe-export`: make the demo model, export checkpoints to bundles, inspect, verify and sign bundles."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click
import msgspec

from common.console import printable
from common.console import run as run_console
from common.options import Group, config_options
from common.progress import show_progress
from common.sizes import readable_bytes
from exporter.config import ExportConfig
from wire import __version__
from wire.experts import format_ranges, format_selector, parse_index_set, parse_selector

if TYPE_CHECKING:
    from wire.manifest import Architecture, Dims, Manifest

_PATH = click.Path(path_type=Path)


@click.group(cls=Group, example="wdmoe-export bundle Qwen/Qwen3-30B-A3B bundle --device pi5")
@click.version_option(__version__)
def cli() -> None:
    """Turn a mixture-of-experts checkpoint into a bundle of quantised ONNX experts."""


@cli.command("demo-model", example="wdmoe-export demo-model demo-model")
@click.argument("out", type=_PATH)
@click.option(
    "--model", type=click.Choice(["mixtral", "qwen3-moe"]), default="mixtral", show_default=True,
    help="Which of the two demo models.",
)  # fmt: skip
@click.option("--base", help="Dense model to start from: folder, .gguf file or hub id.  [default: from PyPI]")
@click.option("--deltas", type=_PATH, help="Folder of the model's deltas.  [default: the project's own]")
@click.option("--layers", type=click.IntRange(1), help="Keep only this many layers, from the first.")
def demo_model(out: Path, model: str, base: str | None, deltas: Path | None, layers: int | None) -> None:
    """Assemble a demo model in OUT.

    OUT becomes a Hugging Face folder of a MixtralForCausalLM (8 experts per layer, top 2) or a Qwen3MoeForCausalLM
    (16 experts per layer, top 4).
    """
    from exporter.demo_model.assembly import assemble_demo_model, demo_model_path

    with show_progress("demo model", keep=True) as show:
        assemble_demo_model(
            out,
            model=model,
            base=base,
            deltas=deltas,
            layers=layers,
            made=demo_model_path(model, layers),
            progress=show,
        )
    click.echo(f"demo model in {out}")


@cli.command(
    example="""\
wdmoe-export bundle demo-model bundle --device pi5
wdmoe-export bundle Qwen/Qwen3-30B-A3B bundle --quant int4""",
)
@click.argument("name", metavar="CHECKPOINT")
@click.argument("out", type=_PATH)
@click.option("--revision", help="Branch, tag or commit, if CHECKPOINT is a hub id.  [default: main]")
@config_options(config=ExportConfig)
def bundle(name: str, out: Path, revision: str | None, config: ExportConfig) -> None:
    """Export CHECKPOINT's trunk and experts to OUT.

    CHECKPOINT is a folder, or a hub id such as Qwen/Qwen3-30B-A3B: then its files are downloaded into the hub's cache
    first. Continues where an interrupted export stopped, and replaces damaged files.
    """
    from common.disk_space import Room
    from exporter.bundle.bundle import export_bundle
    from exporter.bundle.forecast import forecast_room
    from exporter.calibration.text import read_text
    from exporter.checkpoint.checkpoint import open_checkpoint
    from exporter.checkpoint.hub import locate_checkpoint
    from exporter.expert.expert import slice_bounds
    from exporter.expert.graph import plan_layout
    from exporter.expert.presets import choose_quantisation
    from wire.manifest import check_bundle_path

    check_bundle_path(out)
    quant, preset = config.quant, ""
    if config.via == "optimum":
        from exporter.expert.optimum_backend import choose_preset, require_optimum

        require_optimum()
        preset = choose_preset(config.device)
        if quant not in (None, "int8-dynamic"):
            raise click.UsageError(f"--via optimum makes int8-dynamic only, not {quant}")
        quant = "int8-dynamic"
    text = None if config.calibrate is None else read_text(config.calibrate)
    try:
        quantisation, choice = choose_quantisation(config.device, quant, config.block, config.symmetric, config.w2_bits)

        def room_for(folder: Path, weight_bytes: int) -> Room:
            return forecast_room(
                folder, out, quantisation, layers=config.layers, experts=config.experts, weight_bytes=weight_bytes
            )

        with show_progress("download", keep=True) as show:
            folder = locate_checkpoint(name, revision=revision, progress=show, room_for=room_for)
        checkpoint = open_checkpoint(folder)
        layers = parse_index_set(config.layers, checkpoint.dims.layers)
        experts = parse_index_set(config.experts, checkpoint.dims.experts)
        slice_bounds(checkpoint.dims.intermediate, quantisation, config.slices)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if preset:
        quantisation = msgspec.structs.replace(quantisation, backend="optimum")
        choice = f"{quantisation}, its preset {preset}"
    if text is not None and quantisation.scheme not in ("int4", "int8"):
        raise click.UsageError(f"--calibrate is for --quant int4 and int8, not {quantisation.scheme}")
    click.echo(f"model: {_model(checkpoint.dims, checkpoint.architecture)}")
    click.echo(f"quantisation: {choice}")
    unit = "expert" if config.slices == 1 else "slice"
    began = time.monotonic()
    each = plan_layout(checkpoint.dims, quantisation, checkpoint.architecture.expert).bytes // config.slices
    with _phases() as report:
        result = export_bundle(
            checkpoint, out, quantisation, layers=layers, experts=experts, jobs=config.jobs, slices=config.slices,
            preset=preset, calibrate=text, calibration_tokens=config.calibration_tokens,
            progress=lambda done, all_: report(
                "experts",
                f"{unit} {done} of {all_}, {readable_bytes(done * each)} of {readable_bytes(all_ * each)}",
                done / all_,
            ),
            calibration_progress=lambda done, all_: report("calibration", f"layer {done} of {all_}", done / all_),
        )  # fmt: skip
    if result.up_to_date:
        click.echo(f"{out} is up to date: all files match their hashes")
    elif result.kept:
        click.echo(f"kept {result.kept} {unit}s that were already there and match their hashes")
    for line in result.lost:
        click.echo(printable(line))  # names of tensors and a template's errors come from a foreign file
    _summary(result.manifest, result.source_bytes, time.monotonic() - began)
    click.echo(f"bundle in {out}")


@cli.command(example="wdmoe-export draft bundle")
@click.argument("out", metavar="BUNDLE|FOLDER", type=_PATH)
@click.option(
    "--base",
    help="Dense Llama: folder, .gguf file or hub id; or a Mixtral's folder or hub id, for the mean of its experts.  "
    "[default: the demo models' own base]",
)
def draft(out: Path, base: str | None) -> None:
    """Add a draft model to BUNDLE, or make one in FOLDER.

    The base station drafts tokens with it; a FOLDER is named with --draft-model. It must have the model's vocabulary.
    """
    from exporter.draft.draft import export_draft
    from wire.manifest import MANIFEST_NAME, load_manifest

    with show_progress("draft model", keep=True) as show:
        made = export_draft(out, base=base, progress=show)
    size = sum(file.bytes for file in made.files) / 2**20
    click.echo(f"draft model {made.source}: {made.layers} layers as {made.quantisation}, {size:.0f} MiB, in {out}")
    if (out / MANIFEST_NAME).exists() and load_manifest(out).quantisation.scheme == "int8-dynamic":
        click.echo("its experts are int8-dynamic, so drafts could change answers: only --draft dense uses this model")


@cli.command(example="wdmoe-export inspect bundle")
@click.argument("bundle", type=_PATH)
def inspect(bundle: Path) -> None:
    """Show what BUNDLE contains."""
    from wire.manifest import load_manifest

    manifest = load_manifest(bundle)
    click.echo(f"from {manifest.source.name} ({manifest.source.dtype})")
    click.echo(_model(manifest.dims, manifest.architecture))
    held = format_selector((entry.id for entry in manifest.experts), manifest.dims.slices)
    click.echo(f"experts {held} as {manifest.quantisation}")
    click.echo(f"made with {', '.join(f'{k} {v}' for k, v in manifest.tools.items())}")
    if manifest.draft:
        click.echo(f"with a draft model of {sum(f.bytes for f in manifest.draft) / 2**20:.0f} MiB")
    _summary(manifest, None)


@cli.command(example="wdmoe-export verify bundle --experts 'L*:E3'")
@click.argument("bundle", type=_PATH)
@click.option("--experts", "selector", default="L*:E*", show_default=True, help="Experts to check, such as 'L*:E3'.")
@click.option("--bundle-key", type=_PATH, help="Also check the signature, with this public key.")
def verify(bundle: Path, selector: str, bundle_key: Path | None) -> None:
    """Check BUNDLE's hashes, and its experts on this machine.

    Each chosen expert must give the expected output for its probe input.
    """
    from exporter.expert.probe import check_probe
    from wire.manifest import load_manifest, verify_file

    if bundle_key is not None:  # needs cryptography, which an environment for optimum lacks
        from wire.signature import load_trusted_manifest

        manifest = load_trusted_manifest(bundle, bundle_key)
    else:
        manifest = load_manifest(bundle)
    try:
        dims = manifest.dims
        wanted = parse_selector(selector, layers=dims.layers, experts=dims.experts, slices=dims.slices)
    except ValueError as error:
        raise click.UsageError(f"--experts: {error}") from None
    held = {entry.id for entry in manifest.experts}
    entries = manifest.entries([id for id in wanted if id in held] if selector == "L*:E*" else wanted)
    worst = 0.0
    for file in (*manifest.trunk, *manifest.draft):
        if (bundle / Path(file.path).parts[0]).exists():
            verify_file(bundle, file)
    for entry in entries:
        for file in entry.files:
            verify_file(bundle, file)
        worst = max(worst, check_probe(bundle, entry, manifest.dims.hidden, manifest.probe_tolerance))
    click.echo(
        f"{len(entries)} {_units(dims)} match their hashes and compute what they did where they were exported "
        f"(largest relative difference {worst:.1e}, {manifest.probe_tolerance:.1e} allowed)"
    )


@cli.command(example="wdmoe-export sign bundle --key keys/bundle.key")
@click.argument("bundle", type=_PATH)
@click.option("--key", type=_PATH, required=True, help="Ed25519 private key, mode 600.")
def sign(bundle: Path, key: Path) -> None:
    """Sign BUNDLE's manifest, and with it every file that it lists."""
    from wire.manifest import MANIFEST_NAME, load_manifest
    from wire.signature import sign as sign_manifest

    load_manifest(bundle)
    path = sign_manifest((bundle / MANIFEST_NAME).read_bytes(), bundle, key)
    click.echo(f"signed: {path}")


def _model(dims: "Dims", architecture: "Architecture") -> str:
    """One line about a model: its family, dimensions and layers with experts."""
    cut = f" in {dims.slices} slices" if dims.slices > 1 else ""
    return (
        f"{architecture.family}, hidden {dims.hidden}, {dims.intermediate} wide, {dims.layers} layers × {dims.experts} "
        f"experts{cut} (layers {format_ranges(architecture.layers)}), top {dims.top_k}, {architecture.expert}"
    )


def _units(dims: "Dims") -> str:
    return "experts" if dims.slices == 1 else "slices"


def _summary(manifest: "Manifest", source_bytes: int | None, seconds: float | None = None) -> None:
    """Print what a bundle holds: one figure per line, so that it reads the same in a log."""
    total = sum(entry.bytes for entry in manifest.experts)
    errors = [entry.error for entry in manifest.experts]
    rows = [
        (_units(manifest.dims), f"{len(errors)} as {manifest.quantisation}"),
        ("bytes", f"{total / 2**20:.1f} MiB"),
        ("trunk", f"{sum(file.bytes for file in manifest.trunk) / 2**20:.1f} MiB"),
    ]
    if source_bytes:
        rows.append(("in the checkpoint", f"{source_bytes / 2**20:.1f} MiB, {source_bytes / total:.1f} times as large"))
    worst = max(manifest.experts, key=lambda entry: entry.error)
    if worst.error:  # none was measured where weights were drawn as they are stored
        largest = f"{worst.error:.2g} ({worst.name})"
        rows.append(("output error", f"median {median(errors):.2g}, largest {largest}, against fp32"))
    if seconds is not None:
        rows.append(("time", f"{seconds:.1f} s"))
    for name, value in rows:
        click.echo(f"{name:<18} {value}")


@contextmanager
def _phases() -> Iterator[Callable[[str, str, float], None]]:
    """Progress of several phases, each with a bar and a remaining time of its own: called with the phase, a stage and
    the share of the phase that is done."""
    with ExitStack() as stack:
        shown: dict[str, Callable[[str, float], None]] = {}

        def show(phase: str, stage: str, fraction: float) -> None:
            if phase not in shown:
                stack.close()
                shown[phase] = stack.enter_context(show_progress(phase, keep=True))
            shown[phase](stage, fraction)

        yield show


def main() -> None:
    """Console entry."""
    run_console(cli, "wdmoe-export", extra="exporter")
