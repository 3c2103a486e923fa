"""Reading CSV files that may be damaged or of another kind."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path


def read_rows(path: Path, columns: Sequence[str], take: Callable[[dict[str, str]], None]) -> None:
    """Give each row of a CSV file with a header to `take`, as texts by column.

    Args:
        columns: columns that the file must have, and each row a value of.
        take: raises a ValueError or IndexError for a row that is wrong.

    Raises:
        ValueError: the file is no such CSV file; one line with the number of the line.
        OSError: the file can't be read.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise ValueError(f"it needs columns {', '.join(columns)}, and has no {missing[0]}")
            for row in reader:
                if any(row[name] is None for name in columns):
                    raise ValueError("a value is missing")
                take(row)
        except (ValueError, IndexError, csv.Error) as error:
            reason = "not text in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise ValueError(f"line {max(1, reader.line_num)}: {reason}") from None
