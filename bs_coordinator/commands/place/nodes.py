"""`wdmoe-bs place --node`: which node holds which experts, by RAM and round trips as stated."""

from pathlib import Path

import click

from bs_coordinator.commands.place.files import read_placement, read_traffic, write_placement
from common.json_output import print_json


def place_on_nodes(
    bundle: Path, nodes: dict[str, tuple[int, float]], replicas: int, traffic: Path | None, keep: Path | None,
    out: Path | None, *, as_json: bool,
) -> None:  # fmt: skip
    """Choose and print each node's experts.

    Args:
        nodes: RAM in bytes and ms of a hidden state there and back, by node.
        traffic: latency.csv of a run; None for equal traffic.
        keep: the present placement, to move little.
        out: file for the placement.
    """
    from bs_coordinator.placement.spread import PlacementDevice, plan_placement
    from wire.experts import format_selector
    from wire.manifest import load_manifest

    manifest = load_manifest(bundle)
    dims = manifest.dims
    expert_bytes = max(entry.bytes for entry in manifest.experts)
    devices = [PlacementDevice(name, ram // expert_bytes, ms) for name, (ram, ms) in nodes.items()]
    placement = plan_placement(
        devices, read_traffic(traffic, dims.layers, dims.experts), replicas, slices=dims.slices,
        current=read_placement(keep, manifest) if keep else None,
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
        write_placement(out, selectors)
