"""Predicts a fleet whose placement is given and whose parts were measured. Pure."""

from collections.abc import Mapping

from bs_coordinator.placement.boards import NODE_S, OTHER, Board, BoardLink, MeasuredRate
from bs_coordinator.placement.plan import asked_holders
from bs_coordinator.placement.predict import Costs, Routing, Station, Step, predict_step
from bs_coordinator.placement.shapes import Variant, shape_of_manifest
from wire.experts import parse_selector
from wire.manifest import Manifest

_LEAST_S = 1e-9


def predict_known(
    manifest: Manifest, experts: Mapping[str, str], links: Mapping[str, BoardLink], *, unit_s: float,
    further_s: float, station: Station, routing: Routing, shared_air: bool, rows: int = 1, node_s: float = NODE_S,
) -> Step:  # fmt: skip
    """Predict one step of a fleet of equal boards.

    Args:
        manifest: of the bundle that all nodes have.
        experts: selector of what each node holds; each expert, or slice, is held at least once.
        links: of each node.
        unit_s, further_s: measured seconds of one row through one unit, and of each further row through it.
        station: the base station's own times.
        routing: which experts tokens ask.
        shared_air: whether all links share one channel.
        rows: hidden states of the step.
        node_s: seconds of a request in a node beyond its experts.
    """
    dims = manifest.dims
    cut = Variant(manifest.quantisation, dims.slices, max(entry.bytes for entry in manifest.experts))
    rate = MeasuredRate(cut.unit_bytes / max(unit_s, _LEAST_S), cut.unit_bytes / max(further_s, _LEAST_S))
    boards = [
        Board(
            name=node, kind="board", facts=OTHER, ram_bytes=0, link=links[node], node_s=node_s,
            rates={str(cut.quantisation): rate},
        )
        for node in experts
    ]  # fmt: skip
    costs = Costs(shape_of_manifest(manifest), cut, boards, shared_air)
    held = {
        node: parse_selector(selector, layers=dims.layers, experts=dims.experts, slices=dims.slices)
        for node, selector in experts.items()
    }
    return predict_step(costs, asked_holders(costs, held), routing, rows, station)
