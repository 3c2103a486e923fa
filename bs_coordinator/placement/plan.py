"""Chooses slices, copies, quantisation and resident experts for a fleet by predicted time. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bs_coordinator.dispatch.assignment import assign
from bs_coordinator.errors import FleetTooSmallError, PlacementError
from bs_coordinator.placement.boards import KERNEL_FACTOR, Board
from bs_coordinator.placement.fleet_plan import BoardPlan, FleetPlan, OneMore, SliceOption, Wanted, decisive_ms
from bs_coordinator.placement.predict import LOCAL, Costs, Routing, Station, Step, predict_prompt_s, predict_step
from bs_coordinator.placement.row_curve import RowCurve
from bs_coordinator.placement.shapes import ModelShape, Variant, possible_slices, variant
from bs_coordinator.placement.spread import Placement, PlacementDevice, plan_placement
from bs_coordinator.resident.choice import choose_resident
from bs_coordinator.selection.forecast import Float, Index
from edge_node.experts import loaded_bytes
from wire.experts import ExpertId, UnitId, format_selector, units_of
from wire.manifest import Quantisation

GAIN = 0.03
"""Share of the predicted time that more slices must save: they cost messages, and predictions are not exact."""


@dataclass(frozen=True, slots=True)
class _Option:
    """A variant that fits, placed, with its predictions.

    Attributes:
        step: of one token.
        draft: a step with drafts, and the mean number of tokens that it yields; None without drafts.
    """

    costs: Costs
    replicas: int
    placement: Placement
    holders: Index
    resident: frozenset[ExpertId]
    station: Station
    step: Step
    draft: tuple[Step, float] | None

    @property
    def draft_ms(self) -> float | None:
        """Per token, with drafts."""
        return None if self.draft is None else 1e3 * self.draft[0].seconds / self.draft[1]

    @property
    def decisive_ms(self) -> float:
        """Per token: the time by which plans are chosen."""
        return decisive_ms(1e3 * self.step.seconds, self.draft_ms)

    @property
    def summary(self) -> SliceOption:
        step = self.step if self.draft is None else self.draft[0]
        return SliceOption(
            self.costs.variant.slices, 1e3 * self.step.seconds, self.draft_ms, step.asked, 1e-6 * step.read_bytes,
            1e3 * step.air_s,
        )  # fmt: skip


def plan_fleet(shape: ModelShape, boards: Sequence[Board], routing: Routing, wanted: Wanted) -> FleetPlan:
    """Plan a fleet: the first quantisation that fits, as many copies as fit, the number of slices that is fastest.

    Args:
        shape: the model.
        boards: devices with different names.
        routing: which experts tokens ask.
        wanted: what to choose from, and what to predict.

    Raises:
        FleetTooSmallError: not even one copy fits in any quantisation.
    """
    if not boards:
        raise FleetTooSmallError("no board is given: add at least one --board")
    for quantisation in wanted.quantisations:
        for replicas in range(wanted.replicas, 0, -1):
            options = list(_options(shape, boards, routing, wanted, quantisation, replicas))
            if options:
                return _describe(shape, boards, routing, wanted, options)
    smallest = min((variant(shape, q, 1) for q in wanted.quantisations), key=lambda v: v.unit_bytes)
    raise FleetTooSmallError(
        f"{shape.name} does not fit into these boards: it needs {missing(shape, boards, smallest, 1)}"
    )


def missing(shape: ModelShape, boards: Sequence[Board], whole: Variant, replicas: int) -> str:
    """What devices lack to hold so many copies, such as `21.4 GB more RAM at int4 b128, which 3 more pi5-8g have`.

    Args:
        whole: the variant with whole experts.
    """
    units = shape.layers * shape.experts * whole.slices
    if len(boards) < replicas:
        return f"{replicas} boards or more: no board holds two copies"
    lacking = max(1, replicas * units - sum(min(board.fits(whole), units) for board in boards))
    on_disk = any(board.fits(whole) < replace(board, disk_bytes=None).fits(whole) for board in boards)
    unit_bytes = whole.unit_bytes if on_disk else loaded_bytes(whole.unit_bytes, whole.quantisation.scheme)
    each = {board.kind: min(board.fits(whole), units) for board in boards}
    counts = {kind: -(-lacking // fits) for kind, fits in sorted(each.items()) if fits}
    what = f"{1e-9 * lacking * unit_bytes:.1f} GB more {'disk' if on_disk else 'RAM'} at {whole.quantisation}"
    if not counts:
        return f"{what}, on boards that hold at least one expert each"
    more = " or ".join(f"{count} more {kind}" for kind, count in counts.items())
    return f"{what}, which {more} {'has' if list(counts.values())[-1] == 1 else 'have'}"


def _options(
    shape: ModelShape, boards: Sequence[Board], routing: Routing, wanted: Wanted, quantisation: Quantisation,
    replicas: int,
) -> Iterator[_Option]:  # fmt: skip
    """Each number of slices with which so many copies fit, in ascending order."""
    for slices in sorted(wanted.slices) or possible_slices(shape, quantisation):
        cut = variant(shape, quantisation, slices)
        if wanted.exported is not None and (quantisation, slices) == wanted.exported[:2]:
            cut = wanted.exported
        costs = Costs(shape, cut, boards, wanted.shared_air)
        devices = [
            PlacementDevice(board.name, board.fits(cut), ms) for board, ms in zip(boards, costs.row_ms(), strict=True)
        ]
        try:
            placement = plan_placement(devices, routing.traffic, replicas, slices=slices)
        except PlacementError:
            continue
        yield _predicted(costs, replicas, placement, routing, wanted)


def _predicted(costs: Costs, replicas: int, placement: Placement, routing: Routing, wanted: Wanted) -> _Option:
    """Add who is asked, what the base station keeps, and the time of a token and of a step with drafts."""
    shape, cut = costs.shape, costs.variant
    holders = asked_holders(costs, placement.experts)
    each = loaded_bytes(cut.unit_bytes, cut.quantisation.scheme)
    slots = max(0, wanted.resident_bytes - cut.unit_bytes) // (each * cut.slices)
    unit_s = KERNEL_FACTOR[cut.quantisation.scheme] * cut.unit_bytes / wanted.resident_bytes_per_s
    station = wanted.station._replace(unit_s=RowCurve.line(unit_s, unit_s / 4))
    resident: frozenset[ExpertId] = frozenset()
    if slots:
        remote_s = 1e-3 * np.array(costs.row_ms())[holders].reshape(shape.layers, shape.experts, -1).max(axis=-1)
        resident = choose_resident(_pairs(routing, shape), remote_s, unit_s * cut.slices, slots)
        for layer, expert in resident:
            holders[layer, expert * cut.slices : (expert + 1) * cut.slices] = LOCAL
    step = predict_step(costs, holders, routing, 1, station)
    draft = None
    if wanted.draft is not None:
        rows, tokens = wanted.draft
        draft = predict_step(costs, holders, routing, rows, station), tokens
    return _Option(costs, replicas, placement, holders, resident, station, step, draft)


def asked_holders(costs: Costs, held: Mapping[str, Sequence[UnitId]]) -> Index:
    """intp [layers, units], index of the device that the base station will ask for each unit.

    Args:
        costs: of the devices.
        held: units by device; each unit is held at least once.
    """
    names = [board.name for board in costs.boards]
    cost = dict(zip(names, costs.requests, strict=True))
    units = costs.shape.experts * costs.variant.slices
    holding: list[list[list[str]]] = [[[] for _ in range(units)] for _ in range(costs.shape.layers)]
    for name in names:
        for layer, unit in held[name]:
            holding[layer][unit].append(name)
    index = {name: i for i, name in enumerate(names)}
    return np.array([[index[name or ""] for name in assign(layer, cost)] for layer in holding], np.intp)


def _pairs(routing: Routing, shape: ModelShape) -> Float:
    """float64 [layers, experts, experts], tokens that are sent to both experts."""
    chosen = np.zeros((shape.layers, len(routing.draws(1)), shape.experts))
    np.put_along_axis(chosen, routing.draws(1)[:, :, 0].swapaxes(0, 1), 1.0, axis=-1)
    together: Float = chosen.swapaxes(1, 2) @ chosen
    return together


def _best(options: Sequence[_Option]) -> _Option:
    """The fastest; fewer slices if more do not gain `GAIN`."""
    best = options[0]
    for option in options[1:]:
        if option.decisive_ms < (1 - GAIN) * best.decisive_ms:
            best = option
    return best


def _describe(
    shape: ModelShape, boards: Sequence[Board], routing: Routing, wanted: Wanted, options: Sequence[_Option]
) -> FleetPlan:
    best = _best(options)
    cut, station = best.costs.variant, best.station
    quantisation = cut.quantisation
    next_copy = ""
    if best.replicas < wanted.replicas:
        next_copy = missing(shape, boards, variant(shape, quantisation, 1), best.replicas + 1)
    return FleetPlan(
        model=shape.name,
        quantisation=str(quantisation),
        slices=cut.slices,
        replicas=best.replicas,
        shared_air=wanted.shared_air,
        ms_per_token=1e3 * best.step.seconds,
        draft_ms_per_token=best.draft_ms,
        prompt_tokens=wanted.prompt_tokens,
        prompt_s=predict_prompt_s(best.costs, best.holders, routing, wanted.prompt_tokens, station),
        boards=[_board_plan(board, best.placement, cut) for board in boards],
        resident=format_selector(units_of(sorted(best.resident), cut.slices), cut.slices) if best.resident else "",
        resident_bytes=len(best.resident) * cut.slices * loaded_bytes(cut.unit_bytes, quantisation.scheme),
        options=[option.summary for option in options],
        more=list(_one_more(shape, boards, routing, wanted, best)),
        missing_for_next_copy=next_copy,
    )


def _board_plan(board: Board, placement: Placement, cut: Variant) -> BoardPlan:
    held = placement.experts[board.name]
    return BoardPlan(
        board.name, board.kind, format_selector(held, cut.slices) if held else "", len(held), board.fits(cut),
        board.ram_of(cut, len(held)), board.ram_bytes, placement.load[board.name],
    )  # fmt: skip


def _one_more(
    shape: ModelShape, boards: Sequence[Board], routing: Routing, wanted: Wanted, best: _Option
) -> Iterator[OneMore]:
    """For each kind of device in the fleet, the best plan with one more."""
    by_kind: dict[str, Board] = {}
    for board in boards:
        by_kind.setdefault(board.kind, board)
    for kind, board in by_kind.items():
        larger = [*boards, replace(board, name=f"one-more-{board.name}")]
        quantisation = best.costs.variant.quantisation
        options = list(_options(shape, larger, routing, wanted, quantisation, best.replicas))
        if not options:  # the greedy placement found no room for the last copies, although there is enough in all
            continue
        found, copies = _best(options), best.replicas
        if copies < wanted.replicas and any(_options(shape, larger, routing, wanted, quantisation, copies + 1)):
            copies += 1
        yield OneMore(kind, copies, found.costs.variant.slices, 1e3 * found.step.seconds, found.draft_ms)
