"""Boards, links, models and measurements from files, for `wdmoe-bs place`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec
from msgspec import Struct

from bs_coordinator.commands.place_options import StatedLink, parse_quantisation
from bs_coordinator.errors import PlacementError
from common.csv_rows import read_rows
from common.errors import StorageError
from common.jsonl import decode_json
from wire.status import NodeStatus

if TYPE_CHECKING:
    from bs_coordinator.placement.boards import Board, BoardKind, BoardLink
    from bs_coordinator.placement.row_curve import RowCurve
    from bs_coordinator.placement.shapes import ModelShape, Variant
    from wire.manifest import Quantisation
    from wire.tensors import Array

DEFAULT_LINK = (100.0, 2.0)
"""Mbit/s and ms of links that were neither measured nor stated."""
_LINK = frozenset({"rtt_s", "down_mbps", "up_mbps"})
"""All of a link, of a board that no measurement or statement is known of."""
_MOST_TOKENS = 1 << 20
"""Tokens of a request in a latency.csv."""
_BATCH_ROWS = 16
"""Rows of a batch in a tuning file."""
T = TypeVar("T")


class _Nodes(Struct, frozen=True):
    """What of `wdmoe-bs nodes --json` is read."""

    nodes: list[NodeStatus]


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


def read_shape(model: str) -> "ModelShape":
    """The shape of a model by its name, its config.json, or the folder of it.

    Raises:
        StorageError: the file can't be read, or is not the config.json of a mixture of experts.
    """
    from bs_coordinator.placement.shapes import NAMED, shape_of_config

    if model in NAMED:
        return shape_of_config(model, NAMED[model])
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        return shape_of_config(path.resolve().parent.name, decode_json(path.read_bytes(), dict[str, Any]))
    except OSError as error:
        names = ", ".join(NAMED)
        raise StorageError(f"can't read {path}: {error.strerror}; --model takes {names} or a config.json") from None
    except ValueError as error:
        raise StorageError(f"{path}: {error}") from None
    except msgspec.DecodeError as error:
        raise StorageError(f"{path} is not a model's config.json: {error}") from None


def stated_boards(kinds: Mapping[str, str]) -> "list[Board]":
    """Boards of these kinds, by name, on the default link."""
    from bs_coordinator.placement.boards import KINDS, Board

    return [
        Board(
            name=name, kind=kind, facts=KINDS[kind], ram_bytes=KINDS[kind].ram_bytes, link=_link(*DEFAULT_LINK),
            link_assumed=_LINK,
        )
        for name, kind in kinds.items()
    ]  # fmt: skip


def live_boards(path: Path) -> "list[Board]":
    """Boards from the output of `wdmoe-bs nodes --json`: what their experts take now and what is free is for experts.

    Raises:
        PlacementError: no node is online.
        StorageError: the file is not such an output.
    """
    from bs_coordinator.placement.boards import Board
    from edge_node.experts.memory import RESIDENT_PER_FILE_BYTE

    boards = []
    for status in _read(path, _Nodes, "wdmoe-bs nodes --json").nodes:
        holding, machine = status.holding, status.machine
        if holding is None or machine is None:
            continue
        kind, facts = _kind(status, machine.ram_bytes)
        disk = machine.disk_free_bytes
        factors = {str(scheme): factor for scheme, factor in RESIDENT_PER_FILE_BYTE.items()}
        held_bytes = int(holding.resident_bytes / factors.get(holding.quantisation.split(" ")[0], 1.0))
        boards.append(
            Board(
                name=status.node, kind=kind, facts=facts, link=_link(*DEFAULT_LINK), link_assumed=_LINK,
                ram_bytes=holding.resident_bytes + machine.available_bytes,
                disk_bytes=None if disk is None else disk + held_bytes,
            )
        )  # fmt: skip
    if not boards:
        raise PlacementError(f"{path} names no node that is online")
    return boards


def with_links(boards: "Iterable[Board]", stated: Sequence[StatedLink]) -> "list[Board]":
    """The boards with their stated links; a later statement that fits a board wins.

    Raises:
        click.BadParameter: a link names no board.
    """
    boards = list(boards)
    for link in stated:
        if link.name and not any(link.name in (board.name, board.kind) for board in boards):
            raise click.BadParameter(f"--link {link.name}=… names no board and no kind of board in this fleet")
        found = _link(link.mbps, link.rtt_ms)
        boards = [
            replace(b, link=found, link_assumed=frozenset()) if link.name in ("", b.name, b.kind) else b for b in boards
        ]
    return boards


def with_measured_links(boards: "Iterable[Board]", path: Path, held: "Variant | None") -> "list[Board]":
    """The boards with links, and speeds where requests were timed, from the output of `wdmoe-bs links --json`.

    A round trip or a rate that is not known well enough stays as it is, stated or assumed.

    Args:
        held: the variant that nodes hold now; None if it is not known, then speeds are not taken over.

    Raises:
        StorageError: the file is not such an output.
    """
    measured = {one.node: one for one in _read(path, list[_Links], "wdmoe-bs links --json")}
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


def read_traffic(path: Path | None, layers: int, experts: int) -> "Array":
    """Hidden states asked of each expert, plus one so that none weighs zero: float32 [layers, experts].

    Args:
        path: latency.csv of a run; None for equal traffic.

    Raises:
        StorageError: the file can't be read, or is no latency.csv of a model of this size.
    """
    import numpy as np

    counts = np.ones((layers, experts))
    if path is None:
        return counts.astype(np.float32)

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
        raise StorageError(f"{path} is not a latency.csv of this model: {error}") from None
    return counts.astype(np.float32)


def _read(path: Path, kind: type[T], made_by: str) -> T:
    try:
        return decode_json(path.read_bytes(), kind)
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise StorageError(f"{path} is not the output of '{made_by}': {error}") from None


def _link(mbps: float, rtt_ms: float) -> "BoardLink":
    """A stated link: its round trip is that of a ping, without the broker."""
    from bs_coordinator.placement.boards import BROKER_S, BoardLink

    return BoardLink(1e-3 * rtt_ms + BROKER_S, mbps, mbps)


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


def _kind(status: NodeStatus, ram_bytes: int) -> "tuple[str, BoardKind]":
    """The kind of a live node's board: of those with its profile's name the one nearest in RAM, else another device."""
    from bs_coordinator.placement.boards import KINDS, OTHER

    profile = status.device.profile if status.device else "device"
    alike = [name for name in KINDS if name.startswith(profile)]
    if not alike:
        return profile, OTHER
    name = min(alike, key=lambda name: abs(KINDS[name].ram_bytes - ram_bytes))
    return name, KINDS[name]
