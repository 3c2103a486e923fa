"""Predicts a fleet whose placement is given and whose parts were measured. Pure."""

from collections.abc import Mapping

from bs_coordinator.placement.boards import NODE_S, OTHER, Board, BoardLink
from bs_coordinator.placement.plan import asked_holders
from bs_coordinator.placement.predict import NO_CROWD, Costs, Routing, Station, Step, predict_step
from bs_coordinator.placement.row_curve import RowCurve
from bs_coordinator.placement.shapes import Variant, shape_of_manifest
from wire.experts import parse_selector
from wire.manifest import Manifest


def predict_known(
    manifest: Manifest, experts: Mapping[str, str], links: Mapping[str, BoardLink], *, unit_s: RowCurve,
    station: Station, routing: Routing, shared_air: bool, rows: int = 1, node_s: float = NODE_S,
    crowd: RowCurve = NO_CROWD,
) -> Step:  # fmt: skip
    """Predict one step of a fleet of equal boards.

    Args:
        manifest: of the bundle that all nodes have.
        experts: selector of what each node holds; each expert, or slice, is held at least once.
        links: of each node.
        unit_s: measured seconds of so many rows through one unit.
        station: the base station's own times.
        routing: which experts tokens ask.
        shared_air: whether all links share one channel.
        rows: hidden states of the step.
        node_s: seconds of a request in a node beyond its experts.
        crowd: how many times as long units take when so many nodes compute at once (`Costs`).
    """
    dims = manifest.dims
    cut = Variant(manifest.quantisation, dims.slices, max(entry.bytes for entry in manifest.experts))
    byte_s = {str(cut.quantisation): unit_s.scaled(1 / cut.unit_bytes)}
    boards = [
        Board(name=node, kind="board", facts=OTHER, ram_bytes=0, link=links[node], node_s=node_s, byte_s=byte_s)
        for node in experts
    ]
    costs = Costs(shape_of_manifest(manifest), cut, boards, shared_air, crowd)
    held = {
        node: parse_selector(selector, layers=dims.layers, experts=dims.experts, slices=dims.slices)
        for node, selector in experts.items()
    }
    return predict_step(costs, asked_holders(costs, held), routing, rows, station)
