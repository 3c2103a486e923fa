"""Triton kernels for up to 16 decoded tokens at once: drafts of a sequence, or tokens of several sequences.

Weights are read once for all tokens and multiplied on tensor cores. Everything else is as in `triton_kernels`, whose
kernels for attention, gate and sums take several tokens too.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# Kernels are written in Triton's language, which has no Python types.

import triton
import triton.language as tl

from bs_coordinator.trunk.triton_kernels import _rotated


@triton.jit
def normalise(x, norm, out, size, eps, block: tl.constexpr):
    """out = x's RMS norm, [tokens, size]; one program per token."""
    at = tl.arange(0, block)
    inside = at < size
    place = tl.program_id(0) * size + at
    value = tl.load(x + place, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide) / size + eps)
    scale = tl.load(norm + at, mask=inside, other=0.0)
    tl.store(out + place, (wide.to(value.dtype).to(tl.float32) * scale.to(tl.float32)).to(value.dtype), mask=inside)


@triton.jit
def project_rows(
    x, weights, scales, residual, out, count, rows, size,
    bits: tl.constexpr, added: tl.constexpr, tile_rows: tl.constexpr, block: tl.constexpr, tokens: tl.constexpr,
):  # fmt: skip
    """out [count, rows] = x [count, size] · weights [rows, size]ᵀ, plus `residual` if `added`.

    Args:
        weights, scales: as `triton_kernels.project` takes them, or for 4 bits `project_int4`.
        count: of tokens, at most `tokens`.
        bits: 16 or 32 for weights in the trunk's dtype.
        block: columns at a time; for 4 bits, bytes at a time.
    """
    row = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)
    known = row < rows
    token = tl.arange(0, tokens)
    counted = token < count
    dtype = x.dtype.element_ty
    total = tl.zeros([tile_rows, tokens], tl.float32)
    at = tl.arange(0, block)
    x_rows = x + token[None, :] * size
    if bits == 4:
        for start in range(0, size // 2, block):
            byte = start + at
            inside = byte < size // 2
            valid = known[:, None] & inside[None, :]
            tile = tl.load(weights + row[:, None] * (size // 2) + byte[None, :], mask=valid, other=0)
            place = 2 * (row[:, None] * (size // 32) + (byte // 16)[None, :])
            scale = tl.load(scales + place, mask=valid, other=0.0).to(tl.float32)
            offset = tl.load(scales + place + 1, mask=valid, other=0.0).to(tl.float32)
            low = (((tile & 15).to(tl.float32) - 8.0) * scale + offset).to(dtype)
            high = (((tile >> 4).to(tl.float32) - 8.0) * scale + offset).to(dtype)
            column = (byte // 16 * 32 + byte % 16)[:, None]
            wanted = inside[:, None] & counted[None, :]
            x_low = tl.load(x_rows + column, mask=wanted, other=0.0)
            x_high = tl.load(x_rows + column + 16, mask=wanted, other=0.0)
            total += tl.dot(low, x_low, input_precision="ieee")
            total += tl.dot(high, x_high, input_precision="ieee")
    else:
        for start in range(0, size, block):
            column = start + at
            inside = column < size
            tile = tl.load(
                weights + row[:, None] * size + column[None, :], mask=known[:, None] & inside[None, :], other=0.0
            )
            value = tl.load(x_rows + column[:, None], mask=inside[:, None] & counted[None, :], other=0.0)
            total += tl.dot(tile.to(dtype), value, input_precision="ieee")
        if bits == 8:
            total *= tl.load(scales + row, mask=known, other=0.0).to(tl.float32)[:, None]
    product = total.to(dtype)
    place = token[None, :] * rows + row[:, None]
    valid = known[:, None] & counted[None, :]
    if added:
        before = tl.load(residual + place, mask=valid, other=0.0)
        product = (before.to(tl.float32) + product.to(tl.float32)).to(dtype)
    tl.store(out + place, product.to(out.dtype.element_ty), mask=valid)


@triton.jit
def append(
    qkv, step, cosines, sines, layer, key_norm, eps,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, normed: tl.constexpr,
):  # fmt: skip
    """Append one head's key and value of each token to its sequence's slab. The arguments are those of `attend`."""
    head, token = tl.program_id(0), tl.program_id(1)
    qkv += token * (heads + 2 * kv_heads) * dim
    step += token * 8
    slab = tl.load(step).to(tl.pointer_type(qkv.dtype.element_ty))
    capacity = tl.load(step + 1)
    position = tl.load(step + 2)
    at = tl.arange(0, dim)
    cosine = tl.load(cosines + position * dim + at).to(tl.float32)
    sine = tl.load(sines + position * dim + at).to(tl.float32)
    key = _rotated(qkv, heads + head, at, at < dim, cosine, sine, key_norm, eps, dim, 0, normed)
    value = tl.load(qkv + (heads + kv_heads + head) * dim + at)
    tl.store(slab + (((layer * 2) * kv_heads + head) * capacity + position) * dim + at, key)
    tl.store(slab + (((layer * 2 + 1) * kv_heads + head) * capacity + position) * dim + at, value)
