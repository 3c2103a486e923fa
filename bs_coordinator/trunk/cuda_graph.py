"""One token through the trunk on a GPU without launches by the host: one CUDA graph that waits for the experts.

Graph and host communicate through pinned buffers. In each layer the graph writes the experts' input, the gate's
probabilities and then a stamp, which the host polls. The host writes the experts' output and then the layer's number,
for which the graph waits. No kernel runs during the wait, so other programs can use the GPU. Where a graph can't wait,
there is one graph per segment (from one layer's experts' output to the next layer's experts' input), and the host
launches each.
"""

import contextlib
import ctypes
import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn

from bs_coordinator.errors import TrunkError
from bs_coordinator.trunk import triton_kernels as kernels
from bs_coordinator.trunk.kv_cache import SlabCache
from wire.tensors import Array

log = logging.getLogger(__name__)

_DEADLINE_S = 30.0
_POLLS_BETWEEN_CHECKS = 1 << 14
# With these, a position's angles do not depend on the length of the sequence, so they can be kept in a table.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class Tuning(NamedTuple):
    """Shapes of the kernels, found by measurement on an H100 (docs/performance.md).

    Attributes:
        project: rows per tile, tiles per program and warps of the matrix products.
        attend_block: positions that one program attends to at a time.
        fetch_output_bytes: bytes of the output projection to prefetch into the L2 cache while attention runs.
        fetch_next_bytes: bytes of the next layer's first matrix to prefetch while the experts compute.
        overlap: whether a kernel may start before its predecessor has ended (needs compute capability 9.0).
    """

    project: tuple[int, int, int] = (4, 2, 8)
    attend_block: int = 32
    fetch_output_bytes: int = 8 << 20
    fetch_next_bytes: int = 24 << 20
    overlap: bool = True


def fits(config: Any, rope_type: str, device: torch.device) -> bool:
    """Whether this model's decoding steps can run as graphs on this device."""
    head_dim = _head_dim(config)
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and not getattr(config, "sliding_window", None)
        and rope_type in _FIXED_ROPE
        and head_dim == _power_of_2(head_dim) >= 16
        and config.num_attention_heads // config.num_key_value_heads <= 64
        and config.num_local_experts * _power_of_2(config.hidden_size) <= 1 << 17
    )


