"""Makes units of a cell's rows: one answer, one batch of questions, one text, or one question.

Units are what the bootstrap resamples and what policies are compared on: unit (repetition, number) is the same work for
every policy.
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
"""Repetition, and number of the prompt, batch, text or item in the workload."""
TOKEN_SUMS = (
    "total_ns", "trunk_ns", "network_ns", "compute_ns", "wait_ns", "framing_ns", "pairs", "full_pairs",
    "down_bytes", "up_bytes", "probe_down_bytes", "probe_up_bytes", "step_tokens",
)  # fmt: skip


@dataclass(slots=True)
class Unit:
    """The sums of one unit, without the warm-up.

    Attributes:
        sums: sum of each column; `tokens` is the number of tokens (or steps, where nothing is generated).
        token_ns: float64 [tokens], time of each token.
        errors: float64 [requests], |predicted − measured| / measured round trip of each request with a prediction.
        ids: all generated tokens, including the first one.
    """

    sums: dict[str, float] = field(default_factory=dict)
    token_ns: Float = field(default_factory=lambda: np.empty(0))
    errors: Float = field(default_factory=lambda: np.empty(0))
    ids: tuple[int, ...] = ()


class Units:
    """Units of one kind, by key."""

    def __init__(self, units: dict[Key, Unit] | None = None) -> None:
        self._units = units if units is not None else {}

    def __len__(self) -> int:
        return len(self._units)

    def add(self, key: Key, unit: Unit) -> None:
        """Add a unit; the sums of another unit with the same key are added to it."""
        if known := self._units.get(key):
            for name, value in unit.sums.items():
                known.sums[name] = known.sums.get(name, 0.0) + value
        else:
            self._units[key] = unit

    @property
    def keys(self) -> list[Key]:
        """Keys in ascending order, which is the order of all values below."""
        return sorted(self._units)

    def only(self, keys: Sequence[Key]) -> "Units":
        """The units with the given keys."""
        return Units({key: self._units[key] for key in keys})

    def sum(self, column: str) -> Float:
        """Sum of a column by unit, float64 [units]; zero for units without such rows."""
        return np.array([self._units[key].sums.get(column, 0.0) for key in self.keys])

    def has(self, column: str) -> bool:
        """Whether the column is non-zero for any unit."""
        return any(unit.sums.get(column) for unit in self._units.values())

    def token_ns(self) -> list[Float]:
        """Time of each token in ns, one array per unit."""
        return [self._units[key].token_ns for key in self.keys]

    def errors(self) -> list[Float]:
        """Relative error of each predicted round trip, one array per unit."""
        return [self._units[key].errors for key in self.keys]

    def ids(self) -> list[tuple[int, ...]]:
        """Generated token ids, one tuple per unit."""
        return [self._units[key].ids for key in self.keys]


def step_units(rows: CellRows) -> list[tuple[Key, Unit]]:
    """Units with times: the answers of a cell that generates, without their first tokens; else its batches or texts."""
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
    # Earlier runs lack some columns.
    columns |= {name: add_up(tokens, np.nan_to_num(numbers(tokens, name))) for name in TOKEN_SUMS}
    counted = np.isfinite(numbers(tokens, "probe_down_bytes"))
    columns["probe_counted_tokens"] = add_up(tokens, counted * np.nan_to_num(numbers(tokens, "step_tokens")))
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
    texts = (
        _split(all_ := _without_warm_up(rows.table("tokens")), ids, numbers(all_, "token_id"))
        if generated
        else [()] * count
    )
    return [
        (
            (rows.cell.repetition, order[i] if generated else int(ids[i])),
            Unit({name: float(c[i]) for name, c in columns.items()}, token_ns[i], errors[i], tuple(map(int, texts[i]))),
        )
        for i in range(count)
    ]


def item_units(rows: CellRows) -> list[tuple[Key, Unit]]:
    """Units with results: the questions or texts of a cell that doesn't generate.

    Repetitions of an item have the same key, because they are the same question.
    """
    choices, losses = rows.table("choices"), rows.table("losses")
    units = [
        ((0, int(item)), Unit({"items": 1.0, "right": float(right)}))
        for item, right in zip(numbers(choices, "item"), numbers(choices, "right"), strict=True)
    ]
    words = rows.table("last_words")
    # A word counts as one prediction, whatever the number of its tokens, as in lm-evaluation-harness.
    units += [
        ((0, int(item)), Unit({"items": 1.0, "right": float(right), "loss_nats": loss, "predicted_tokens": 1.0}))
        for item, right, loss in zip(*(numbers(words, name) for name in ("item", "right", "loss_nats")), strict=True)
    ]
    columns = (numbers(losses, name) for name in ("item", "loss_nats", "tokens"))
    return units + [
        ((0, int(item)), Unit({"loss_nats": loss, "predicted_tokens": tokens}))
        for item, loss, tokens in zip(*columns, strict=True)
    ]


def _without_warm_up(table: pa.Table) -> pa.Table:
    return table.filter(pc.invert(table["warm_up"]))


def _measured(table: pa.Table, generated: bool) -> pa.Table:
    table = _without_warm_up(table)
    # An answer's first token includes its prompt and has a metric of its own.
    return table.filter(pc.greater(table["token"], 0)) if generated else table


def _split(table: pa.Table, ids: NDArray[np.int_], values: Float) -> list[Float]:
    """Values by answer, in the order of each answer's tokens."""
    answer = numbers(table, "answer")
    token = numbers(table, "token")
    order = np.lexsort((token, answer))
    return np.split(values[order], np.searchsorted(answer[order], ids[1:])) if len(ids) else []


def _prediction_errors(latency: pa.Table, ids: NDArray[np.int_]) -> list[Float]:
    predicted, took = numbers(latency, "predicted_ns"), numbers(latency, "round_trip_ns")
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = _split(latency, ids, np.abs(predicted - took) / took)
    return [e[np.isfinite(e)] for e in errors]
