"""The boards of a fleet as stated on the command line or as `wdmoe-bs nodes` shows them, with their stated links."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec import Struct

from bs_coordinator.commands.place.files import read_output
from bs_coordinator.commands.place.options import StatedLink
from bs_coordinator.errors import PlacementError
from wire.status import NodeStatus

if TYPE_CHECKING:
    from bs_coordinator.placement.boards import Board, BoardKind, BoardLink

DEFAULT_LINK = (100.0, 2.0)
"""Mbit/s and ms of links that were neither measured nor stated."""
_LINK = frozenset({"rtt_s", "down_mbps", "up_mbps"})
"""All of a link, of a board that no measurement or statement is known of."""


class _Nodes(Struct, frozen=True):
    """What of `wdmoe-bs nodes --json` is read."""

    nodes: list[NodeStatus]


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
    for status in read_output(path, _Nodes, "wdmoe-bs nodes --json").nodes:
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


def _link(mbps: float, rtt_ms: float) -> "BoardLink":
    """A stated link: its round trip is that of a ping, without the broker."""
    from bs_coordinator.placement.boards import BROKER_S, BoardLink

    return BoardLink(1e-3 * rtt_ms + BROKER_S, mbps, mbps)


def _kind(status: NodeStatus, ram_bytes: int) -> "tuple[str, BoardKind]":
    """The kind of a live node's board: of those with its profile's name the one nearest in RAM, else another device."""
    from bs_coordinator.placement.boards import KINDS, OTHER

    profile = status.device.profile if status.device else "device"
    alike = [name for name in KINDS if name.startswith(profile)]
    if not alike:
        return profile, OTHER
    name = min(alike, key=lambda name: abs(KINDS[name].ram_bytes - ram_bytes))
    return name, KINDS[name]
