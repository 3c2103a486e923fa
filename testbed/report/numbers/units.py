"""From a cell's rows to its units: one answer, one batch of questions, one text, or one question.

A unit is what intervals draw and what policies are compared on: unit (repetition, number) of one policy is the
same work as that of another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from testbed.plan.schema import Generate
from testbed.run_directory.cell_rows import CellRows, numbers
from testbed.statistics import Float

Key = tuple[int, int]
"""Repetition, number of the prompt, batch, text or item in its workload."""
TOKEN_SUMS = (
    "total_ns", "trunk_ns", "network_ns", "compute_ns", "wait_ns", "framing_ns", "pairs", "full_pairs",
    "down_bytes", "up_bytes", "step_tokens",
)  # fmt: skip


@dataclass(slots=True)
class Unit:
    """What one unit adds up to; the tokens of the warm-up are left out everywhere.

    Attributes:
        sums: by column; `tokens` counts the tokens (steps, where nothing is generated) that the others are of.
        token_ns: of each of them.
        errors: |predicted − measured| / measured round trip of each request that has a prediction.
        ids: generated, the first one included.
    """

    sums: dict[str, float] = field(default_factory=dict)
    token_ns: Float = field(default_factory=lambda: np.empty(0))
    errors: Float = field(default_factory=lambda: np.empty(0))
    ids: tuple[int, ...] = ()


class Units:
    """Units of one kind by key."""

    def __init__(self, units: dict[Key, Unit] | None = None) -> None:
        self._units = units if units is not None else {}

    def __len__(self) -> int:
        return len(self._units)

    def add(self, key: Key, unit: Unit) -> None:
        """Put one in; what was measured again under the same key counts on top of it."""
        if known := self._units.get(key):
            for name, value in unit.sums.items():
                known.sums[name] = known.sums.get(name, 0.0) + value
        else:
            self._units[key] = unit

    @property
    def keys(self) -> list[Key]:
        """Sorted."""
        return sorted(self._units)

    def only(self, keys: Sequence[Key]) -> "Units":
        """Those with these keys."""
        return Units({key: self._units[key] for key in keys})

    def sum(self, column: str) -> Float:
        """float64 [units] in the order of `keys`; zero for a unit without such rows."""
        return np.array([self._units[key].sums.get(column, 0.0) for key in self.keys])

    def has(self, column: str) -> bool:
        """Whether any unit counts it."""
        return any(unit.sums.get(column) for unit in self._units.values())

    def token_ns(self) -> list[Float]:
        """Per unit."""
        return [self._units[key].token_ns for key in self.keys]

    def errors(self) -> list[Float]:
        """Per unit."""
        return [self._units[key].errors for key in self.keys]

    def ids(self) -> list[tuple[int, ...]]:
        """Per unit."""
        return [self._units[key].ids for key in self.keys]


def step_units(rows: CellRows) -> list[tuple[Key, Unit]]:
    """Answers of a cell that generates, with their tokens after the first; batches or texts of another, with
    their steps."""
    generated = isinstance(rows.workload, Generate)
    tokens, layers, latency = (_measured(rows.table(name), generated) for name in ("tokens", "layers", "latency"))
    answers = rows.table("answers")
    answers = answers.filter(pc.invert(answers["warm_up"]))
    ids = np.unique(numbers(answers if generated else tokens, "answer")).astype(int)
    count = len(ids)

    def add_up(table: pa.Table, values: Float | None = None) -> Float:
        of = np.searchsorted(ids, numbers(table, "answer"))
        return np.bincount(of, values, minlength=count).astype(float)

    columns = {"tokens": add_up(tokens), "layers": add_up(layers), "requests": add_up(latency)}
    columns |= {name: add_up(tokens, numbers(tokens, name)) for name in TOKEN_SUMS}
    predicted = numbers(layers, "predicted_ns")
    columns |= {
        "dispatch_ns": add_up(layers, numbers(layers, "dispatch_ns")),
        "predicted_ns": add_up(layers, np.nan_to_num(predicted)),
        "predicted_layers": add_up(layers, np.isfinite(predicted).astype(float)),
    }
    order = list(range(count))
    if generated:
        order = numbers(answers, "prompt")[np.argsort(numbers(answers, "answer"))].astype(int).tolist()
        columns |= {"answers": add_up(answers), "first_token_ns": add_up(answers, numbers(answers, "first_token_ns"))}
    token_ns = _split(tokens, ids, numbers(tokens, "total_ns"))
    errors = _prediction_errors(latency, ids)
    texts = _split(all_ := _warm(rows.table("tokens")), ids, numbers(all_, "token_id")) if generated else [()] * count
    return [
        (
            (rows.cell.repetition, order[i] if generated else int(ids[i])),
            Unit({name: float(c[i]) for name, c in columns.items()}, token_ns[i], errors[i], tuple(map(int, texts[i]))),
        )
        for i in range(count)
    ]


def item_units(rows: CellRows) -> list[tuple[Key, Unit]]:
    """Questions of a cell with multiple choice, or texts of one with losses. Repetitions of an item count as one
    unit: they are the same question."""
    choices, losses = rows.table("choices"), rows.table("losses")
    units = [
        ((0, int(item)), Unit({"items": 1.0, "right": float(right)}))
        for item, right in zip(numbers(choices, "item"), numbers(choices, "right"), strict=True)
    ]
    columns = (numbers(losses, name) for name in ("item", "loss_nats", "tokens"))
    return units + [
        ((0, int(item)), Unit({"loss_nats": loss, "predicted_tokens": tokens}))
        for item, loss, tokens in zip(*columns, strict=True)
    ]


def _warm(table: pa.Table) -> pa.Table:
    return table.filter(pc.invert(table["warm_up"]))


def _measured(table: pa.Table, generated: bool) -> pa.Table:
    table = _warm(table)
    # An answer's first token stands for its whole prompt, and has a figure of its own.
    return table.filter(pc.greater(table["token"], 0)) if generated else table


def _split(table: pa.Table, ids: NDArray[np.int_], values: Float) -> list[Float]:
    """Values by answer, each in the order of its tokens."""
    answer = numbers(table, "answer")
    token = numbers(table, "token")
    order = np.lexsort((token, answer))
    return np.split(values[order], np.searchsorted(answer[order], ids[1:])) if len(ids) else []


def _prediction_errors(latency: pa.Table, ids: NDArray[np.int_]) -> list[Float]:
    predicted, took = numbers(latency, "predicted_ns"), numbers(latency, "round_trip_ns")
    errors = _split(latency, ids, np.abs(predicted - took) / took)
    return [e[np.isfinite(e)] for e in errors]
