"""`wdmoe-bs place`: the command; `bs_coordinator.placement` decides."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from common.csv_rows import read_rows
from common.errors import StorageError
from common.json_output import json_option, print_json
from common.jsonl import decode_json
from common.options import Command
from common.sizes import parse_bytes
from wire.topics import check_name

if TYPE_CHECKING:
    from wire.experts import UnitId
    from wire.manifest import Manifest
    from wire.tensors import Array

_SMALLEST_BYTES = 2**20
"""Less RAM than this was meant in another unit."""
_MOST_TOKENS = 1 << 20
"""Tokens of a request in a latency.csv."""


def _nodes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, tuple[int, float]]:
    """RAM in bytes and ms by node, from `NAME=RAM[,MS]` each."""
    found = {}
    for value in values:
        name, _, facts = value.partition("=")
        ram, _, ms = facts.partition(",")
        try:
            if check_name("node id", name) in found:
                raise ValueError(f"'{name}' is given twice")
            found[name] = parse_bytes(ram), float(ms or 1.0)
        except ValueError as error:
            raise click.BadParameter(f"'{value}' is not NAME=RAM[,MS], such as pi1=3.5G,12: {error}") from None
        if found[name][0] < _SMALLEST_BYTES:
            raise click.BadParameter(f"'{value}': RAM is less than 1M; write for example pi1=3.5G,12")
        if not 0 < found[name][1] < math.inf:
            raise click.BadParameter(f"'{value}': ms must be a number above 0, such as 12 in pi1=3.5G,12")
    return found


@click.command(cls=Command, example="wdmoe-bs place --bundle bundle --node pi1=3.5G,12 --node pi2=7G,8")
@click.option("--bundle", type=click.Path(path_type=Path), required=True, help="Bundle to place.")
@click.option(
    "--node",
    "nodes",
    multiple=True,
    required=True,
    callback=_nodes,
    metavar="NAME=RAM[,MS]",
    help="A device: RAM for experts, such as 3.5G, and ms that one hidden state takes there and back; repeatable.",
)
@click.option("--replicas", type=click.IntRange(1), default=2, show_default=True, help="Copies of each expert.")
@click.option(
    "--traffic",
    type=click.Path(path_type=Path),
    help="latency.csv of a run: how often experts are used.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    help="Present placement, from --out: move little.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the placement as JSON.")
@json_option
def place(
    bundle: Path, nodes: dict[str, tuple[int, float]], replicas: int, traffic: Path | None, keep: Path | None,
    out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Plan which device holds which experts.

    Prints the options to start each node with, and on stderr the reasons.
    """
    from bs_coordinator.placement import PlacementDevice, plan_placement
    from common.files import atomic_write
    from wire.experts import format_selector
    from wire.manifest import load_manifest

    manifest = load_manifest(bundle)
    expert_bytes = max(entry.bytes for entry in manifest.experts)
    devices = [PlacementDevice(name, ram // expert_bytes, ms) for name, (ram, ms) in nodes.items()]
    slices = manifest.dims.slices
    placement = plan_placement(
        devices, _traffic(traffic, manifest), replicas, slices=slices, current=_current(keep, manifest)
    )
    selectors = {name: format_selector(ids, slices) for name, ids in placement.experts.items() if ids}
    if as_json:
        print_json(selectors)
    else:
        for name, selector in selectors.items():
            click.echo(f"wdmoe-node --id {name} --experts '{selector}' …")
    for reason in placement.reasons:
        click.echo(reason, err=True)
    if out:
        with atomic_write(out) as file:
            file.write(msgspec.json.format(msgspec.json.encode(selectors)))


def _traffic(path: Path | None, manifest: "Manifest") -> "Array":
    """Hidden states asked of each expert, plus one so that none weighs zero: float32 [layers, experts]."""
    import numpy as np

    counts = np.ones((manifest.dims.layers, manifest.dims.experts))
    if path is None:
        return counts.astype(np.float32)
    layers, experts = counts.shape

    def take(row: dict[str, str]) -> None:
        layer, tokens = int(row["layer"]), int(row["tokens"])
        for expert in map(int, row["experts"].split()):
            if layer not in range(layers) or expert not in range(experts) or not 0 <= tokens <= _MOST_TOKENS:
                raise ValueError(
                    f"the model has {layers} layers of {experts} experts, a step at most {_MOST_TOKENS} tokens"
                )
            counts[layer, expert] += tokens

    try:
        read_rows(path, ("layer", "experts", "tokens"), take)
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise StorageError(f"{path} is no latency.csv of this model: {error}") from None
    return counts.astype(np.float32)


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
        raise StorageError(f"{path} is no placement for this model: {error}") from None
