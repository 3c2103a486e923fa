"""The kernels of a decoding step in order, and their buffers. `cuda_graph` decides what launches them, and when."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn

from bs_coordinator.trunk import triton_kernels as kernels
from bs_coordinator.trunk import triton_rows
from bs_coordinator.trunk.quantised import QuantisedLinear

MOST_ROWS = 16
"""Tokens of one step at most: as many columns as the smallest product on tensor cores has."""


class Tuning(NamedTuple):
    """Shapes of the kernels, found by measurement on an H100 (docs/performance.md), but for int8, int4 and rows.

    Attributes:
        project, project_int8, project_int4: rows per tile, tiles per program and warps of one token's matrix products.
        project_rows: rows per tile, columns at a time (half as many in fp32) and warps of several tokens' products.
        attend_block: positions that one program attends to at a time.
        fetch_output_bytes: bytes of the output projection to prefetch into the L2 cache while attention runs.
        fetch_next_bytes: bytes of the next layer's first matrix to prefetch while the experts compute.
        overlap: whether a kernel may start before its predecessor has ended (needs compute capability 9.0).
    """

    project: tuple[int, int, int] = (4, 2, 8)
    project_int8: tuple[int, int, int] = (4, 2, 8)
    project_int4: tuple[int, int, int] = (4, 2, 4)
    project_rows: tuple[int, int, int] = (16, 128, 4)
    attend_block: int = 32
    fetch_output_bytes: int = 8 << 20
    fetch_next_bytes: int = 24 << 20
    overlap: bool = True


class Matrix(NamedTuple):
    """Weights as the kernels read them.

    Attributes:
        codes: [outputs, inputs] in the trunk's dtype or int8, or [outputs, inputs / 2] for int4.
        scales: of int8 and int4 (`quantised.Codes`); otherwise any tensor, which is not read.
        bits: per weight.
    """

    codes: Tensor
    scales: Tensor
    bits: int


class StepBuffers(NamedTuple):
    """What host and kernels exchange, in memory that both reach.

    Attributes:
        step: int64 [rows, 8], as `triton_kernels.begin` takes it.
        experts: fp32 [rows, hidden], output of the layer's experts.
        x: fp32 [layers, rows, hidden], the experts' input.
        probabilities: fp32 [layers, rows, experts].
        flags: int32 [layers, rows], the step's stamp once the former two are written.
        logits: fp32 [rows, vocab].
    """

    step: Tensor
    experts: Tensor
    x: Tensor
    probabilities: Tensor
    flags: Tensor
    logits: Tensor


class StepKernels:
    """A trunk's kernels and what they keep on the GPU.

    Attributes:
        host: buffers that are shared with the host.
        positions: that the table of rotary angles covers.
    """

    def __init__(
        self, modules: Any, rotary: nn.Module, config: Any, device: torch.device, dtype: torch.dtype, *,
        tuning: Tuning, processors: int,
    ) -> None:  # fmt: skip
        """Allocate. The modules' query, key and value projections become views of one joined matrix.

        Args:
            processors: streaming multiprocessors of the GPU.
        """
        self._modules, self._config, self._tuning = modules, config, tuning
        self._layers = len(modules.layers)
        self._head_dim = head_dim(config)
        self._itemsize = dtype.itemsize
        self._processors = processors
        self._qkv = [_joined(block.self_attn) for block in modules.layers]
        self._output = [_matrix(block.self_attn.o_proj) for block in modules.layers]
        self._head = _matrix(modules.lm_head)
        size, vocab, kv_heads = config.hidden_size, config.vocab_size, config.num_key_value_heads
        self._group_block = max(16, power_of_2(config.num_attention_heads // kv_heads))
        self._splits = max(1, power_of_2(processors // kv_heads + 1) // 2)

        positions = torch.arange(config.max_position_embeddings, device=device)[None]
        cosines, sines = rotary(torch.empty(0, device=device, dtype=dtype), position_ids=positions)
        self._cosines, self._sines = cosines[0].contiguous(), sines[0].contiguous()
        self.positions = len(self._cosines)

        def on_gpu(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros((MOST_ROWS, *shape), device=device, dtype=dtype)

        self._step = on_gpu(8, dtype=torch.int64)
        self._hidden, self._residual, self._normed = on_gpu(size), on_gpu(size), on_gpu(size)
        self._projected = on_gpu(self._qkv[0].codes.shape[0])
        self._attended = on_gpu(config.num_attention_heads * self._head_dim)
        partial = (kv_heads, self._splits, self._group_block)
        self._partial = on_gpu(*partial, self._head_dim, dtype=torch.float32)
        self._partial_max = on_gpu(*partial, dtype=torch.float32)
        self._partial_sum = on_gpu(*partial, dtype=torch.float32)
        self._counters = on_gpu(kv_heads, dtype=torch.int32)
        self._logits = on_gpu(vocab, dtype=torch.float32)

        def shared(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")

        layers, experts = self._layers, config.num_local_experts
        self.host = StepBuffers(
            step=shared(MOST_ROWS, 8, dtype=torch.int64),
            experts=shared(MOST_ROWS, size),
            x=shared(layers, MOST_ROWS, size),
            probabilities=shared(layers, MOST_ROWS, experts),
            flags=shared(layers, MOST_ROWS, dtype=torch.int32),
            logits=shared(MOST_ROWS, vocab),
        )

    def launch(self, segment: int, rows: int) -> None:
        """Launch the kernels between the experts of layer `segment` - 1 and those of `segment`; last, the head.

        Args:
            rows: tokens of the step, from 1 to `MOST_ROWS`. Only single tokens take the kernels that overlap.
        """
        overlap = self._tuning.overlap and rows == 1
        size, block, host = self._config.hidden_size, 256, self.host
        adders = triton.cdiv(size, block)
        if segment == 0:
            kernels.begin[(adders, rows)](
                host.step, self._step, self._modules.embed_tokens.weight, self._hidden, size,
                block=block, overlap=overlap,
            )  # fmt: skip
        else:
            kernels.add_experts[(adders, rows)](
                self._residual, host.experts, self._hidden, size, block=block, overlap=overlap
            )
        if segment == self._layers:
            self._project(rows, self._hidden, self._modules.norm, self._head, None, self._logits)
            host.logits[:rows].copy_(self._logits[:rows], non_blocking=True)
            return
        layer: Any = self._modules.layers[segment]
        self._project(rows, self._hidden, layer.input_layernorm, self._qkv[segment], None, self._projected)
        self._attend(segment, rows, overlap)
        self._project(rows, self._attended, None, self._output[segment], self._hidden, self._residual)
        self._gate(segment, rows, overlap)

    def _attend(self, segment: int, rows: int, overlap: bool) -> None:
        config, tuning = self._config, self._tuning
        attention = self._modules.layers[segment].self_attn
        output = self._output[segment].codes
        normed = hasattr(attention, "q_norm")
        # Without norms, any pointers do: they are not read.
        norms = (attention.q_norm.weight, attention.k_norm.weight) if normed else (output, output)
        shape: dict[str, Any] = {
            "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads, "dim": self._head_dim,
            "normed": normed,
        }  # fmt: skip
        kv_heads = config.num_key_value_heads
        fetch = tuning.fetch_output_bytes // output.itemsize if rows == 1 else 0
        fetchers = triton.cdiv(self._processors, kv_heads) if fetch else 0
        if rows > 1:
            # A draft's tokens attend to each other's keys.
            triton_rows.append[(kv_heads, rows)](
                self._projected, self._step, self._cosines, self._sines, segment, norms[1], config.rms_norm_eps, **shape
            )
        kernels.attend[(kv_heads, self._splits + fetchers, rows)](
            self._projected, self._step, self._cosines, self._sines,
            self._partial, self._partial_max, self._partial_sum, self._counters, self._attended,
            segment, self._head_dim**-0.5 * math.log2(math.e), output, min(fetch, output.numel()), *norms,
            config.rms_norm_eps, **shape, splits=self._splits, block=tuning.attend_block,
            group_block=self._group_block, overlap=overlap, appended=rows > 1, **_options(overlap),
        )  # fmt: skip

    def _gate(self, segment: int, rows: int, overlap: bool) -> None:
        config, layer = self._config, self._modules.layers[segment]
        following = (self._qkv[segment + 1] if segment + 1 < self._layers else self._head).codes
        fetch = self._tuning.fetch_next_bytes // following.itemsize if rows == 1 else 0
        norm = layer.post_attention_layernorm
        kernels.gate[(1 + (self._processors - 1 if fetch else 0), rows)](
            self._residual, norm.weight, layer.gate.weight, self._step, self.host.x[segment],
            self.host.probabilities[segment], self.host.flags[segment], config.num_local_experts, config.hidden_size,
            norm.variance_epsilon, following, min(fetch, following.numel()),
            block=power_of_2(config.hidden_size), experts_block=power_of_2(config.num_local_experts), overlap=overlap,
            num_warps=16, **_options(overlap),
        )  # fmt: skip

    def _project(self, rows: int, x: Tensor, norm: Any, matrix: Matrix, residual: Tensor | None, out: Tensor) -> None:
        if rows > 1:
            self._project_rows(rows, x, norm, matrix, residual, out)
            return
        outputs, size = len(matrix.codes), x.shape[1]
        tuning, overlap = self._tuning, self._tuning.overlap
        flags: dict[str, Any] = {"normed": norm is not None, "added": residual is not None, "overlap": overlap}
        tensors = (
            x,
            x if norm is None else norm.weight,
            matrix.codes,
            matrix.scales,
            x if residual is None else residual,
        )
        eps = 0.0 if norm is None else norm.variance_epsilon
        shape = {4: tuning.project_int4, 8: tuning.project_int8}.get(matrix.bits, tuning.project)
        tile_rows, tiles, warps = shape
        grid = (triton.cdiv(outputs, tile_rows * tiles),)
        flags |= {"tile_rows": tile_rows, "tiles": tiles, "num_warps": warps} | _options(overlap)
        if matrix.bits == 4:
            kernels.project_int4[grid](*tensors, out, outputs, size, eps, groups_block=power_of_2(size // 32), **flags)
        else:
            kernels.project[grid](
                *tensors, out, outputs, size, eps, scaled=matrix.bits == 8, block=power_of_2(size), **flags
            )

    def _project_rows(
        self, rows: int, x: Tensor, norm: Any, matrix: Matrix, residual: Tensor | None, out: Tensor
    ) -> None:
        outputs, size = len(matrix.codes), x.shape[1]
        if norm is not None:
            triton_rows.normalise[(rows,)](
                x, norm.weight, self._normed, size, norm.variance_epsilon, block=power_of_2(size)
            )
            x = self._normed
        tile_rows, block, warps = self._tuning.project_rows
        block = block * 2 // self._itemsize
        triton_rows.project_rows[(triton.cdiv(outputs, tile_rows),)](
            x, matrix.codes, matrix.scales, x if residual is None else residual, out, rows, outputs, size,
            bits=matrix.bits, added=residual is not None, tile_rows=tile_rows, block=block, tokens=MOST_ROWS,
            num_warps=warps,
        )  # fmt: skip


def _options(overlap: bool) -> dict[str, Any]:
    return {"launch_pdl": True} if overlap else {}


def _matrix(linear: Any) -> Matrix:
    if isinstance(linear, QuantisedLinear):
        return Matrix(linear.codes, linear.scales, linear.bits)
    return Matrix(linear.weight, linear.weight, 8 * linear.weight.itemsize)


def _joined(attention: Any) -> Matrix:
    """Join the query, key and value projections in one matrix; what the modules keep becomes views of it."""
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    counts = [part.out_features for part in parts]
    codes = torch.cat([_matrix(part).codes for part in parts])
    if not isinstance(parts[0], QuantisedLinear):
        for part, weight in zip(parts, torch.split(codes, counts), strict=True):
            part.weight = nn.Parameter(weight, requires_grad=False)
        return Matrix(codes, codes, 8 * codes.itemsize)
    scales = torch.cat([part.scales for part in parts])
    for part, *views in zip(parts, torch.split(codes, counts), torch.split(scales, counts), strict=True):
        part.codes, part.scales = views
    return Matrix(codes, scales, parts[0].bits)


def head_dim(config: Any) -> int:
    """Size of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()
