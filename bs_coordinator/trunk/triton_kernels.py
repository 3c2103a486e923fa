"""Triton kernels for decoded tokens: what a layer of the trunk computes between two dispatches.

Shapes are those of one token. Some kernels take several: the last axis of their grid counts tokens, and all arguments
that belong to a token have a leading axis for them. The products of several tokens are in `triton_rows`.

Rounding follows the eager modules: norms, projections, rotated heads and residuals are rounded to the trunk's dtype,
and sums are kept in fp32. A token reads every weight once, so the kernels are bound by memory bandwidth, and each is
shaped for many loads in flight. `next_*` are weights that a later kernel reads: they are prefetched into the L2 cache
while the memory would be idle.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# Kernels are written in Triton's language, which has no Python types.

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _await_previous(overlap: tl.constexpr):
    """With overlapping launches, the previous kernel's results may only be read after this."""
    if overlap:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _fetch(next_weights, next_elements, program, programs, block: tl.constexpr, overlap: tl.constexpr):
    """Prefetch weights into the L2 cache. Depends on no other kernel."""
    if overlap:
        gdc_launch_dependents()
    offsets = tl.arange(0, block)
    for start in range(program * block, next_elements, programs * block):
        # Volatile: the compiler would drop a load whose result is not used.
        tl.load(next_weights + start + offsets, mask=start + offsets < next_elements, volatile=True)


@triton.jit
def begin(step_host, step, table, hidden, size, block: tl.constexpr, overlap: tl.constexpr):
    """Copy the step's parameters to the GPU and look up the token's embedding.

    Args:
        step_host, step: int64 [8], pinned and on the GPU: address of the KV slab, its capacity, position, token, stamp;
            the others are not used.
        table: [vocab, size].
    """
    if overlap:
        gdc_launch_dependents()
    step_host += tl.program_id(1) * 8
    step += tl.program_id(1) * 8
    hidden += tl.program_id(1) * size
    fields = tl.arange(0, 8)
    if tl.program_id(0) == 0:
        tl.store(step + fields, tl.load(step_host + fields))
    token = tl.load(step_host + 3)
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(hidden + at, tl.load(table + token * size + at, mask=at < size), mask=at < size)


@triton.jit
def add_experts(residual, experts_host, hidden, size, block: tl.constexpr, overlap: tl.constexpr):
    """hidden = residual + the experts' output, fp32 [size], read from pinned memory."""
    if overlap:
        gdc_launch_dependents()
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < size
    at += tl.program_id(1) * size
    output = tl.load(experts_host + at, mask=inside).to(hidden.dtype.element_ty)
    before = tl.load(residual + at, mask=inside)
    tl.store(hidden + at, (before.to(tl.float32) + output.to(tl.float32)).to(before.dtype), mask=inside)


