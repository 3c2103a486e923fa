"""JSON Lines as crashes leave them."""

import json
from pathlib import Path

import pytest

from common.jsonl import JsonLinesError, decode_json, read_json_lines


def test_a_cut_line_is_skipped_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n\n{"a": 2}\n{"a')
    assert [*read_json_lines(path, json.loads, skip_cut=True)] == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert [*read_json_lines(path, json.loads)] == [{"a": 1}, {"a": 2}]
    path.write_bytes(b"")
    assert [*read_json_lines(path, json.loads)] == []


def test_every_beginning_of_a_line_is_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for whole in ('{"e": "a \\" \\\\ \\u20ac", "n": [-1.5e-07, {"b": null}], "t": true}', '{"e": "zwölf Ω"}'):
        line = whole.encode()
        for end in range(1, len(line)):
            for rest in (b"", b"\n", b"\0" * 9, b"\0\0\n"):
                path.write_bytes(b"1\n" + line[:end] + rest + b"\n2\n")
                assert [*read_json_lines(path, json.loads, skip_cut=True)] == [1, 2], line[:end]


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe\x80",
        b'{"a": 1} }',
        b'{"a": 1}\0{',
        b"[" * 100_000,
        b'{"n": ' + b"7" * 5000 + b"}",
        b"{'a'",
        b'"\\ud800"',
    ],
)
def test_damage_that_is_no_cut_is_an_error(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"1\n" + damage + b"\n3\n")
    with pytest.raises(JsonLinesError, match=r"x\.jsonl, line 2: [^\n]+$"):
        list(read_json_lines(path, lambda line: decode_json(line, object), skip_cut=True))


@pytest.mark.parametrize("damage", [b"{", b"\xff", b"1 2"])
def test_errors_name_file_and_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"1\n\n" + damage + b"\n3\n")
    with pytest.raises(JsonLinesError, match=r"x\.jsonl, line 3: "):
        list(read_json_lines(path, json.loads))


def test_a_line_that_is_too_long_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"1\n" + b" " * 50 + b"2\n3\n")
    with pytest.raises(JsonLinesError, match="line 2: longer than 20 bytes"):
        list(read_json_lines(path, json.loads, max_line_bytes=20))
    path.write_bytes(b"1" * 20 + b"\n2\n")
    assert [*read_json_lines(path, json.loads, max_line_bytes=20)] == [int("1" * 20), 2]
