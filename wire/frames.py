"""The binary frames between base station and edge nodes: coding only, no I/O.

A frame is a fixed 48-byte little-endian header and a body whose length follows from the header alone. Every length is
checked against header and limits before a byte of the body is used; anything wrong raises `FrameError` with a reason
that can be counted. Three fields of the header mean different things in different kinds of frames:

    kind    tokens                hidden              deadline_ms
    WORK    rows of the tensor    values per row      time after arrival when the work need not be started any more
    RESULT  rows of the tensor    values per row      µs spent on loading experts (`NodeDurations.load_ns`)
    ERROR   bytes of the message  0                   0
    PING    bytes of the payload  bytes to reply      0
    PONG    bytes of the payload  0                   0

`docs/protocol.md` draws the layout.
"""

import enum
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from common.clock import SYSTEM_CLOCK, Clock
from wire.errors import FrameError, ResultContentError
from wire.frame_auth import TAG_BYTES, FrameAuthenticator
from wire.tensors import Array, WireDtype, all_finite

MAGIC = b"WDMo"
VERSION = 1

MAX_FRAME_BYTES = 2 << 20
"""Largest frame. Larger batches are cut by tokens into several requests (`max_tokens`)."""
TARGET_FRAME_BYTES = 512 << 10
"""Size at which batches are cut: large enough to amortise the header, small enough for TLS and for fair queues."""
MAX_TOKENS = 1 << 16
MAX_HIDDEN = 1 << 16
MAX_MESSAGE_BYTES = 512
MAX_PING_BYTES = 64 << 10

_HEADER = struct.Struct("<4sBBBBQQHHIIIHH")  # the fields of `_Header`
_TAGGED = 1  # flag: the frame ends with a tag
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size
_ROW = struct.Struct("<HHI")  # expert, zero, count
_FEW = 16
_DURATIONS = struct.Struct("<QQQQ")
_MOST_LOAD_US = 2**32 - 1
_MOST_NS = 2**60
"""Longest valid duration, 36 years: the sum of five such durations still fits the 64-bit integers of tables."""
RESULT_BYTES = HEADER_BYTES + _DURATIONS.size
"""Bytes of a result without its tensor."""
ROW_BYTES = 8
"""Bytes of a hidden state in a request's expert table: its index and gate weight."""


class Kind(enum.IntEnum):
    """Kind of a frame."""

    WORK = 1
    RESULT = 2
    ERROR = 3
    PING = 4
    PONG = 5


class Status(enum.IntEnum):
    """Why a node could not answer a request."""

    OK = 0
    UNKNOWN_EXPERT = 1
    WRONG_SHAPE = 2
    EXPIRED = 3
    NOT_FINITE = 4
    INTERNAL = 5


class _Header(NamedTuple):
    """The fields of a header as they are on the wire; the module's docstring says what depends on `kind`."""

    magic: bytes
    version: int
    kind: int
    dtype: int
    flags: int
    session: int
    request: int
    attempt: int
    layer: int
    tokens: int
    hidden: int
    deadline_ms: int
    experts: int
    status: int


class RequestId(NamedTuple):
    """Identifies a request, and in a reply the request that it answers.

    Attributes:
        session: random 64-bit number of one base station process.
        request: counts up within a session.
        attempt: always 0 in this version; reserved for repetitions of a request.
    """

    session: int
    request: int
    attempt: int = 0


class ExpertRows(NamedTuple):
    """Rows of a frame that go to one expert.

    Attributes:
        expert: index within the frame's layer; where experts are cut into slices, the unit's number (`wire.experts`).
        tokens: uint32 [n], rows of the frame's hidden states, each at most once.
        weights: float32 [n], gate weight of each of these rows.
    """

    expert: int
    tokens: NDArray[np.uint32]
    weights: Array


class WorkFrame(Struct, frozen=True):
    """Base station → node: hidden states, and which of the node's experts each goes to.

    Attributes:
        deadline_ms: time after arrival when the node need not start this work any more; 0 for no deadline.
        hidden: float32 [tokens, hidden].
        dtype: number format of `hidden` in the frame, and of the reply.
    """

    id: RequestId
    layer: int
    deadline_ms: int
    experts: Sequence[ExpertRows]
    hidden: Array
    dtype: WireDtype


