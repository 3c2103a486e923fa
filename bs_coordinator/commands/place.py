"""`wdmoe-bs place`: the command; `bs_coordinator.placement` decides."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from bs_coordinator.commands import place_options as options
from common.errors import StorageError
from common.json_output import json_option, print_json
from common.jsonl import decode_json
from common.options import Command

if TYPE_CHECKING:
    from bs_coordinator.placement.boards import Board
    from bs_coordinator.placement.fleet_plan import Wanted
    from bs_coordinator.placement.shapes import ModelShape, Variant
    from wire.experts import UnitId
    from wire.manifest import Manifest, Quantisation


@click.command(
    cls=Command,
    example="""\
wdmoe-bs place --bundle bundle --node pi1=3.5G,12 --node pi2=7G,8
wdmoe-bs place --model mixtral-8x7b --board 'pi5-8g*8' --link 100,2""",
)
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle to place.")
@click.option(
    "--model", metavar="NAME|CONFIG", help="Instead of a bundle: mixtral-8x7b, qwen3-30b-a3b, or a config.json."
)
@click.option(
    "--node",
    "nodes",
    multiple=True,
    callback=options.parse_nodes,
    metavar="NAME=RAM[,MS]",
    help="A device: RAM for experts, such as 3.5G, and ms that one hidden state takes there and back; repeatable. "
    "Places a bundle without predicting times.",
)
@click.option(
    "--board",
    "boards",
    multiple=True,
    callback=options.parse_boards,
    metavar="KIND[*COUNT]|NAME=KIND",
    help="A board, such as pi5-8g, 'pi5-8g*8' or kitchen=pi4-4g; repeatable. Times are predicted.",
)
@click.option("--fleet", type=click.Path(path_type=Path), help="Instead of boards: output of 'wdmoe-bs nodes --json'.")
@click.option("--links", type=click.Path(path_type=Path), help="Output of 'wdmoe-bs links --json': measured links.")
@click.option(
    "--link",
    "stated",
    multiple=True,
    callback=options.parse_links,
    metavar="[NAME=]MBPS,MS",
    help="Rate and round trip of the links: of all, of a board or of a kind; repeatable.  [default: 100,2]",
)
@click.option("--shared-air", is_flag=True, help="All nodes share one Wi-Fi channel: their air times add up.")
@click.option(
    "--tuned",
    multiple=True,
    callback=options.parse_tuned,
    metavar="NAME=FILE",
    help="Tuning file of 'wdmoe-node tune' for a board or a kind: measured speeds of whole experts; repeatable.",
)
@click.option(
    "--quant",
    "quantisations",
    multiple=True,
    callback=options.parse_quantisations,
    metavar="SCHEME[:BLOCK]",
    help="Quantisation, such as int4:128; of several, the first that fits.  [default: the bundle's, or int4, int4:128]",
)
@click.option(
    "--slices",
    multiple=True,
    type=click.IntRange(1, 64),
    help="Slices of each expert; of several, the fastest.  [default: the bundle's, or 1, 2, 4, …]",
)
@click.option("--replicas", type=click.IntRange(1), default=2, show_default=True, help="Copies of each expert.")
@click.option("--resident", metavar="SIZE", callback=options.parse_size, help="RAM of the base station for experts.")
@click.option(
    "--trunk-ms",
    type=click.FloatRange(0, min_open=True),
    help="Measured time of the trunk per token.  [default: assumed]",
)
@click.option(
    "--draft-steps",
    "draft",
    callback=options.parse_draft,
    metavar="ROWS,TOKENS",
    help="Predict also with drafts, and choose slices by that time: rows of a step, and tokens that it yields on "
    "average, such as 5,3.2.",
)
@click.option("--prompt", type=click.IntRange(1, 1 << 20), default=512, show_default=True, help="Tokens of the prompt.")
@click.option(
    "--traffic",
    type=click.Path(path_type=Path),
    help="latency.csv of a run: how often experts are used.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    help="Present placement, from --out: move little. Only with --node.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the placement as JSON.")
@json_option
def place(
    bundle: Path | None, model: str | None, nodes: dict[str, tuple[int, float]], boards: dict[str, str],
    fleet: Path | None, links: Path | None, stated: list[options.StatedLink], shared_air: bool, tuned: dict[str, Path],
    quantisations: "tuple[Quantisation, ...]", slices: tuple[int, ...], replicas: int, resident: int,
    trunk_ms: float | None, draft: tuple[int, float] | None, prompt: int, traffic: Path | None, keep: Path | None,
    out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Plan which device holds which experts.

    With --node, prints the options to start each node with, and on stderr the reasons. With --board or --fleet, also
    chooses quantisation, slices and copies by predicted times, and prints these. Boards that can't hold the model are
    refused with what is missing.
    """
    if bool(nodes) + bool(boards) + (fleet is not None) != 1:
        raise click.UsageError("give the devices with --node, with --board, or with --fleet")
    if (bundle is None) == (model is None):
        raise click.UsageError("give either --bundle or --model")
    if nodes:
        planned = (links, *stated, *tuned, *quantisations, *slices, trunk_ms, draft, model)
        if shared_air or resident or any(option is not None for option in planned):
            raise click.UsageError("with --node, times are not predicted: describe the devices with --board or --fleet")
        assert bundle is not None  # noqa: S101 - no --model was given
        _place_bundle(bundle, nodes, replicas, traffic, keep, out, as_json=as_json)
        return
    if keep is not None:
        raise click.UsageError("--keep works with --node only")
    from bs_coordinator.commands import place_inputs as inputs
    from bs_coordinator.commands.place_report import print_plan
    from bs_coordinator.placement.plan import plan_fleet
    from bs_coordinator.placement.predict import Routing

    shape, exported = _model(bundle, model)
    found = inputs.live_boards(fleet) if fleet is not None else inputs.stated_boards(boards)
    found = inputs.with_links(found, stated)
    if links is not None:
        found = inputs.with_measured_links(found, links, exported)
    found = inputs.with_tuning(found, tuned, shape)
    wanted = _wanted(
        shape, exported, quantisations, slices, replicas, resident, trunk_ms, draft, prompt, shared_air=shared_air
    )
    routing = Routing(inputs.read_traffic(traffic, shape.layers, shape.experts), shape.top_k)
    plan = plan_fleet(shape, found, routing, wanted)
    assumed = _assumed(found, wanted, plan.quantisation, trunk_ms, traffic=traffic)
    if as_json:
        print_json({"plan": plan, "assumed": assumed})
    else:
        print_plan(plan, assumed)
    if out:
        _write(out, {board.name: board.experts for board in plan.boards if board.experts})


