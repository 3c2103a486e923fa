"""Reads arrays of known types from npz files without trusting them.

`numpy.load` allocates whatever a header claims, so a file of a few hundred bytes can ask for all of the memory.
"""

import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
from numpy.typing import NDArray

MAX_BYTES = 4 << 30
"""Most bytes of all arrays together; a trace of 100,000 tokens through 32 layers of 8 experts has 98 MiB."""
_MAX_FILE_BYTES = 4 << 30
_MAX_MEMBERS = 1000
_HEADER_ERRORS = (
    ValueError, TypeError, KeyError, IndexError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError,
)  # fmt: skip
"""What numpy raises for headers that are no header: it hands them to Python's parser."""


def read_arrays(
    path: Path, kinds: Mapping[str, tuple[str, int]], *, optional: Mapping[str, tuple[str, int]]
) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file, checked before memory is allocated for them.

    Args:
        path: the file.
        kinds: dtype and number of dimensions of each array, by name; other arrays of the file are not read.
        optional: the same, of arrays that may be missing.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no npz file, an array is missing, of another kind or damaged, or the arrays need more than
            `MAX_BYTES` or half of the free memory.
    """
    if not path.is_file():
        # Devices and pipes never end.
        raise ValueError("not a plain file") if path.exists() else FileNotFoundError(2, "No such file or directory")
    if (size := path.stat().st_size) > _MAX_FILE_BYTES:
        raise ValueError(f"{size >> 20} MiB long")
    try:
        with zipfile.ZipFile(path) as archive:
            if len(names := archive.namelist()) > _MAX_MEMBERS or len({*names}) < len(names):
                raise ValueError(f"it has {len(names)} members, more than {_MAX_MEMBERS} or some of the same name")
            kinds = {**kinds, **{name: kind for name, kind in optional.items() if f"{name}.npy" in names}}
            limit = min(MAX_BYTES, psutil.virtual_memory().available // 2)
            shapes: dict[str, tuple[int, ...]] = {}
            for name, (dtype, dimensions) in kinds.items():
                with _open(archive, name) as member:
                    shapes[name] = _shape(archive, name, member, np.dtype(dtype), dimensions)
                limit -= prod(shapes[name]) * np.dtype(dtype).itemsize
                if limit < 0:
                    raise ValueError(f"'{name}' claims the shape {list(shapes[name])}, too large for a trace")
            return {name: _read(archive, name, shapes[name], np.dtype(dtype)) for name, (dtype, _) in kinds.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError) as error:
        # RuntimeError: a member that needs a password.
        raise ValueError(str(error) or type(error).__name__) from None


def _open(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise ValueError(f"it has no array '{name}'") from None
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"'{name}' is compressed in another way than numpy does")
    return archive.open(info)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, "np.dtype[Any]"]:
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def _shape(
    archive: zipfile.ZipFile, name: str, member: IO[bytes], dtype: "np.dtype[Any]", dimensions: int
) -> tuple[int, ...]:
    """Shape of an array from its header, which the member's size agrees with."""
    try:
        shape, fortran, found = _header(member)
    except _HEADER_ERRORS as error:
        raise ValueError(f"'{name}' has no valid header: {_one_line(error)}") from None
    if found != dtype or len(shape) != dimensions or fortran or any(n < 0 for n in shape):
        raise ValueError(f"'{name}' is {found} {list(shape)}, expected {dtype} with {dimensions} dimensions")
    claimed, stored = prod(shape) * dtype.itemsize, archive.getinfo(f"{name}.npy").file_size - member.tell()
    if claimed != stored:
        raise ValueError(f"'{name}' claims the shape {list(shape)} of {claimed} bytes, the file has {stored}")
    return shape


def _read(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> NDArray[Any]:
    with _open(archive, name) as member:
        _header(member)
        data = bytearray(prod(shape) * dtype.itemsize)
        view, done = memoryview(data), 0
        # Past the last byte, so that the checksum is compared.
        while got := len(block := member.read(1 << 20)):
            if done + got > len(data):
                raise ValueError(f"'{name}' has more bytes than its shape")
            view[done : done + got] = block
            done += got
        if done < len(data):
            raise ValueError(f"'{name}' ends after {done} of {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