class NodeDurations(Struct, frozen=True):
    """How a node spent its time on a request, by its own monotonic clock.

    Attributes:
        queue_ns: from arrival until decoding began.
        decode_ns: checking and decoding the frame.
        compute_ns: running experts.
        encode_ns: encoding the reply.
        load_ns: loading experts that the node does not keep in memory; whole microseconds on the wire.
    """

    queue_ns: int = 0
    decode_ns: int = 0
    compute_ns: int = 0
    encode_ns: int = 0
    load_ns: int = 0

    @property
    def total_ns(self) -> int:
        """Time from the request's arrival at the node to its answer."""
        return self.queue_ns + self.decode_ns + self.compute_ns + self.encode_ns + self.load_ns


_NO_TIME = NodeDurations()


class ResultFrame(Struct, frozen=True):
    """Node → base station: per token the sum over the node's experts of gate weight × expert output.

    Attributes:
        output: float32 [tokens, hidden]; a token that goes to none of them is zero.
    """

    id: RequestId
    layer: int
    output: Array
    dtype: WireDtype
    durations: NodeDurations


@dataclass(frozen=True, slots=True)
class ErrorFrame:
    """Node → base station: this request can't be answered."""

    id: RequestId
    layer: int
    status: Status
    message: str


@dataclass(frozen=True, slots=True)
class PingFrame:
    """Base station → node: answer at once with `reply_bytes` bytes.

    The sizes of both directions differ, so that their rates can be told apart.
    """

    id: RequestId
    payload: bytes = field(default=b"", repr=False)
    reply_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PongFrame:
    """Node → base station: answer to a ping."""

    id: RequestId
    payload: bytes = field(default=b"", repr=False)
    durations: NodeDurations = _NO_TIME


# A dictionary is several times as fast as calling the enumeration.
_KINDS = {int(kind): kind for kind in Kind}
_DTYPES = {int(dtype): dtype for dtype in WireDtype}
_STATUSES = {int(status): status for status in Status}

Frame = WorkFrame | ResultFrame | ErrorFrame | PingFrame | PongFrame
_E = TypeVar("_E", bound=enum.IntEnum)


