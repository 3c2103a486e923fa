"""A few tokens through the trunk on a GPU without launches by the host: one CUDA graph that waits for the experts.

Graph and host communicate through pinned buffers. In each layer the graph writes the experts' input, the gate's
probabilities and then a stamp, which the host polls. The host writes the experts' output and then the layer's number,
for which the graph waits. No kernel runs during the wait, so other programs can use the GPU. Where a graph can't wait,
there is one graph per segment (from one layer's experts' output to the next layer's experts' input), and the host
launches each.

There are graphs for 1, 2, 4, 8 and 16 tokens, drafts of one sequence or tokens of several. A step takes the smallest
that holds its tokens and repeats its last one: a repeated token computes and stores what the last one does.
"""

import contextlib
import ctypes
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bs_coordinator.errors import TrunkError
from bs_coordinator.trunk.graph_kernels import MOST_ROWS, StepKernels, Tuning, head_dim, power_of_2
from bs_coordinator.trunk.kv_cache import SlabCache
from wire.tensors import Array

log = logging.getLogger(__name__)

ROW_COUNTS = (1, 2, 4, 8, MOST_ROWS)
"""Tokens of the steps for which there are graphs."""

_DEADLINE_S = 30.0
_POLLS_BETWEEN_CHECKS = 1 << 14
# With these, a position's angles do not depend on the length of the sequence, so they can be kept in a table.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


def fits(config: Any, rope_type: str, device: torch.device) -> bool:
    """Whether this model's decoding steps can run as graphs on this device."""
    dim = head_dim(config)
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and not getattr(config, "sliding_window", None)
        and rope_type in _FIXED_ROPE
        and dim == power_of_2(dim) >= 16
        and config.num_attention_heads // config.num_key_value_heads <= 64
        and config.num_local_experts * power_of_2(config.hidden_size) <= 1 << 17
        # The kernels index weights by 32-bit numbers.
        and config.vocab_size * config.hidden_size < 1 << 31
    )


class Replayable(Protocol):
    """Kernels that can be started again and again."""

    def replay(self) -> None:
        """Start them."""


class Launcher(Protocol):
    """What runs the kernels.

    Attributes:
        processors: streaming multiprocessors of the GPU.
    """

    processors: int

    def tuned(self, tuning: Tuning) -> Tuning:
        """The tuning, as far as this GPU takes it."""

    def capture(self, launch: Callable[[int], None], segments: int, turn: Tensor) -> Sequence[Replayable]:
        """Make something that runs segments again, after `launch` has run each once.

        Args:
            launch: launches the kernels of a segment.
            segments: their number.
            turn: int32 [1]; segment n > 0 may start once it is at least n.

        Returns:
            One for all segments, which waits for its turns itself, or one per segment.
        """

    def check(self) -> None:
        """Raise RuntimeError if the GPU failed."""

    def finish(self) -> None:
        """Wait for all that was started. Raises RuntimeError if the GPU failed."""