class GraphedDecoder:
    """The trunk's graphs and their buffers. Between `begin` and `head` they hold one step's token."""

    def __init__(
        self, modules: Any, rotary: nn.Module, config: Any, device: torch.device, dtype: torch.dtype,
        tuning: Tuning | None = None,
    ) -> None:  # fmt: skip
        """Compile and capture. The modules' query, key and value projections become views of one joined matrix."""
        self._modules = modules
        self._config = config
        self._device = device
        self._dtype = dtype
        self._layers = len(modules.layers)
        self._tuning = tuning or Tuning()
        if torch.cuda.get_device_capability(device) < (9, 0):
            self._tuning = self._tuning._replace(overlap=False)
        self._head_dim = _head_dim(config)
        self._stamp = 0
        self._idle = True
        self._qkv = [_joined(block.self_attn) for block in modules.layers]
        with torch.inference_mode():
            self._allocate(rotary)
            self._capture()

    def new_cache(self) -> SlabCache:
        """An empty cache that the graphs and the eager modules can both use."""
        return SlabCache(self._config, head_dim=self._head_dim, device=self._device, dtype=self._dtype)

    def takes(self, cache: object) -> bool:
        """Whether the next token of the sequence with this cache can go through the graphs."""
        return isinstance(cache, SlabCache) and cache.get_seq_length() < len(self._cosines)

    def begin(self, token: int, cache: Any) -> None:
        """Start a step: one token id that follows what `cache`, a `SlabCache`, holds."""
        self.abandon()
        self._idle = False
        self._cache = cache
        self._position = cache.get_seq_length()
        cache.reserve(self._position + 1)
        self._stamp = self._stamp % 0x7FFFFFFF + 1
        slab = cache.slab
        self._step_view[:] = (slab.data_ptr(), slab.shape[3], self._position, token, self._stamp)
        self._turn_view[0] = 0
        self._graphs[0].replay()

    def attend(self, layer: int) -> tuple[Array, Array]:
        """Wait for a layer's experts' input [1, hidden] and gate probabilities [1, experts], fp32.

        Both stay valid until the next step begins.

        Raises:
            TrunkError: the GPU failed, or has not answered within 30 s.
        """
        self._wait(layer)
        self._cache.layers[layer].length = self._position + 1
        return self._x_views[layer], self._probability_views[layer]

    def add(self, layer: int, output: Array) -> None:
        """Hand over the experts' output, fp32 [1, hidden]; the GPU continues behind this layer's experts."""
        self._experts_view[:] = output[0]
        self._turn_view[0] = layer + 1
        if len(self._graphs) > 1:
            self._graphs[layer + 1].replay()

    def head(self) -> Tensor:
        """The token's logits, fp32 [1, vocab] on the CPU.

        Raises:
            TrunkError: the GPU failed.
        """
        try:
            torch.cuda.current_stream(self._device).synchronize()
        except RuntimeError as error:
            raise _failure(error) from None
        self._idle = True
        return self._logits_host.clone()

    def abandon(self) -> None:
        """Give up the step: the GPU finishes what was launched, with undefined results, and is ready for another."""
        if not self._idle:
            self._idle = True
            self._turn_view[0] = self._layers
            # A GPU failure was reported already, or the next call will report it.
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize(self._device)

    def _wait(self, layer: int) -> None:
        flags, stamp = self._flags, self._stamp
        deadline = 0.0
        while True:
            for _ in range(_POLLS_BETWEEN_CHECKS):
                if flags[layer] == stamp:
                    return
            try:
                torch.cuda.current_stream(self._device).query()
            except RuntimeError as error:
                raise _failure(error) from None
            deadline = deadline or time.monotonic() + _DEADLINE_S
            if time.monotonic() > deadline:
                raise TrunkError(f"the trunk's GPU has not finished layer {layer} within {_DEADLINE_S:.0f} s")

    def _allocate(self, rotary: nn.Module) -> None:
        config, device, dtype = self._config, self._device, self._dtype
        size, vocab, experts = config.hidden_size, config.vocab_size, config.num_local_experts
        kv_heads = config.num_key_value_heads
        self._group_block = max(16, _power_of_2(config.num_attention_heads // kv_heads))
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._processors = processors
        self._splits = max(1, _power_of_2(processors // kv_heads + 1) // 2)

        positions = torch.arange(config.max_position_embeddings, device=device)[None]
        cosines, sines = rotary(torch.empty(0, device=device, dtype=dtype), position_ids=positions)
        self._cosines, self._sines = cosines[0].contiguous(), sines[0].contiguous()

        def on_gpu(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        self._step = on_gpu(8, dtype=torch.int64)
        self._hidden, self._residual = on_gpu(size), on_gpu(size)
        self._projected = on_gpu(self._qkv[0].shape[0])
        self._attended = on_gpu(config.num_attention_heads * self._head_dim)
        partial = (kv_heads, self._splits, self._group_block)
        self._partial = on_gpu(*partial, self._head_dim, dtype=torch.float32)
        self._partial_max = on_gpu(*partial, dtype=torch.float32)
        self._partial_sum = on_gpu(*partial, dtype=torch.float32)
        self._counters = on_gpu(kv_heads, dtype=torch.int32)
        self._logits = on_gpu(1, vocab, dtype=torch.float32)

        def pinned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=True)

        self._step_host = pinned(5, dtype=torch.int64)
        self._experts_host = pinned(size)
        self._x_host, self._probabilities_host = pinned(self._layers, size), pinned(self._layers, experts)
        self._flags_host = pinned(self._layers, dtype=torch.int32)
        self._logits_host = pinned(1, vocab)
        self._turn_host = pinned(1, dtype=torch.int32)
        self._step_view = self._step_host.numpy()
        self._experts_view = self._experts_host.numpy()
        self._x_views = [self._x_host[i, None].numpy() for i in range(self._layers)]
        self._probability_views = [self._probabilities_host[i, None].numpy() for i in range(self._layers)]
        # Accessing an element of a memoryview takes a third of the time it takes with an array.
        flags: Any = self._flags_host.numpy()
        turn: Any = self._turn_host.numpy()
        self._flags, self._turn_view = memoryview(flags), memoryview(turn)

    def _capture(self) -> None:
        # Run everything once first: kernels can't be compiled or loaded during a capture.
        cache = self.new_cache()
        self._step_view[:] = (cache.slab.data_ptr(), cache.slab.shape[3], 0, 0, 0)
        for segment in range(self._layers + 1):
            self._launch(segment)
        torch.cuda.synchronize(self._device)
        segments = range(self._layers + 1)
        try:
            self._graphs = [self._captured(segments, _stream_wait(self._turn_host))]
        except (RuntimeError, TrunkError) as error:
            log.info("CUDA graphs can't wait for the host here (%s): using one per layer", str(error).splitlines()[0])
            self._graphs = [self._captured([segment]) for segment in segments]
        torch.cuda.synchronize(self._device)

    def _captured(
        self, segments: Iterable[int], wait: Callable[[int], None] = lambda turn: None
    ) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for segment in segments:
                if segment:
                    wait(segment)
                self._launch(segment)
        return graph

    def _launch(self, segment: int) -> None:
        """Launch the kernels between the experts of layer `segment` - 1 and those of `segment`; last, the head."""
        config, tuning = self._config, self._tuning
        size, options = config.hidden_size, {"launch_pdl": True} if tuning.overlap else {}
        block = 256
        adders = triton.cdiv(size, block)
        if segment == 0:
            kernels.begin[(adders,)](
                self._step_host,
                self._step,
                self._modules.embed_tokens.weight,
                self._hidden,
                size,
                block=block,
                overlap=tuning.overlap,
            )
        else:
            kernels.add_experts[(adders,)](
                self._residual, self._experts_host, self._hidden, size, block=block, overlap=tuning.overlap
            )
        if segment == self._layers:
            self._project(self._hidden, self._modules.norm, self._modules.lm_head.weight, None, self._logits)
            self._logits_host.copy_(self._logits, non_blocking=True)
            return
        layer: Any = self._modules.layers[segment]
        output = layer.self_attn.o_proj.weight
        self._project(self._hidden, layer.input_layernorm, self._qkv[segment], None, self._projected)
        kv_heads = config.num_key_value_heads
        fetch = tuning.fetch_output_bytes // self._dtype.itemsize
        fetchers = triton.cdiv(self._processors, kv_heads) if fetch else 0
        attention = layer.self_attn
        normed = hasattr(attention, "q_norm")
        # Without norms, any pointers do: they are not read.
        norms = (attention.q_norm.weight, attention.k_norm.weight) if normed else (output, output)
        kernels.attend[(kv_heads, self._splits + fetchers)](
            self._projected, self._step, self._cosines, self._sines,
            self._partial, self._partial_max, self._partial_sum, self._counters, self._attended,
            segment, self._head_dim**-0.5 * math.log2(math.e), output, min(fetch, output.numel()), *norms,
            config.rms_norm_eps,
            heads=config.num_attention_heads, kv_heads=kv_heads, dim=self._head_dim, splits=self._splits,
            block=tuning.attend_block, group_block=self._group_block, overlap=tuning.overlap, normed=normed, **options,
        )  # fmt: skip
        self._project(self._attended, None, output, self._hidden, self._residual)
        following = self._qkv[segment + 1] if segment + 1 < self._layers else self._modules.lm_head.weight
        fetch = tuning.fetch_next_bytes // self._dtype.itemsize
        norm = layer.post_attention_layernorm
        kernels.gate[(1 + (self._processors - 1 if fetch else 0),)](
            self._residual, norm.weight, layer.gate.weight, self._step, self._x_host[segment],
            self._probabilities_host[segment], self._flags_host[segment:], config.num_local_experts, size,
            norm.variance_epsilon, following, min(fetch, following.numel()),
            block=_power_of_2(size), experts_block=_power_of_2(config.num_local_experts), overlap=tuning.overlap,
            num_warps=16, **options,
        )  # fmt: skip

    def _project(self, x: Tensor, norm: Any, weights: Tensor, residual: Tensor | None, out: Tensor) -> None:
        tile_rows, tiles, warps = self._tuning.project
        rows, size = weights.shape
        overlap = self._tuning.overlap
        kernels.project[(triton.cdiv(rows, tile_rows * tiles),)](
            x, x if norm is None else norm.weight, weights, x if residual is None else residual, out, rows, size,
            0.0 if norm is None else norm.variance_epsilon,
            normed=norm is not None, added=residual is not None, tile_rows=tile_rows, tiles=tiles,
            block=_power_of_2(size), overlap=overlap, num_warps=warps, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip


def _stream_wait(word: Tensor) -> Callable[[int], None]:
    """A function that makes the current stream wait until an int32 in pinned memory has reached a value.

    Raises:
        TrunkError: this system's driver has no such call; raised by the function: the call failed.
    """
    # torch does not wrap this call of the driver.
    try:
        call = ctypes.CDLL("libcuda.so.1").cuStreamWaitValue32_v2
    except (OSError, AttributeError) as error:
        raise TrunkError(f"no cuStreamWaitValue32: {error}") from None
    call.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    greater_or_equal = 0

    def wait(value: int) -> None:
        code = call(torch.cuda.current_stream().cuda_stream, word.data_ptr(), value, greater_or_equal)
        if code:
            raise TrunkError(f"cuStreamWaitValue32: CUDA error {code}")

    return wait


def _joined(attention: Any) -> Tensor:
    """Join the query, key and value projections in one matrix; the modules' weights become views of it."""
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    joined = torch.cat([part.weight for part in parts])
    for part, weight in zip(parts, torch.split(joined, [part.weight.shape[0] for part in parts]), strict=True):
        part.weight = nn.Parameter(weight, requires_grad=False)
    return joined


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


def _failure(error: RuntimeError) -> TrunkError:
    return TrunkError(f"the trunk's GPU failed: {str(error).splitlines()[0]}")
