"""Safetensors files as named byte ranges: checked headers, reading by slab, writing by stream.

The format is eight bytes of little-endian header length, a JSON header, then the tensors back to back.
Our own reader, because every offset must be checked before a byte is used, and because an expert is read
in slabs of a megabyte instead of being mapped whole.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from common.jsonl import strict_json
from exporter.checkpoint.source_file import POINTER_BYTES, check_pointer
from exporter.errors import CheckpointError

# The limit of the reference implementation: a longer header is not a safetensors file.
MAX_HEADER_BYTES = 100_000_000
COPY_BYTES = 1 << 20
_FORGET_BYTES = 8 << 20
_MAX_OFFSET = 1 << 63

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class TensorRef:
    """The place of one tensor in a file.

    Attributes:
        file: the safetensors file.
        dtype: number format as safetensors writes it, such as `BF16` or `F32`.
        offset: of the first byte, from the start of the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class SafetensorsFile:
    """A file whose header is valid.

    Attributes:
        header_sha256: hash of the JSON header's bytes.
    """

    path: Path
    tensors: dict[str, TensorRef]
    header_sha256: str


def read_header(path: Path) -> SafetensorsFile:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = _read_raw_header(file, path, size)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from None
    try:
        header = strict_json(raw)  # of a tensor that is named twice, readers would take different ones
    except ValueError as error:
        raise CheckpointError(f"{path} is not a safetensors file (its header is not JSON: {error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file (its header is not an object)")
    header.pop("__metadata__", None)
    data_start = 8 + len(raw)
    tensors: dict[str, TensorRef] = {}
    for name, entry in header.items():
        tensors[name] = _tensor(path, name, entry, data_start)
    _check_extents(path, tensors.values(), data_start, size)
    return SafetensorsFile(path, tensors, hashlib.sha256(raw).hexdigest())


def _read_raw_header(file: BinaryIO, path: Path, size: int) -> bytes:
    check_pointer(path, file.read(POINTER_BYTES))
    file.seek(0)
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(
            f"{path} is truncated: {size} bytes are too few for a safetensors file, download it again"
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} is not a safetensors file (header of {length} bytes)")
    raw = file.read(length)
    if len(raw) < length:
        raise CheckpointError(f"{path} is truncated inside its header: download it again")
    return raw


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorRef:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: tensor '{name}' has a malformed header entry") from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: tensor '{name}' has the unknown type {dtype!r}")
    numbers = (*shape, begin, end)
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < _MAX_OFFSET for n in numbers):
        raise CheckpointError(f"{path}: tensor '{name}' has an impossible shape or offset")
    ref = TensorRef(name, path, dtype, shape, data_start + begin)
    if end - begin != ref.bytes:
        raise CheckpointError(
            f"{path}: tensor '{name}' {list(shape)} {dtype} needs {ref.bytes} bytes, its header gives {end - begin}"
        )
    return ref


def _check_extents(path: Path, tensors: Iterable[TensorRef], data_start: int, size: int) -> None:
    end = data_start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.bytes)):
        if tensor.offset != end:
            raise CheckpointError(f"{path}: tensor '{tensor.name}' overlaps its neighbour or leaves a gap")
        end += tensor.bytes
    if size < end:
        raise CheckpointError(f"{path} is truncated: {size} bytes instead of {end}, download it again")
    if size > end:
        raise CheckpointError(f"{path} has {size - end} bytes after its last tensor: it is damaged")


class TensorReader:
    """Reads byte ranges of tensors into given buffers; keeps one file open.

    What is read once is dropped from the page cache: a checkpoint can be larger than RAM, and would displace all else.
    Its pages are used again for what is read next, which costs less than new ones.

    Use as a context manager.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._fd = -1
        self._read_once = range(0)  # the latest bytes of the file that are read once
        self._forgotten = 0  # before this byte, they are dropped

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            self._forget()
            os.close(self._fd)
        self._fd, self._path, self._read_once = -1, None, range(0)

    def read_into(self, tensor: TensorRef, begin: int, buffer: memoryview, *, once: bool = False) -> None:
        """Fill `buffer` with the bytes of `tensor` from its byte `begin` on.

        Args:
            once: the bytes will not be read again.

        Raises:
            CheckpointError: the file ends too early, or can't be read.
        """
        try:
            if self._path != tensor.file:
                self._close()
                self._fd = os.open(tensor.file, os.O_RDONLY)
                self._path = tensor.file
            done = 0
            while done < len(buffer):
                got = os.preadv(self._fd, [buffer[done:]], tensor.offset + begin + done)
                if got == 0:
                    raise CheckpointError(f"{tensor.file} ended while it was read: download it again")
                done += got
        except OSError as error:
            raise CheckpointError(f"can't read {tensor.file}: {error.strerror}") from None
        if once:
            self._note_once(tensor.offset + begin, len(buffer))

    def _note_once(self, begin: int, length: int) -> None:
        if begin != self._read_once.stop:
            self._forget()
            self._read_once, self._forgotten = range(begin, begin), begin
        self._read_once = range(self._read_once.start, begin + length)
        if self._read_once.stop - self._forgotten >= _FORGET_BYTES:
            self._forget()

    def _forget(self) -> None:
        """Drop from the page cache what was read once.

        That is repeated from the first byte on, because the kernel keeps a group of pages (a folio, up to megabytes) of
        which a part is not to be dropped.
        """
        if self._read_once:
            with suppress(OSError):  # advice, which some file systems do not take
                os.posix_fadvise(self._fd, self._read_once.start, len(self._read_once), os.POSIX_FADV_DONTNEED)
        self._forgotten = self._read_once.stop

    def chunks(self, tensor: TensorRef) -> Iterator[memoryview]:
        """The tensor's bytes in order, in one reused buffer of at most `COPY_BYTES`.

        Raises:
            CheckpointError: the file ends too early, or can't be read.
        """
        buffer = memoryview(bytearray(min(COPY_BYTES, tensor.bytes)))
        for begin in range(0, tensor.bytes, COPY_BYTES):
            chunk = buffer[: min(COPY_BYTES, tensor.bytes - begin)]
            self.read_into(tensor, begin, chunk, once=True)
            yield chunk


def encode_header(tensors: Iterable[TensorRef]) -> bytes:
    """Length and JSON header of a new file that holds these tensors in this order.

    The metadata says `format: pt`, which transformers requires. It is padded with blanks so that
    the data starts at a multiple of eight bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.bytes],
        }
        end += tensor.bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
