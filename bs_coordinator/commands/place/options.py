"""Values of the options of `wdmoe-bs place`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import click

from common.sizes import parse_bytes
from wire.topics import check_name

if TYPE_CHECKING:
    from wire.manifest import Quantisation

_SMALLEST_BYTES = 2**20
"""Less RAM than this was meant in another unit."""
_MOST_BOARDS = 256
_BLOCKS = ("16", "32", "64", "128", "256")


def parse_nodes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, tuple[int, float]]:
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


class StatedLink(NamedTuple):
    """A value of `--link`: `name` is a node or a kind of board; empty for all."""

    name: str
    mbps: float
    rtt_ms: float


def parse_boards(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Kind by node name, from `KIND`, `KIND*COUNT` or `NAME=KIND` each."""
    from bs_coordinator.placement.boards import KINDS

    found: dict[str, str] = {}
    for value in values:
        name, _, rest = value.rpartition("=")
        kind, star, count = rest.partition("*")
        if kind not in KINDS:
            raise click.BadParameter(f"'{kind}' is not a kind of board: choose from {', '.join(KINDS)}")
        if star and (name or not count.isdecimal() or not 1 <= int(count) <= _MOST_BOARDS):
            raise click.BadParameter(f"'{value}': write {kind}*8 for eight boards, or NAME={kind} for one with a name")
        first = 1 + sum(other == kind for other in found.values())
        names = [name] if name else [f"{kind}-{first + i}" for i in range(int(count or 1))]
        for one in names:
            try:
                check_name("node id", one)
            except ValueError as error:
                raise click.BadParameter(f"'{value}': {error}") from None
            if one in found:
                raise click.BadParameter(f"'{one}' is given twice")
            found[one] = kind
    if len(found) > _MOST_BOARDS:
        raise click.BadParameter(f"{len(found)} boards: at most {_MOST_BOARDS}")
    return found


def parse_links(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[StatedLink]:
    """Links from `MBPS,MS` or `NAME=MBPS,MS` each."""
    found = []
    for value in values:
        name, _, facts = value.rpartition("=")
        mbps, _, ms = facts.partition(",")
        try:
            link = StatedLink(name, float(mbps), float(ms))
        except ValueError:
            raise click.BadParameter(f"'{value}' is not [NAME=]MBPS,MS, such as 100,2") from None
        if not (0 < link.mbps < math.inf and 0 <= link.rtt_ms < math.inf):
            raise click.BadParameter(f"'{value}': the rate must be above 0 and the round trip not negative")
        found.append(link)
    return found


def parse_quantisations(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> "tuple[Quantisation, ...]":
    """Quantisations from `SCHEME` or `SCHEME:BLOCK` each."""
    try:
        return tuple(parse_quantisation(*value.partition(":")[::2]) for value in values)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def parse_quantisation(scheme: str, block: str) -> "Quantisation":
    """The exporter's quantisation of a scheme, with blocks of 32 if `block` is empty and the scheme has blocks.

    Raises:
        ValueError: there is no such quantisation.
    """
    from wire.manifest import Quantisation, Scheme

    for known in get_args(Scheme):
        blockwise = known in ("int4", "int8")
        if scheme == known and (not block or (blockwise and block in _BLOCKS)):
            return Quantisation(scheme=known, block=int(block or 32) if blockwise else 0)
    wrong = f"{scheme}:{block}" if block else scheme
    raise ValueError(f"'{wrong}' is not a quantisation: write int4, int4:128, int8, int8-dynamic, fp16 or fp32")


def parse_draft(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, float] | None:
    """Rows and tokens per step, from `ROWS,TOKENS`."""
    if value is None:
        return None
    rows, _, tokens = value.partition(",")
    try:
        found = int(rows), float(tokens)
    except ValueError:
        found = 0, 0.0
    if not 1 <= found[0] <= 64 or not 1 <= found[1] <= found[0]:
        raise click.BadParameter(f"'{value}' is not ROWS,TOKENS with 1 ≤ TOKENS ≤ ROWS ≤ 64, such as 5,3.2")
    return found


def parse_tuned(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """Tuning file by node or kind of board, from `NAME=FILE` each."""
    found = dict(value.partition("=")[::2] for value in values)
    if not all(name and path for name, path in found.items()):
        raise click.BadParameter("write NAME=FILE, such as pi5-8g=tuned.json")
    return {name: Path(path) for name, path in found.items()}


def parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int:
    """Bytes from a size such as `2G`; 0 if none is given."""
    try:
        return parse_bytes(value) if value is not None else 0
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