class CudaGraphs:
    """Launches by captured graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._properties = torch.cuda.get_device_properties(device)
        self.processors: int = self._properties.multi_processor_count
        self._can_wait = True

    def tuned(self, tuning: Tuning) -> Tuning:
        # What is fetched ahead must still be in the L2 cache when it is used.
        most = self._properties.L2_cache_size // 2
        return tuning._replace(
            overlap=tuning.overlap and torch.cuda.get_device_capability(self._device) >= (9, 0),
            fetch_output_bytes=min(tuning.fetch_output_bytes, most),
            fetch_next_bytes=min(tuning.fetch_next_bytes, most),
        )

    def capture(self, launch: Callable[[int], None], segments: int, turn: Tensor) -> Sequence[Replayable]:
        self.finish()
        if self._can_wait:
            try:
                return [self._captured(launch, range(segments), _stream_wait(turn))]
            except (RuntimeError, TrunkError) as error:
                self._can_wait = False
                log.info(
                    "CUDA graphs can't wait for the host here (%s): using one per layer", str(error).splitlines()[0]
                )
        return [self._captured(launch, [segment]) for segment in range(segments)]

    def _captured(
        self, launch: Callable[[int], None], segments: Iterable[int],
        wait: Callable[[int], None] = lambda turn: None,
    ) -> torch.cuda.CUDAGraph:  # fmt: skip
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for segment in segments:
                if segment:
                    wait(segment)
                launch(segment)
        return graph

    def check(self) -> None:
        torch.cuda.current_stream(self._device).query()

    def finish(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


class GraphedDecoder:
    """The trunk's graphs. Between `begin` and `head` they hold one step's tokens."""

    def __init__(
        self, modules: Any, rotary: nn.Module, config: Any, device: torch.device, dtype: torch.dtype,
        tuning: Tuning | None = None, launcher: Launcher | None = None,
    ) -> None:  # fmt: skip
        """Compile and capture. The modules' query, key and value projections become views of one joined matrix."""
        self._config = config
        self._device = device
        self._dtype = dtype
        self._layers = len(modules.layers)
        self._launcher: Launcher = launcher or CudaGraphs(device)
        self._stamp = 0
        self._idle = True
        with torch.inference_mode():
            self._kernels = StepKernels(
                modules, rotary, config, device, dtype,
                tuning=self._launcher.tuned(tuning or Tuning()), processors=self._launcher.processors,
            )  # fmt: skip
            self._share()
            self._capture()

    def new_cache(self) -> SlabCache:
        """An empty cache that the graphs and the eager modules can both use."""
        return SlabCache(self._config, head_dim=head_dim(self._config), device=self._device, dtype=self._dtype)

    def takes(self, counts: Sequence[int], caches: Sequence[object]) -> bool:
        """Whether a step can go through the graphs.

        Args:
            counts: new tokens of each sequence.
            caches: of the sequences.
        """
        return sum(counts) <= MOST_ROWS and all(
            isinstance(cache, SlabCache) and cache.get_seq_length() + count <= self._kernels.positions
            for count, cache in zip(counts, caches, strict=True)
        )

    def begin(self, ids: Sequence[Sequence[int]], caches: Sequence[Any]) -> None:
        """Start a step.

        Args:
            ids: new token ids of each sequence, that follow what its cache holds.
            caches: of the sequences, each another `SlabCache`.
        """
        self.abandon()
        self._idle = False
        self._stamp = self._stamp % 0x7FFFFFFF + 1
        self._ends = [(cache, cache.get_seq_length() + len(some)) for some, cache in zip(ids, caches, strict=True)]
        row = 0
        for some, (cache, end) in zip(ids, self._ends, strict=True):
            cache.reserve(end)
            address, capacity = cache.slab.data_ptr(), cache.slab.shape[3]
            for position, token in enumerate(some, end - len(some)):
                self._step_view[row, :5] = (address, capacity, position, token, self._stamp)
                row += 1
        self._count = row
        rows = next(rows for rows in ROW_COUNTS if rows >= row)
        self._step_view[row:rows] = self._step_view[row - 1]
        self._graphs = self._captured[rows]
        self._rows = rows
        self._turn_view[0] = 0
        self._graphs[0].replay()

    def attend(self, layer: int) -> tuple[Array, Array]:
        """Wait for a layer's experts' input [tokens, hidden] and gate probabilities [tokens, experts], fp32.

        Both stay valid until the next step begins.

        Raises:
            TrunkError: the GPU failed, or has not answered within 30 s.
        """
        self._wait(layer)
        for cache, end in self._ends:
            cache.layers[layer].length = end
        return self._x_views[layer][: self._count], self._probability_views[layer][: self._count]

    def add(self, layer: int, output: Array) -> None:
        """Hand over the experts' output, fp32 [tokens, hidden]; the GPU continues behind this layer's experts."""
        self._experts_view[: self._count] = output
        if self._count < self._rows:
            self._experts_view[self._count : self._rows] = output[-1]
        self._turn_view[0] = layer + 1
        if len(self._graphs) > 1:
            self._graphs[layer + 1].replay()

    def head(self) -> Tensor:
        """The tokens' logits, fp32 [tokens, vocab] on the CPU.

        Raises:
            TrunkError: the GPU failed.
        """
        try:
            self._launcher.finish()
        except RuntimeError as error:
            raise _failure(error) from None
        self._idle = True
        return self._kernels.host.logits[: self._count].clone()

    def abandon(self) -> None:
        """Give up the step: the GPU finishes what was launched, with undefined results, and is ready for another."""
        if not self._idle:
            self._idle = True
            self._turn_view[0] = self._layers
            # A GPU failure was reported already, or the next call will report it.
            with contextlib.suppress(RuntimeError):
                self._launcher.finish()

    def _wait(self, layer: int) -> None:
        flags, stamp = self._flags, self._stamp
        deadline = 0.0
        for flag in range(layer * MOST_ROWS, layer * MOST_ROWS + self._rows):
            while flags[flag] != stamp:
                for _ in range(_POLLS_BETWEEN_CHECKS):
                    if flags[flag] == stamp:
                        break
                else:
                    try:
                        self._launcher.check()
                    except RuntimeError as error:
                        raise _failure(error) from None
                    deadline = deadline or time.monotonic() + _DEADLINE_S
                    if time.monotonic() > deadline:
                        raise TrunkError(f"the trunk's GPU has not finished layer {layer} within {_DEADLINE_S:.0f} s")

    def _share(self) -> None:
        """Views of what host and graphs exchange."""
        host = self._kernels.host
        self._step_view = host.step.numpy()
        self._experts_view = host.experts.numpy()
        self._x_views = list(host.x.numpy())
        self._probability_views = list(host.probabilities.numpy())
        self._turn_host = torch.zeros(1, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        # Accessing an element of a memoryview takes a third of the time it takes with an array.
        flags: Any = host.flags.view(-1).numpy()
        turn: Any = self._turn_host.numpy()
        self._flags, self._turn_view = memoryview(flags), memoryview(turn)

    def _capture(self) -> None:
        cache = self.new_cache()
        self._step_view[:, :2] = (cache.slab.data_ptr(), cache.slab.shape[3])
        segments = range(self._layers + 1)
        self._captured: dict[int, Sequence[Replayable]] = {}
        for rows in ROW_COUNTS:
            launch = _of(self._kernels, rows)
            # Run everything once first: kernels can't be compiled or loaded during a capture.
            for segment in segments:
                launch(segment)
            self._captured[rows] = self._launcher.capture(launch, len(segments), self._turn_host)
        self._launcher.finish()


def _of(kernels: StepKernels, rows: int) -> Callable[[int], None]:
    return lambda segment: kernels.launch(segment, rows)


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


def _failure(error: RuntimeError) -> TrunkError:
    return TrunkError(f"the trunk's GPU failed: {str(error).splitlines()[0]}")
