"""Whether the values of a cell's table are possible: a run may come from anyone, and a table's types say little.

Columns that a run of an older version doesn't have are not checked.
"""

import re

import pyarrow as pa
import pyarrow.compute as pc

from bs_coordinator.nodes.registry import LOCAL_NODE
from wire.topics import check_name

_COUNT_LIMIT = 1 << 53
"""Reports compute with float64, which has all whole numbers up to this one; in ns these are 104 days."""
_TIME_LIMIT = 1 << 62
"""Latest time in ns: the year 2116."""
_VALUE_LIMIT = 1e15
_MOST_NODES = 1024
_MOST_NETWORKS = 4096
_MOST_EXPERTS = 1 << 16
_EXPERTS = re.compile(r"[0-9]{1,5}(?: [0-9]{1,5})*")
_STEPS = ("answer", "token", "warm_up")
_ALWAYS = {
    "tokens": (*_STEPS, "total_ns", "began_unix_ns"),
    "layers": (*_STEPS, "step", "layer", "trunk_ns", "dispatch_ns"),
    "latency": (*_STEPS, "position", "layer", "node", "experts", "sent_unix_ns", "round_trip_ns", "network_ns"),
    "answers": ("answer", "prompt", "warm_up"),
    "choices": ("item", "right"),
    "last_words": ("item", "right"),
    "losses": ("item",),
    "telemetry": ("node",),
    "sensors": ("node",),
    "link_samples": ("unix_ns", "node", "kind", "quantity"),
}
"""Columns that are never empty, by table."""
_MAY_BE_NEGATIVE = frozenset({"answer", "prompt", "chosen", "framing_ns", "network_ns", "predicted_ns"})
"""Whole numbers of the tables in `_COUNTED` that may be below zero: of a warm-up, or a rest."""
_COUNTED = frozenset({"tokens", "layers", "latency", "answers", "choices", "last_words", "losses"})


def check_values(name: str, table: pa.Table) -> None:
    """Check the values of a table of a cell.

    Args:
        name: the table's name, as in `SCHEMAS`.
        table: with the types of `SCHEMAS`.

    Raises:
        ValueError: a value is impossible; the message names the column.
    """
    if not table.num_rows:
        return
    for column in table.column_names:
        try:
            _check_column(name, column, table[column])
        except ValueError as error:
            raise ValueError(f"column {column}: {error}") from None


def _check_column(name: str, column: str, values: pa.ChunkedArray) -> None:
    if values.null_count and column in _ALWAYS.get(name, ()):
        raise ValueError(f"{values.null_count} empty values, where none may be")
    if pa.types.is_integer(values.type):
        _check_counts(name, column, values)
    elif pa.types.is_floating(values.type) and column != "loss_nats":
        # The loss of a broken model is infinite; nothing else is.
        if pc.any(pc.greater(pc.abs(values), _VALUE_LIMIT)).as_py():
            raise ValueError(f"a value beyond {_VALUE_LIMIT:.0e}")
    elif column == "node":
        nodes = _different(values)
        if len(nodes) > _MOST_NODES:
            raise ValueError(f"{len(nodes)} different nodes, at most {_MOST_NODES} can join")
        for node in nodes:
            if node not in (None, LOCAL_NODE):
                check_name("node", node)
    elif column == "wifi_ssid":
        if len(networks := _different(values)) > _MOST_NETWORKS:
            raise ValueError(f"{len(networks)} different networks, at most {_MOST_NETWORKS} are believable")
    elif column == "experts":
        for found in _different(values):
            experts = found or ""
            if not _EXPERTS.fullmatch(experts) or max(map(int, experts.split())) >= _MOST_EXPERTS:
                raise ValueError(f"{experts[:40]!r} is not a list of experts")


def _check_counts(name: str, column: str, values: pa.ChunkedArray) -> None:
    ends = pc.min_max(values).as_py()
    least, most = ends["min"], ends["max"]
    if least is None:
        return
    if column.endswith(("unix_ns", "monotonic_ns")):
        if least < 0 or most > _TIME_LIMIT or most - least > _COUNT_LIMIT:
            raise ValueError("times that are negative, absurd or more than 104 days apart")
    elif max(-least, most) > _COUNT_LIMIT:
        raise ValueError(f"{least if -least > most else most} is too large to be counted with")
    elif least < 0 and name in _COUNTED and column not in _MAY_BE_NEGATIVE:
        raise ValueError(f"{least}, which must not be negative")


def _different(values: pa.ChunkedArray) -> list[str | None]:
    found: list[str | None] = pc.unique(values.unify_dictionaries()).to_pylist()
    return found