@triton.jit
def project(
    x, norm, weights, scales, residual, out, rows, size, eps,
    normed: tl.constexpr, added: tl.constexpr, scaled: tl.constexpr, tile_rows: tl.constexpr, tiles: tl.constexpr,
    block: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    """out [rows] = weights [rows, size] · x [size], with x's RMS norm if `normed`, plus `residual` if `added`.

    If `scaled`, weights are int8 with a scale per row.
    """
    at = tl.arange(0, block)
    inside = at < size
    row = tl.program_id(0) * (tile_rows * tiles) + tl.arange(0, tile_rows)
    # The first tile does not depend on the previous kernel: its loads are issued before the wait. Each weight is read
    # once per token, so it must not evict what was prefetched for the next kernel.
    tile = tl.load(
        weights + row[:, None] * size + at[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0,
        eviction_policy="evict_first",
    )  # fmt: skip
    _await_previous(overlap)
    value = tl.load(x + at, mask=inside, other=0.0)
    if normed:
        wide = value.to(tl.float32)
        wide = wide * tl.rsqrt(tl.sum(wide * wide) / size + eps)
        scale = tl.load(norm + at, mask=inside, other=0.0)
        value = (wide.to(value.dtype).to(tl.float32) * scale.to(tl.float32)).to(value.dtype)
    wide = value.to(tl.float32)
    for i in tl.static_range(tiles):
        if i > 0:
            row += tile_rows
            tile = tl.load(
                weights + row[:, None] * size + at[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
        product = tl.sum(tile.to(tl.float32) * wide[None, :], axis=1)
        if scaled:
            product *= tl.load(scales + row, mask=row < rows, other=0.0).to(tl.float32)
        product = product.to(value.dtype)
        if added:
            before = tl.load(residual + row, mask=row < rows)
            product = (before.to(tl.float32) + product.to(tl.float32)).to(product.dtype)
        tl.store(out + row, product.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def project_int4(
    x, norm, codes, scales, residual, out, rows, size, eps,
    normed: tl.constexpr, added: tl.constexpr, tile_rows: tl.constexpr, tiles: tl.constexpr,
    groups_block: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    """As `project`, for int4 weights.

    Args:
        codes: uint8 [rows, size / 2]: byte j of 16 holds weight j of a group of 32 in its low half, j + 16 in its high.
        scales: [rows, size / 32, 2], scale and offset of each group: weight = (code - 8) · scale + offset.
    """
    groups = size // 32
    group = tl.arange(0, groups_block)
    at = tl.arange(0, 16)
    inside = (group < groups)[:, None] & (at < 16)[None, :]
    byte = group[:, None] * 16 + at[None, :]
    column = group[:, None] * 32 + at[None, :]
    row = tl.program_id(0) * (tile_rows * tiles) + tl.arange(0, tile_rows)
    tile = tl.load(
        codes + row[:, None, None] * (size // 2) + byte[None, :, :],
        mask=(row < rows)[:, None, None] & inside[None, :, :], other=0, eviction_policy="evict_first",
    )  # fmt: skip
    _await_previous(overlap)
    low = tl.load(x + column, mask=inside, other=0.0)
    high = tl.load(x + column + 16, mask=inside, other=0.0)
    dtype = low.dtype
    if normed:
        wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
        shrink = tl.rsqrt((tl.sum(wide_low * wide_low) + tl.sum(wide_high * wide_high)) / size + eps)
        scale_low = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        scale_high = tl.load(norm + column + 16, mask=inside, other=0.0).to(tl.float32)
        low = ((wide_low * shrink).to(dtype).to(tl.float32) * scale_low).to(dtype)
        high = ((wide_high * shrink).to(dtype).to(tl.float32) * scale_high).to(dtype)
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    sums = tl.sum(wide_low + wide_high, axis=1)
    for i in tl.static_range(tiles):
        if i > 0:
            row += tile_rows
            tile = tl.load(
                codes + row[:, None, None] * (size // 2) + byte[None, :, :],
                mask=(row < rows)[:, None, None] & inside[None, :, :], other=0, eviction_policy="evict_first",
            )  # fmt: skip
        code_low = (tile & 15).to(tl.float32) - 8.0
        code_high = (tile >> 4).to(tl.float32) - 8.0
        part = tl.sum(code_low * wide_low[None, :, :] + code_high * wide_high[None, :, :], axis=2)
        place = 2 * (row[:, None] * groups + group[None, :])
        valid = (row < rows)[:, None] & (group < groups)[None, :]
        scale = tl.load(scales + place, mask=valid, other=0.0).to(tl.float32)
        offset = tl.load(scales + place + 1, mask=valid, other=0.0).to(tl.float32)
        product = tl.sum(part * scale + sums[None, :] * offset, axis=1).to(dtype)
        if added:
            before = tl.load(residual + row, mask=row < rows)
            product = (before.to(tl.float32) + product.to(tl.float32)).to(product.dtype)
        tl.store(out + row, product.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _rotated(
    heads, row, at, valid, cosine, sine, norm, eps, dim: tl.constexpr, axis: tl.constexpr, normed: tl.constexpr
):  # fmt: skip
    """Rotary embedding of heads [row, dim], after their RMS norm if `normed`, rounded as transformers rounds them.

    `axis` is that of a head's values.
    """
    plain = tl.load(heads + row * dim + at, mask=valid, other=0.0)
    other_at = (at + dim // 2) % dim
    other = tl.load(heads + row * dim + other_at, mask=valid, other=0.0)
    if normed:
        wide = plain.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=axis, keep_dims=True) / dim + eps)
        scaled = (wide * scale).to(plain.dtype).to(tl.float32)
        plain = (scaled * tl.load(norm + at).to(tl.float32)).to(plain.dtype)
        scaled = (other.to(tl.float32) * scale).to(other.dtype).to(tl.float32)
        other = (scaled * tl.load(norm + other_at).to(tl.float32)).to(other.dtype)
    turned = tl.where(at < dim // 2, -other.to(tl.float32), other.to(tl.float32))
    kept = (plain.to(tl.float32) * cosine).to(plain.dtype)
    turned = (turned * sine).to(plain.dtype)
    return (kept.to(tl.float32) + turned.to(tl.float32)).to(plain.dtype)


@triton.jit
def attend(
    qkv, step, cosines, sines, partial, partial_max, partial_sum, counters, out, layer, scale,
    next_weights, next_elements, query_norm, key_norm, eps,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, splits: tl.constexpr, block: tl.constexpr,
    group_block: tl.constexpr, overlap: tl.constexpr, normed: tl.constexpr, appended: tl.constexpr,
):  # fmt: skip
    """Attention of one new token, whose key and value are appended to the slab, unless they are there already.

    Each key-value head is split by position over `splits` programs; the last one to finish combines them.

    Args:
        qkv: [(heads + 2 kv_heads) · dim].
        step: the parameters that `begin` copies; the slab is [layers, 2, kv_heads, capacity, dim].
        cosines, sines: [positions, dim].
        partial: fp32 [kv_heads, splits, group_block, dim]; partial_max, partial_sum: without the last axis.
        counters: int32 [kv_heads], zero before and after.
        out: [heads · dim].
        scale: of the scores, times log2(e).
        query_norm, key_norm: [dim], weights of the RMS norms of each head's query and key, if `normed`.
        appended: whether the slab holds the new token's key and value (`triton_rows.append`).
    """
    head, split = tl.program_id(0), tl.program_id(1)
    qkv += tl.program_id(2) * (heads + 2 * kv_heads) * dim
    step += tl.program_id(2) * 8
    slot = tl.program_id(2) * kv_heads + head
    if split >= splits:
        program = (split - splits) * kv_heads + head
        _fetch(next_weights, next_elements, program, (tl.num_programs(1) - splits) * kv_heads, 4096, overlap)
    else:
        group: tl.constexpr = heads // kv_heads
        dtype = qkv.dtype.element_ty
        # Keys and values of earlier steps do not depend on the previous kernel: they are read before the wait.
        slab = tl.load(step).to(tl.pointer_type(dtype))
        capacity = tl.multiple_of(tl.load(step + 1), 16)
        position = tl.load(step + 2)
        keys = tl.multiple_of(slab + ((layer * 2) * kv_heads + head) * capacity * dim, 16)
        values = tl.multiple_of(slab + ((layer * 2 + 1) * kv_heads + head) * capacity * dim, 16)
        held = position + 1 if appended else position
        per_split = tl.cdiv(tl.cdiv(held, splits), block) * block
        start = split * per_split
        end = tl.minimum(start + per_split, held)
        at = tl.arange(0, dim)
        place = start + tl.arange(0, block)
        key_tile = tl.load(keys + place[:, None] * dim + at[None, :], mask=(place < end)[:, None], other=0.0)
        value_tile = tl.load(values + place[:, None] * dim + at[None, :], mask=(place < end)[:, None], other=0.0)
        cosine = tl.load(cosines + position * dim + at).to(tl.float32)
        sine = tl.load(sines + position * dim + at).to(tl.float32)
        _await_previous(overlap)

        member = tl.arange(0, group_block)
        in_group = (member < group)[:, None]
        query = _rotated(
            qkv, head * group + member[:, None], at[None, :], in_group, cosine[None, :], sine[None, :],
            query_norm, eps, dim, 1, normed,
        )  # fmt: skip

        if split == 0 and not appended:
            key = _rotated(qkv, heads + head, at, at < dim, cosine, sine, key_norm, eps, dim, 0, normed)
            value = tl.load(qkv + (heads + kv_heads + head) * dim + at)
            tl.store(keys + position * dim + at, key)
            tl.store(values + position * dim + at, value)
            highest = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scale
            total = tl.full([group_block], 1.0, tl.float32)
            mixed = tl.zeros([group_block, dim], tl.float32) + value.to(tl.float32)[None, :]
        else:
            highest = tl.full([group_block], float("-inf"), tl.float32)
            total = tl.zeros([group_block], tl.float32)
            mixed = tl.zeros([group_block, dim], tl.float32)

        for _first in range(start, end, block):
            score = tl.dot(query, tl.trans(key_tile), input_precision="ieee") * scale
            score = tl.where((place < end)[None, :], score, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(score, axis=1))
            shrink = tl.exp2(highest - new_highest)
            weight = tl.exp2(score - new_highest[:, None])
            total = total * shrink + tl.sum(weight, axis=1)
            mixed = mixed * shrink[:, None] + tl.dot(weight.to(dtype), value_tile, input_precision="ieee")
            highest = new_highest
            place += block
            key_tile = tl.load(keys + place[:, None] * dim + at[None, :], mask=(place < end)[:, None], other=0.0)
            value_tile = tl.load(values + place[:, None] * dim + at[None, :], mask=(place < end)[:, None], other=0.0)

        mine = (slot * splits + split) * group_block
        tl.store(partial + (mine + member[:, None]) * dim + at[None, :], mixed, mask=in_group)
        tl.store(partial_max + mine + member, highest)
        tl.store(partial_sum + mine + member, total)
        tl.debug_barrier()
        if tl.atomic_add(counters + slot, 1, sem="acq_rel") == splits - 1:
            tl.store(counters + slot, 0)
            _add_up(partial, partial_max, partial_sum, out, slot, group, dim, splits, group_block)


@triton.jit
def _add_up(
    partial, partial_max, partial_sum, out, head,
    group: tl.constexpr, dim: tl.constexpr, splits: tl.constexpr, group_block: tl.constexpr,
):  # fmt: skip
    """Combine the splits of a key-value head's attention, as `attend` left them."""
    # Many splits at a time, to overlap their loads, but no more than fit into registers.
    members: tl.constexpr = triton.next_power_of_2(group)
    together: tl.constexpr = max(1, min(splits, 8192 // (members * dim)))
    at = tl.arange(0, dim)
    member = tl.arange(0, members)
    in_group = member < group
    split = tl.arange(0, splits)
    every = (head * splits + split)[:, None] * group_block + member[None, :]
    # Bypass the L1 cache: other programs wrote these values.
    highs = tl.load(partial_max + every, cache_modifier=".cg")
    top = tl.max(highs, axis=0)
    whole = tl.sum(tl.exp2(highs - top[None, :]) * tl.load(partial_sum + every, cache_modifier=".cg"), axis=0)
    mixed = tl.zeros([members, dim], tl.float32)
    for first in tl.static_range(0, splits, together):
        some = (head * splits + first + tl.arange(0, together))[:, None] * group_block + member[None, :]
        share = tl.exp2(tl.load(partial_max + some, cache_modifier=".cg") - top[None, :])
        cells = some[:, :, None] * dim + at[None, None, :]
        part = tl.load(partial + cells, mask=in_group[None, :, None], other=0.0, cache_modifier=".cg")
        mixed += tl.sum(share[:, :, None] * part, axis=0)
    mixed = mixed / whole[:, None]
    place = (head * group + member[:, None]) * dim + at[None, :]
    tl.store(out + place, mixed.to(out.dtype.element_ty), mask=in_group[:, None])


@triton.jit
def gate(
    residual, norm, weights, step, x_host, probabilities_host, flag_host, experts, size, eps,
    next_weights, next_elements, block: tl.constexpr, experts_block: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    """Write the experts' input fp32 [size], the gate's probabilities fp32 [experts], then the stamp to pinned memory.

    One program does this; the others prefetch.
    """
    program = tl.program_id(0)
    residual += tl.program_id(1) * size
    x_host += tl.program_id(1) * size
    probabilities_host += tl.program_id(1) * experts
    flag_host += tl.program_id(1)
    at = tl.arange(0, block)
    inside = at < size
    expert = tl.arange(0, experts_block)
    known = expert < experts
    if program == 0:
        cells = expert[:, None] * size + at[None, :]
        tile = tl.load(weights + cells, mask=known[:, None] & inside[None, :], other=0.0)
        scale = tl.load(norm + at, mask=inside, other=0.0)
        stamp = tl.load(step + 4).to(tl.int32)
        _await_previous(overlap)
        value = tl.load(residual + at, mask=inside, other=0.0)
        wide = value.to(tl.float32)
        wide = wide * tl.rsqrt(tl.sum(wide * wide) / size + eps)
        value = (wide.to(value.dtype).to(tl.float32) * scale.to(tl.float32)).to(value.dtype)
        wide = value.to(tl.float32)
        tl.store(x_host + at, wide, mask=inside)
        logits = tl.sum(tile.to(tl.float32) * wide[None, :], axis=1).to(value.dtype).to(tl.float32)
        logits = tl.where(known, logits, float("-inf"))
        odds = tl.exp(logits - tl.max(logits, axis=0))
        tl.store(probabilities_host + expert, odds / tl.sum(odds, axis=0), mask=known)
        tl.debug_barrier()
        tl.atomic_xchg(flag_host, stamp, sem="release", scope="sys")
    else:
        _fetch(next_weights, next_elements, program - 1, tl.num_programs(0) - 1, 4096, overlap)
