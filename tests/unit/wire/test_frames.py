"""Frames: every valid frame decodes to what was encoded, and anything else is refused."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wire import frames, tensors
from wire.errors import FrameError
from wire.frames import (
    ErrorFrame,
    ExpertRows,
    NodeDurations,
    PingFrame,
    PongFrame,
    RequestId,
    ResultFrame,
    Status,
    WorkFrame,
)
from wire.tensors import WireDtype

request_ids = st.builds(RequestId, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**16 - 1))
finite = st.floats(-1000, 1000, width=32)


@st.composite
def work_frames(draw: st.DrawFn) -> WorkFrame:
    tokens, hidden = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    experts = draw(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=4, unique=True))
    slices = []
    for expert in experts:
        rows = draw(st.lists(st.integers(0, tokens - 1), max_size=tokens, unique=True))
        weights = draw(hnp.arrays(np.float32, len(rows), elements=finite))
        slices.append(ExpertRows(expert, np.array(rows, np.uint32), weights))
    return WorkFrame(
        id=draw(request_ids),
        layer=draw(st.integers(0, 2**16 - 1)),
        deadline_ms=draw(st.integers(0, 2**32 - 1)),
        experts=slices,
        hidden=draw(hnp.arrays(np.float32, (tokens, hidden), elements=finite)),
        dtype=draw(st.sampled_from(WireDtype)),
    )


@given(work_frames())
def test_work_comes_back_the_same(frame: WorkFrame) -> None:
    back = frames.decode(frames.encode(frame))
    assert isinstance(back, WorkFrame)
    assert (back.id, back.layer, back.deadline_ms, back.dtype) == (
        frame.id,
        frame.layer,
        frame.deadline_ms,
        frame.dtype,
    )
    assert [s.expert for s in back.experts] == [s.expert for s in frame.experts]
    for got, sent in zip(back.experts, frame.experts, strict=True):
        np.testing.assert_array_equal(got.tokens, sent.tokens)
        np.testing.assert_array_equal(got.weights, sent.weights)
    _assert_close(back.hidden, frame.hidden, frame.dtype)


@given(
    request_ids,
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2), elements=finite),
    st.sampled_from(WireDtype),
    st.lists(st.integers(0, 2**60), min_size=4, max_size=4),
)
def test_results_come_back_the_same(id: RequestId, output: tensors.Array, dtype: WireDtype, ns: list[int]) -> None:
    back = frames.decode(frames.encode(ResultFrame(id, 3, output, dtype, NodeDurations(*ns))))
    assert isinstance(back, ResultFrame)
    assert (back.id, back.layer, back.durations) == (id, 3, NodeDurations(*ns))
    _assert_close(back.output, output, dtype)


def _assert_close(got: tensors.Array, sent: tensors.Array, dtype: WireDtype) -> None:
    assert got.dtype == np.float32
    assert got.shape == sent.shape
    assert (np.abs(got - sent) <= dtype.codec.max_error(sent)).all()


@given(request_ids, st.binary(max_size=100), st.integers(0, 2**60), st.sampled_from(Status), st.text(max_size=100))
def test_small_frames_come_back_the_same(id: RequestId, payload: bytes, number: int, status: Status, text: str) -> None:
    ping = PingFrame(id, payload, number % (frames.MAX_PING_BYTES + 1))
    for frame in (ping, PongFrame(id, payload, NodeDurations(number, 1, 2, number))):
        assert frames.decode(frames.encode(frame)) == frame
    assert frames.decode(frames.encode(ErrorFrame(id, 7, status, text))) == ErrorFrame(id, 7, status, text)


@pytest.mark.parametrize(
    "frame",
    [
        PingFrame(RequestId(1, 2), bytes(frames.MAX_PING_BYTES + 1)),
        PingFrame(RequestId(1, 2), reply_bytes=frames.MAX_PING_BYTES + 1),
        PongFrame(RequestId(1, 2), bytes(frames.MAX_PING_BYTES + 1)),
    ],
    ids=["long ping", "greedy ping", "long pong"],
)
def test_pings_are_bounded(frame: PingFrame | PongFrame) -> None:
    with pytest.raises(FrameError, match="can't"):
        frames.encode(frame)


@given(work_frames(), st.data())
def test_every_flipped_bit_is_noticed(frame: WorkFrame, data: st.DataObject) -> None:
    encoded = bytearray(frames.encode(frame))
    bit = data.draw(st.integers(0, 8 * len(encoded) - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        frames.decode(encoded)


@given(work_frames(), st.data())
def test_every_truncation_is_noticed(frame: WorkFrame, data: st.DataObject) -> None:
    encoded = frames.encode(frame)
    with pytest.raises(FrameError):
        frames.decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@given(st.binary(max_size=300))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(FrameError):
        frames.decode(garbage)


@given(st.binary(min_size=frames.HEADER_BYTES, max_size=400), st.sampled_from([1, 2, 3, 4, 5]))
def test_invalid_contents_with_a_valid_checksum_are_refused(body: bytes, kind: int) -> None:
    """A hostile sender can make the checksum right: whatever it claims, decode answers or refuses."""
    lie = bytearray(body)
    lie[:8] = struct.pack("<4sBBBx", frames.MAGIC, frames.VERSION, kind, lie[6] % 3)
    lie[44:48] = struct.pack("<I", zlib.crc32(lie[48:], zlib.crc32(lie[:44])))
    try:
        frames.decode(lie)
    except FrameError as error:
        assert error.reason  # noqa: PT017 - not raising is fine too


def _work(**changes: object) -> WorkFrame:
    fields: dict[str, object] = {
        "id": RequestId(1, 2),
        "layer": 0,
        "deadline_ms": 0,
        "experts": [ExpertRows(0, np.array([0], np.uint32), np.array([1.0], np.float32))],
        "hidden": np.ones((2, 4), np.float32),
        "dtype": WireDtype.FP32,
    }
    return WorkFrame(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"experts": []}, "table"),
        ({"experts": [ExpertRows(0, np.array([5], np.uint32), np.ones(1, np.float32))]}, "table"),
        ({"experts": [ExpertRows(0, np.array([1, 1], np.uint32), np.ones(2, np.float32))]}, "table"),
        ({"experts": [ExpertRows(0, np.array([1], np.uint32), np.array([np.nan], np.float32))]}, "table"),
        ({"experts": [ExpertRows(3, np.array([1], np.uint32), np.ones(1, np.float32))] * 2}, "table"),
        ({"hidden": np.full((2, 4), np.nan, np.float32)}, "not-finite"),
        ({"hidden": np.full((2, 4), 1e6, np.float32), "dtype": WireDtype.FP16}, "not-finite"),
    ],
)
def test_inconsistent_work_frames_are_refused(changes: dict[str, object], reason: str) -> None:
    encoded = frames.encode(_work(**changes))
    with pytest.raises(FrameError) as caught:
        frames.decode(encoded)
    assert caught.value.reason == reason


def test_another_version_is_named() -> None:
    encoded = bytearray(frames.encode(_work()))
    encoded[4] = 9
    with pytest.raises(FrameError, match="version 9"):
        frames.decode(encoded)


def test_frames_stay_within_their_target() -> None:
    for hidden in (64, 576, 4096):
        for dtype in WireDtype:
            n = frames.max_tokens(hidden, dtype)
            rows = np.arange(n, dtype=np.uint32)
            everything = [ExpertRows(e, rows, np.ones(n, np.float32)) for e in range(2)]
            size = len(frames.encode(_work(hidden=np.zeros((n, hidden), np.float32), experts=everything, dtype=dtype)))
            assert size <= frames.TARGET_FRAME_BYTES + 1024


def test_a_frame_over_the_limit_is_not_sent() -> None:
    with pytest.raises(FrameError, match="exceeds"):
        frames.encode(_work(hidden=np.zeros((1 << 10, 1 << 10), np.float32)))
