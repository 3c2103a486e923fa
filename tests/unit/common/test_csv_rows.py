"""CSV files as they come: what is wrong is named by its line."""

from pathlib import Path

import pytest

from common.csv_rows import read_rows

COLUMNS = ("layer", "tokens")


def _read(path: Path) -> list[int]:
    found: list[int] = []
    read_rows(path, COLUMNS, lambda row: found.append(int(row["tokens"])))
    return found


def test_columns_may_be_in_any_order_and_more(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('tokens,ü,layer\n3,"a\nb",0\n4,,1\n', encoding="utf-8")
    assert _read(path) == [3, 4]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "line 1: it needs columns layer, tokens, and has no layer"),
        (b"layer,other\n1,2\n", "has no tokens"),
        (b"layer,tokens\n1,2\n1\n", "line 3: a value is missing"),
        (b"layer,tokens\n1,x\n", "line 2: invalid literal"),
        (b"layer,tokens\n1," + b"9" * 5000 + b"\n", "line 2: Exceeds the limit"),
        (b"layer,tokens\n1,inf\n", "line 2: invalid literal"),
        (b'layer,tokens\n1,"' + b"x" * 200_000, "field larger than field limit"),
        (b"layer,tokens\n\xff\xfe,2\n", "not text in UTF-8"),
        (b"layer,tokens\n1,\x002\n", "line 2: "),
        (bytes(500), "line 1: "),
    ],
)
def test_damage_is_named_by_its_line(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        _read(path)
