"""Encoders: the codes of onnxruntime's own quantiser, and error bounds for any weights."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from exporter.expert.encoders import ChannelEncoder, make_encoder, matrix_parts
from wire.manifest import Quantisation, Scheme
from wire.tensors import Array

BLOCKWISE: tuple[Scheme, ...] = ("int4", "int8")


def encode(quantisation: Quantisation, weights: Array, slab: int | None = None) -> list[NDArray[Any]]:
    """Parts of a matrix that is fed in slabs of so many rows, in their manifest shapes."""
    encoder = make_encoder(quantisation, *weights.shape)
    step = slab or len(weights)
    streamed = [encoder.encode(weights[i : i + step]).tobytes() for i in range(0, len(weights), step)]
    given = [part.tobytes() for part in encoder.finish()]
    blobs = [b"".join(streamed), *given] if any(streamed) else given
    parts = matrix_parts(quantisation, *weights.shape)
    return [np.frombuffer(blob, part.dtype).reshape(part.shape) for blob, part in zip(blobs, parts, strict=True)]


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes, the low half of a byte first."""
    return packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def dequantise(quantisation: Quantisation, parts: list[NDArray[Any]], shape: tuple[int, int]) -> tuple[Array, Array]:
    """Weights [rows, columns] of blockwise parts, and the scale of each."""
    rows, columns = shape
    bits = 4 if quantisation.scheme == "int4" else 8
    codes = unpack(parts[0], bits).astype(np.float32)
    blocks = codes.shape[1]
    scales = parts[1].reshape(rows, blocks, 1)
    zeros: Any = 2 ** (bits - 1)
    if not quantisation.symmetric:
        zeros = unpack(parts[2].reshape(rows, -1), bits)[:, :blocks, None].astype(np.float32)
    weights = ((codes - zeros) * scales).reshape(rows, -1)[:, :columns]
    spread = np.broadcast_to(np.abs(scales), codes.shape).reshape(rows, -1)[:, :columns]
    return weights, spread


@pytest.mark.parametrize("columns", [576, 1536])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scheme", BLOCKWISE)
def test_codes_are_those_of_onnxruntime(scheme: Scheme, symmetric: bool, block: int, columns: int) -> None:
    from onnxruntime.capi import _pybind_state as native

    weights = np.random.default_rng(0).standard_normal((96, columns), np.float32)
    rows, blocks, bits = len(weights), -(-columns // block), 4 if scheme == "int4" else 8
    packed = np.zeros((rows, blocks, block * bits // 8), np.uint8)
    scales = np.zeros(rows * blocks, np.float32)
    zeros = np.zeros(rows * -(-blocks * bits // 8), np.uint8)
    quantise = native.quantize_matmul_4bits if bits == 4 else native.quantize_matmul_8bits
    quantise(packed, np.ascontiguousarray(weights.T), scales, zeros, block, rows, columns, symmetric)

    ours = encode(Quantisation(scheme=scheme, block=block, symmetric=symmetric), weights, slab=13)

    np.testing.assert_array_equal(ours[1], scales)
    if not symmetric:
        np.testing.assert_array_equal(ours[2], zeros)
    codes, theirs = (unpack(p, bits).reshape(rows, -1)[:, :columns].astype(int) for p in (ours[0], packed))
    # Ties may round either way.
    assert np.abs(codes - theirs).max() <= 1
    assert np.count_nonzero(codes != theirs) <= codes.size // 10_000


finite = st.floats(-1e4, 1e4, width=32)
matrices = st.tuples(st.integers(1, 5), st.integers(1, 150)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=finite)
)


@settings(deadline=None, max_examples=60)
@given(
    weights=matrices,
    scheme=st.sampled_from(BLOCKWISE),
    block=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    slab=st.integers(1, 5),
)
def test_block_error_is_bounded_by_the_scale(
    weights: Array, scheme: Scheme, block: int, symmetric: bool, slab: int
) -> None:
    quantisation = Quantisation(scheme=scheme, block=block, symmetric=symmetric)
    parts = encode(quantisation, weights, slab)
    restored, scale = dequantise(quantisation, parts, weights.shape)
    # Half a step; symmetric codes lack the step at the far end. The rest is fp32 rounding of the codes.
    steps = 1.001 if symmetric else 0.501
    tiny = np.float32(1e-36)
    assert (np.abs(restored - weights) <= steps * scale + tiny).all()
    for part, whole in zip(parts, encode(quantisation, weights), strict=True):
        np.testing.assert_array_equal(part, whole)


@settings(deadline=None, max_examples=60)
@given(weights=matrices, slab=st.integers(1, 5))
def test_channel_error_is_bounded_by_half_a_step(weights: Array, slab: int) -> None:
    codes, scales = encode(Quantisation(scheme="int8-dynamic"), weights, slab)
    assert codes.shape == weights.T.shape
    restored = codes.T * scales[:, None]
    assert (np.abs(restored - weights) <= 0.501 * scales[:, None] + np.float32(1e-36)).all()


def test_slab_larger_than_planned_is_refused() -> None:
    encoder = ChannelEncoder(4, 8)
    with pytest.raises(ValueError, match="slab of 9 rows"):
        encoder.encode(np.zeros((9, 8), np.float32))


def test_fp16_refuses_what_it_cannot_hold() -> None:
    encoder = make_encoder(Quantisation(scheme="fp16"), 1, 2)
    with pytest.raises(ValueError, match="does not fit into fp16"):
        encoder.encode(np.array([[1.0, 70000.0]], np.float32))
