"""How a table of a run is declared: each column once, with its type, its meaning and where its value comes from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Generic, TypeVar

import pyarrow as pa

INT, FLOAT, TEXT, BOOL = pa.int64(), pa.float64(), pa.string(), pa.bool_()
NAME = pa.dictionary(pa.int32(), pa.string())
"""Text of which a table has few different values."""
UNITS = {
    "ns": "ns", "us": "µs", "ms": "ms", "s": "s", "bytes": "bytes", "mbps": "Mbit/s", "dbm": "dBm", "mhz": "MHz",
    "ghz": "GHz", "celsius": "°C", "watts": "W", "volts": "V", "percent": "%", "ppm": "10⁻⁶", "nats": "nat",
}  # fmt: skip
"""The last part of a column's name says its unit; other columns are counts, names or truth values."""

Source = TypeVar("Source", contravariant=True)
Item = TypeVar("Item")


class Column(Generic[Source]):
    """One column of a table.

    Attributes:
        dtype: Arrow type.
        meaning: for people, in the data dictionary.
        value: takes the value from what a row is made of; None where it is unknown.
    """

    def __init__(
        self, name: str, dtype: pa.DataType, meaning: str, value: Callable[[Source], object] | None = None
    ) -> None:
        """Declare a column; without `value` it is the source's attribute of the same name."""
        self.name = name
        self.dtype = dtype
        self.meaning = meaning
        self.value: Callable[[Source], object] = value or attrgetter(name)

    @property
    def unit(self) -> str:
        """Unit of the values; empty for counts, names and truth values."""
        return UNITS.get(self.name.rpartition("_")[2], "")

    @property
    def metadata(self) -> dict[bytes, bytes]:
        """Metadata of the column's field in files."""
        return field_metadata(self.unit, self.meaning)


def field_metadata(unit: str, description: str) -> dict[bytes, bytes]:
    """Metadata of a field: its `unit`, if it has one, and its `description`."""
    return ({b"unit": unit.encode()} if unit else {}) | {b"description": description.encode()}


@dataclass(frozen=True)
class Table(Generic[Item]):
    """One table of a run.

    Attributes:
        rows: what one row stands for.
        columns: in the order of the file; new ones go to the end.
    """

    name: str
    rows: str
    columns: tuple[Column[Item], ...]

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the table's files."""
        return pa.schema([(column.name, column.dtype) for column in self.columns])

    def build(self, items: Iterable[Item]) -> pa.Table:
        """A table with one row per item."""
        items = list(items)
        arrays = [pa.array([column.value(item) for item in items], column.dtype) for column in self.columns]
        return pa.table(arrays, schema=self.schema)
