"""What was measured of a fleet, from files: links and speeds of `wdmoe-bs links`, speeds of `wdmoe-node tune`."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from msgspec import Struct

from bs_coordinator.commands.place.files import read_output
from bs_coordinator.commands.place.options import parse_quantisation

if TYPE_CHECKING:
    from bs_coordinator.placement.boards import Board
    from bs_coordinator.placement.row_curve import RowCurve
    from bs_coordinator.placement.shapes import ModelShape, Variant
    from wire.manifest import Quantisation

_BATCH_ROWS = 16
"""Rows of a batch in a tuning file."""


class _Link(Struct, frozen=True):
    rtt_s: float
    rtt_std_s: float
    down_mbps: float
    down_std_mbps: float
    up_mbps: float
    up_std_mbps: float

    def __post_init__(self) -> None:
        if not (self.rtt_s >= 0 and self.down_mbps > 0 and self.up_mbps > 0):
            raise ValueError("a rate is not above 0, or a round trip negative")


class _Links(Struct, frozen=True):
    """What of each node in `wdmoe-bs links --json` is read."""

    node: str
    link: _Link
    fixed_s: float
    expert_s: float
    row_s: float
    requests: int


def with_measured_links(boards: "Iterable[Board]", path: Path, held: "Variant | None") -> "list[Board]":
    """The boards with links, and speeds where requests were timed, from the output of `wdmoe-bs links --json`.

    A round trip or a rate that is not known well enough stays as it is, stated or assumed.

    Args:
        held: the variant that nodes hold now; None if it is not known, then speeds are not taken over.

    Raises:
        StorageError: the file is not such an output.
    """
    measured = {one.node: one for one in read_output(path, list[_Links], "wdmoe-bs links --json")}
    found = []
    for board in boards:
        if one := measured.get(board.name):
            board = _with_measured_link(board, one.link)
            if held is not None and one.requests:
                rate = _rate(held.unit_bytes, one.expert_s + one.row_s, one.row_s)
                board = replace(board, node_s=one.fixed_s, byte_s={**board.byte_s, str(held.quantisation): rate})
        found.append(board)
    return found


def _with_measured_link(board: "Board", measured: _Link) -> "Board":
    from bs_coordinator.links.estimator import rate_known, rtt_known

    known = {}
    if rtt_known(measured.rtt_s, measured.rtt_std_s):
        known["rtt_s"] = measured.rtt_s
    if rate_known(measured.down_mbps, measured.down_std_mbps):
        known["down_mbps"] = measured.down_mbps
    if rate_known(measured.up_mbps, measured.up_std_mbps):
        known["up_mbps"] = measured.up_mbps
    return replace(board, link=board.link._replace(**known), link_assumed=board.link_assumed.difference(known))


def with_tuning(boards: "Iterable[Board]", tuned: Mapping[str, Path], shape: "ModelShape") -> "list[Board]":
    """The boards with the speeds of whole experts in tuning files of `wdmoe-node tune`, by node or kind of board.

    Raises:
        click.BadParameter: a file is missing, or names no board.
    """
    from bs_coordinator.placement.shapes import variant
    from edge_node.tuning.tuning_file import read_tuning

    boards = list(boards)
    for name, path in tuned.items():
        tuning = read_tuning(path)
        if tuning is None or not any(name in (board.name, board.kind) for board in boards):
            raise click.BadParameter(f"--tuned {name}={path}: no such tuning file, or no such board in this fleet")
        rates: dict[str, RowCurve] = {}
        usable = [trial for trial in tuning.trials if not trial.refused and trial.token_ms and trial.batch_ms]
        for trial in sorted(usable, key=lambda trial: -min(trial.token_ms)):
            quantisation = _quantisation(trial.quantisation)
            first_s = 1e-3 * min(trial.token_ms)
            further_s = (1e-3 * min(trial.batch_ms) - first_s) / (_BATCH_ROWS - 1)
            rates[trial.quantisation] = _rate(variant(shape, quantisation, 1).unit_bytes, first_s, further_s)
        boards = [replace(b, byte_s={**b.byte_s, **rates}) if name in (b.name, b.kind) else b for b in boards]
    return boards


def _rate(unit_bytes: int, first_s: float, further_s: float) -> "RowCurve":
    """Seconds per byte of a unit's files, by the rows that go through it."""
    from bs_coordinator.placement.row_curve import RowCurve

    return RowCurve.line(max(first_s, 0.0), max(further_s, 0.0)).scaled(1 / unit_bytes)


def _quantisation(name: str) -> "Quantisation":
    """How experts are stored that are named `int4 b32`; symmetric and calibrated weights are as fast as others."""
    scheme, *rest = name.split(" ")
    block = next((word[1:] for word in rest if word[1:].isdecimal()), "")
    found = parse_quantisation(scheme, block)
    return msgspec.structs.replace(found, w2_bits=8) if "w2-int8" in rest else found