def max_tokens(hidden: int, dtype: WireDtype) -> int:
    """Number of tokens with which a WORK frame reaches `TARGET_FRAME_BYTES`; at least 1."""
    return max(1, TARGET_FRAME_BYTES // (dtype.codec.row_bytes(hidden) + 16))


def encode(
    frame: Frame,
    *,
    began_ns: int | None = None,
    clock: Clock = SYSTEM_CLOCK,
    authenticator: FrameAuthenticator | None = None,
) -> bytes:
    """The bytes of a frame.

    Args:
        began_ns: for results, the `clock.perf_ns()` from which `durations.encode_ns` counts; what is measured
            replaces the value in `frame`, since the conversion ends only here.
        authenticator: appends a tag; no tag if None.

    Raises:
        FrameError: the frame is beyond a limit, and every receiver would refuse it.
    """
    status, layer, tokens, hidden, deadline_ms, n_experts = Status.OK, 0, 0, 0, 0, 0
    dtype = WireDtype.FP32
    body: list[bytes | memoryview]
    match frame:
        case WorkFrame():
            kind, layer, dtype, deadline_ms = Kind.WORK, frame.layer, frame.dtype, frame.deadline_ms
            tokens, hidden = frame.hidden.shape
            n_experts = len(frame.experts)
            body = [_ROW.pack(s.expert, 0, len(s.tokens)) for s in frame.experts]
            body += [s.tokens.astype("<u4", copy=False).tobytes() for s in frame.experts]
            body += [s.weights.astype("<f4", copy=False).tobytes() for s in frame.experts]
            body += dtype.codec.encode(frame.hidden)
        case ResultFrame():
            kind, layer, dtype = Kind.RESULT, frame.layer, frame.dtype
            tokens, hidden = frame.output.shape
            tensor = dtype.codec.encode(frame.output)
            d = frame.durations
            encode_ns = d.encode_ns if began_ns is None else clock.perf_ns() - began_ns
            deadline_ms = min(d.load_ns // 1000, _MOST_LOAD_US)
            body = [_DURATIONS.pack(d.queue_ns, d.decode_ns, d.compute_ns, encode_ns), *tensor]
        case ErrorFrame():
            kind, layer, status = Kind.ERROR, frame.layer, frame.status
            text = frame.message.encode()[:MAX_MESSAGE_BYTES]
            tokens, body = len(text), [text]
        case PingFrame():
            kind = Kind.PING
            tokens, hidden, body = len(frame.payload), frame.reply_bytes, [frame.payload]
        case PongFrame():
            kind, d = Kind.PONG, frame.durations
            tokens = len(frame.payload)
            body = [_DURATIONS.pack(d.queue_ns, d.decode_ns, d.compute_ns, d.encode_ns), frame.payload]
    _check_limits(kind, tokens, hidden)
    flags = 0 if authenticator is None else _TAGGED
    header = _HEADER.pack(
        MAGIC, VERSION, kind, dtype, flags, frame.id.session, frame.id.request, frame.id.attempt,
        layer, tokens, hidden, deadline_ms, n_experts, status,
    )  # fmt: skip
    crc = zlib.crc32(header)
    for part in body:
        crc = zlib.crc32(part, crc)
    parts = [header, _CRC.pack(crc), *body]
    if authenticator is not None:
        parts.append(authenticator.tag(parts))
    encoded = b"".join(parts)
    if len(encoded) > MAX_FRAME_BYTES:
        raise FrameError("limit", f"frame of {len(encoded)} bytes exceeds {MAX_FRAME_BYTES}")
    return encoded


def decode(data: bytes | bytearray, *, authenticator: FrameAuthenticator | None = None) -> Frame:
    """The frame in `data`.

    Args:
        authenticator: accept only frames with its tag; if None, only frames without a tag.

    Raises:
        FrameError: with reason `length`, `magic`, `version`, `flags`, `sealed`, `unsealed`, `forged`, `kind`,
            `dtype`, `limit`, `crc`, `table`, `status` or `not-finite`.
    """
    if not HEADER_BYTES <= len(data) <= MAX_FRAME_BYTES:
        raise FrameError("length", f"{len(data)} bytes are not a frame ({HEADER_BYTES} to {MAX_FRAME_BYTES})")
    h = _Header._make(_HEADER.unpack_from(data))
    if h.magic != MAGIC:
        raise FrameError("magic", "this is not a WDMoE frame")
    if h.version != VERSION:
        raise FrameError("version", f"frame version {h.version}, this side reads {VERSION}")
    end = _check_tag(data, h.flags, authenticator)
    kind = _member(_KINDS, h.kind, "kind")
    dtype = _member(_DTYPES, h.dtype, "dtype")
    status = _member(_STATUSES, h.status, "status")
    _check_limits(kind, h.tokens, h.hidden)
    body = memoryview(data)[HEADER_BYTES:end]
    (crc,) = _CRC.unpack_from(data, _HEADER.size)
    if zlib.crc32(body, zlib.crc32(memoryview(data)[: _HEADER.size])) != crc:
        raise FrameError("crc", "checksum does not match: bytes were changed on the way")
    id = RequestId(h.session, h.request, h.attempt)
    match kind:
        case Kind.WORK:
            experts, tensor = _expert_table(body, h.experts, h.tokens)
            x = _tensor(tensor, h.tokens, h.hidden, dtype)
            return WorkFrame(id, h.layer, h.deadline_ms, experts, x, dtype)
        case Kind.RESULT:
            try:
                return _result(id, h, body, dtype)
            except FrameError as error:
                raise ResultContentError(error.reason, str(error), id) from None
        case Kind.ERROR:
            _check_body(body, h.tokens)
            return ErrorFrame(id, h.layer, status, bytes(body).decode(errors="replace"))
        case Kind.PING:
            _check_body(body, h.tokens)
            return PingFrame(id, bytes(body), h.hidden)
        case Kind.PONG:
            _check_body(body, _DURATIONS.size + h.tokens)
            return PongFrame(id, bytes(body[_DURATIONS.size :]), _durations(body))


def _result(id: RequestId, h: _Header, body: memoryview, dtype: WireDtype) -> ResultFrame:
    if len(body) < _DURATIONS.size:
        raise FrameError("length", "result frame ends within its durations")
    x = _tensor(body[_DURATIONS.size :], h.tokens, h.hidden, dtype)
    return ResultFrame(id, h.layer, x, dtype, _durations(body, load_us=h.deadline_ms))


def _check_tag(data: bytes | bytearray, flags: int, authenticator: FrameAuthenticator | None) -> int:
    """Where the body ends. The tag is checked before anything else of the frame is used."""
    if flags & ~_TAGGED:
        raise FrameError("flags", f"unknown flags {flags:#x}")
    if not flags:
        if authenticator is not None:
            raise FrameError("unsealed", "the frame has no tag: give the sender its frame key")
        return len(data)
    if authenticator is None:
        raise FrameError("sealed", "the frame has a tag, but this side has no frame key to check it with")
    end = len(data) - TAG_BYTES
    if end < HEADER_BYTES:
        raise FrameError("length", "the frame ends within its tag")
    view = memoryview(data)
    authenticator.check(view[:end], view[end:])
    return end


def _member(members: dict[int, _E], value: int, reason: str) -> _E:
    found = members.get(value)
    if found is None:
        raise FrameError(reason, f"unknown {reason} {value}")
    return found


def _check_limits(kind: Kind, tokens: int, hidden: int) -> None:
    if kind in (Kind.WORK, Kind.RESULT):
        if not (1 <= tokens <= MAX_TOKENS and 1 <= hidden <= MAX_HIDDEN):
            raise FrameError("limit", f"a tensor of {tokens} × {hidden} is out of limits")
    elif tokens > (MAX_MESSAGE_BYTES if kind is Kind.ERROR else MAX_PING_BYTES):
        raise FrameError("limit", f"a {kind.name} frame can't carry {tokens} bytes")
    elif hidden > (MAX_PING_BYTES if kind is Kind.PING else 0):
        raise FrameError("limit", f"a {kind.name} frame can't ask for {hidden} bytes")


def _check_body(body: memoryview, expected: int) -> None:
    if len(body) != expected:
        raise FrameError("length", f"body has {len(body)} bytes, the header promises {expected}")


def _durations(body: memoryview, *, load_us: int = 0) -> NodeDurations:
    queue_ns, decode_ns, compute_ns, encode_ns = durations = _DURATIONS.unpack_from(body)
    if max(durations) > _MOST_NS:
        raise FrameError("limit", f"a duration of {max(durations)} ns is out of limits")
    return NodeDurations(queue_ns, decode_ns, compute_ns, encode_ns, 1000 * load_us)


def _tensor(body: memoryview, tokens: int, hidden: int, dtype: WireDtype) -> Array:
    _check_body(body, tokens * dtype.codec.row_bytes(hidden))
    x = dtype.codec.decode(body, tokens, hidden)
    if not all_finite(x):
        raise FrameError("not-finite", "the tensor holds NaN or infinity")
    return x


def _expert_table(body: memoryview, n: int, tokens: int) -> tuple[list[ExpertRows], memoryview]:
    table_bytes = n * _ROW.size
    if len(body) < table_bytes:
        raise FrameError("length", "work frame ends within its expert table")
    rows = list(_ROW.iter_unpack(body[:table_bytes]))
    if n == 0 or len({expert for expert, _, _ in rows}) != n or any(count > tokens for _, _, count in rows):
        raise FrameError("table", "the expert table is empty, repeats an expert or counts too many tokens")
    total = sum(count for _, _, count in rows)
    middle, end = table_bytes + 4 * total, table_bytes + 8 * total
    if len(body) < end:
        raise FrameError("length", "work frame ends within its token lists")
    index = np.frombuffer(body[table_bytes:middle], "<u4")
    weight = np.frombuffer(body[middle:end], "<f4")
    if _largest(index) >= tokens or not _all_finite(weight):
        raise FrameError("table", "a token index is out of range or a gate weight is not finite")
    experts, start = [], 0
    for expert, _, count in rows:
        stop = start + count
        experts.append(ExpertRows(expert, index[start:stop], weight[start:stop]))
        start = stop
    # Outputs are added by index, where numpy would silently drop all but one of a repeated row.
    if any(_repeats(s.tokens) for s in experts):
        raise FrameError("table", "a token is listed twice for one expert")
    return experts, body[end:]


# Of few values Python looks at each in a fraction of the time of a numpy call whose code has left the core's caches.


def _largest(index: NDArray[np.uint32]) -> int:
    return max(index.tolist(), default=0) if len(index) <= _FEW else int(index.max())


def _all_finite(weight: Array) -> bool:
    return all(map(math.isfinite, weight.tolist())) if len(weight) <= _FEW else bool(np.isfinite(weight).all())


def _repeats(index: NDArray[np.uint32]) -> bool:
    if len(index) < 2 or (index[1:] > index[:-1]).all():  # as a base station lists them
        return False
    return len(np.unique(index)) != len(index)
