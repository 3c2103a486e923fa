"""`wdmoe-bs place`: its options, and the steps from them to a plan."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bs_coordinator.commands.place import options
from common.json_output import json_option, print_json
from common.options import Command

if TYPE_CHECKING:
    from wire.manifest import Quantisation


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
        from bs_coordinator.commands.place.nodes import place_on_nodes

        assert bundle is not None  # noqa: S101 - no --model was given
        place_on_nodes(bundle, nodes, replicas, traffic, keep, out, as_json=as_json)
        return
    if keep is not None:
        raise click.UsageError("--keep works with --node only")
    from bs_coordinator.commands.place.assumptions import assumptions
    from bs_coordinator.commands.place.boards import live_boards, stated_boards, with_links
    from bs_coordinator.commands.place.files import read_traffic, write_placement
    from bs_coordinator.commands.place.measurements import with_measured_links, with_tuning
    from bs_coordinator.commands.place.report import print_plan
    from bs_coordinator.commands.place.wanted import model_shape, wanted_plan
    from bs_coordinator.placement.plan import plan_fleet
    from bs_coordinator.placement.predict import Routing

    shape, exported = model_shape(bundle, model)
    found = live_boards(fleet) if fleet is not None else stated_boards(boards)
    found = with_links(found, stated)
    if links is not None:
        found = with_measured_links(found, links, exported)
    found = with_tuning(found, tuned, shape)
    wanted = wanted_plan(
        shape, exported, quantisations, slices, replicas, resident, trunk_ms, draft, prompt, shared_air=shared_air
    )
    plan = plan_fleet(shape, found, Routing(read_traffic(traffic, shape.layers, shape.experts), shape.top_k), wanted)
    assumed = assumptions(found, wanted, plan.quantisation, trunk_ms, traffic=traffic)
    if as_json:
        print_json({"plan": plan, "assumed": assumed})
    else:
        print_plan(plan, assumed)
    if out:
        write_placement(out, {board.name: board.experts for board in plan.boards if board.experts})