def _model(bundle: Path | None, model: str | None) -> "tuple[ModelShape, Variant | None]":
    """The model's shape, and how the bundle stores its experts."""
    from bs_coordinator.commands.place_inputs import read_shape
    from bs_coordinator.placement.shapes import Variant, shape_of_manifest
    from wire.manifest import load_manifest

    if bundle is None:
        assert model is not None  # noqa: S101 - checked above
        return read_shape(model), None
    manifest = load_manifest(bundle)
    largest = max(entry.bytes for entry in manifest.experts)
    return shape_of_manifest(manifest), Variant(manifest.quantisation, manifest.dims.slices, largest)


def _wanted(
    shape: "ModelShape", exported: "Variant | None", quantisations: "tuple[Quantisation, ...]", slices: tuple[int, ...],
    replicas: int, resident: int, trunk_ms: float | None, draft: tuple[int, float] | None, prompt: int, *,
    shared_air: bool,
) -> "Wanted":  # fmt: skip
    from bs_coordinator.placement.fleet_plan import Wanted
    from bs_coordinator.placement.predict import TRUNK_BYTES_PER_S, TRUNK_ROW_SHARE, Station
    from bs_coordinator.placement.row_curve import RowCurve
    from wire.manifest import Quantisation

    if not quantisations:
        ours = Quantisation(scheme="int4", block=32), Quantisation(scheme="int4", block=128)
        quantisations = (exported.quantisation,) if exported else ours
    if not slices and exported is not None:
        slices = (exported.slices,)
    for quantisation in quantisations:
        blocks = -(-shape.intermediate // (quantisation.block or 1))
        if max(slices, default=1) > blocks:
            raise click.UsageError(f"an expert at {quantisation} can be cut into at most {blocks} --slices")
    trunk_s = shape.trunk_bytes / TRUNK_BYTES_PER_S if trunk_ms is None else 1e-3 * trunk_ms
    return Wanted(
        quantisations=quantisations, station=Station(RowCurve.line(trunk_s, TRUNK_ROW_SHARE * trunk_s)), slices=slices,
        replicas=replicas, shared_air=shared_air, prompt_tokens=prompt, draft=draft, resident_bytes=resident,
        exported=exported,
    )  # fmt: skip


def _assumed(
    boards: "list[Board]", wanted: "Wanted", quantisation: str, trunk_ms: float | None, *, traffic: Path | None
) -> list[str]:
    """What was not measured or stated, for people."""
    from bs_coordinator.commands.place_report import assumed_links
    from bs_coordinator.placement.predict import TRUNK_BYTES_PER_S

    lines = []
    if trunk_ms is None:
        lines.append(
            f"trunk: {1e3 * wanted.station.trunk_s.first:.1f} ms per token, its weights in bf16 read at "
            f"{1e-9 * TRUNK_BYTES_PER_S:.0f} GB/s; --trunk-ms states what was measured"
        )
    lines += assumed_links(boards)
    if traffic is None:
        lines.append("routing: all experts are asked equally often; --traffic takes a run's latency.csv")
    if wanted.draft is not None:
        lines.append("drafts: making them takes no time")
    if wanted.resident_bytes:
        lines.append(f"experts on the base station: read at {1e-9 * wanted.resident_bytes_per_s:.0f} GB/s")
    # A speed that was measured with another quantisation says nothing of this one.
    unmeasured = [board for board in boards if quantisation not in board.byte_s]
    for kind, facts in {board.kind: board.facts for board in unmeasured}.items():
        lines.append(
            f"{kind}: {1e-9 * facts.memory_bytes_per_s:.0f} GB/s ({facts.source}); --tuned states measurements"
        )
    return lines


def _place_bundle(
    bundle: Path, nodes: dict[str, tuple[int, float]], replicas: int, traffic: Path | None, keep: Path | None,
    out: Path | None, *, as_json: bool,
) -> None:  # fmt: skip
    from bs_coordinator.commands.place_inputs import read_traffic
    from bs_coordinator.placement.spread import PlacementDevice, plan_placement
    from wire.experts import format_selector
    from wire.manifest import load_manifest

    manifest = load_manifest(bundle)
    dims = manifest.dims
    expert_bytes = max(entry.bytes for entry in manifest.experts)
    devices = [PlacementDevice(name, ram // expert_bytes, ms) for name, (ram, ms) in nodes.items()]
    placement = plan_placement(
        devices, read_traffic(traffic, dims.layers, dims.experts), replicas, slices=dims.slices,
        current=_current(keep, manifest),
    )  # fmt: skip
    selectors = {name: format_selector(ids, dims.slices) for name, ids in placement.experts.items() if ids}
    if as_json:
        print_json(selectors)
    else:
        for name, selector in selectors.items():
            click.echo(f"wdmoe-node --id {name} --experts '{selector}' …")
    for reason in placement.reasons:
        click.echo(reason, err=True)
    if out:
        _write(out, selectors)


def _write(path: Path, selectors: Mapping[str, str]) -> None:
    from common.files import atomic_write

    with atomic_write(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(selectors)))


def _current(path: Path | None, manifest: "Manifest") -> "Mapping[str, tuple[UnitId, ...]] | None":
    from wire.experts import parse_selector

    if path is None:
        return None
    try:
        selectors = decode_json(path.read_bytes(), dict[str, str])
        dims = manifest.dims
        return {
            name: parse_selector(text, layers=dims.layers, experts=dims.experts, slices=dims.slices)
            for name, text in selectors.items()
        }
    except (OSError, ValueError, msgspec.DecodeError) as error:
        raise StorageError(f"{path} is not a placement of this model: {error}") from None
