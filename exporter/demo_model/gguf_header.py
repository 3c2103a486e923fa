"""Checks the header of a GGUF file before its reader walks through it: that one believes all numbers of elements.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type, where that is fixed."""
_MOST_FIELDS = 10_000
_MOST_TENSORS = 100_000
_MOST_ELEMENTS = 10_000_000
"""Largest arrays are those of a tokenizer's vocabulary and merges, below a million."""


def check_fields(path: Path) -> None:
    """Walk through the fields of a GGUF file without keeping anything.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no GGUF file, or a length is more than it can hold.
    """
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size
        if _read(file, 4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        _, tensors, fields = struct.unpack("<IQQ", _read(file, 20))
        if tensors > _MOST_TENSORS or fields > _MOST_FIELDS:
            raise ValueError(f"it claims {tensors} tensors and {fields} fields")
        for _ in range(fields):
            _skip_string(file, left)
            _skip_value(file, _number(file, "<I"), left)


def _skip_value(file: BinaryIO, kind: int, size: int) -> None:
    if kind == _STRING:
        _skip_string(file, size)
    elif kind == _ARRAY:
        of, count = struct.unpack("<IQ", _read(file, 12))
        if count > _MOST_ELEMENTS or of == _ARRAY:
            raise ValueError(f"it has an array of {'arrays' if of == _ARRAY else f'{count} values'}")
        if of == _STRING:
            for _ in range(count):
                _skip_string(file, size)
        else:
            _skip(file, count * _width(of), size)
    else:
        _skip(file, _width(kind), size)


def _width(kind: int) -> int:
    if kind not in _BYTES:
        raise ValueError(f"it has a value of the unknown type {kind}")
    return _BYTES[kind]


def _skip_string(file: BinaryIO, size: int) -> None:
    _skip(file, _number(file, "<Q"), size)


def _skip(file: BinaryIO, count: int, size: int) -> None:
    if count > size - file.tell():
        raise ValueError(f"a value of {count} bytes goes past its end")
    file.seek(count, os.SEEK_CUR)


def _number(file: BinaryIO, form: str) -> int:
    (value,) = struct.unpack(form, _read(file, struct.calcsize(form)))
    return int(value)


def _read(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise ValueError("it ends inside its header")
    return data
