"""One forward step of the distributed model: trunk here, experts wherever they are."""

import time
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from bs_coordinator.records import DispatchRecord, LayerRecord, StepRecord
from bs_coordinator.selection import Policy
from bs_coordinator.trunk import Trunk
from wire.tensors import Array


class ExpertOutput(NamedTuple):
    """What the experts of one layer made of some tokens.

    Attributes:
        output: float32 [tokens, hidden], Σ over experts of gate weight × expert output.
        dispatches: one record per request to a node.
    """

    output: Array
    dispatches: tuple[DispatchRecord, ...] = ()


class Experts(Protocol):
    """All experts of a model, wherever they run."""

    def apply(self, layer: int, hidden: Array, gate: Array) -> ExpertOutput:
        """Combine the chosen experts of a layer.

        Args:
            hidden: float32 [tokens, hidden].
            gate: float32 [tokens, experts], zero where an expert is not chosen.

        Raises:
            WdmoeError: an expert could not be had.
        """


class DistributedMixtral:
    """A Mixtral whose experts are elsewhere."""

    def __init__(self, trunk: Trunk, experts: Experts, policy: Policy) -> None:
        self.trunk = trunk
        self._experts = experts
        self._policy = policy

    @torch.inference_mode()
    def step(
        self, ids: list[int], cache: DynamicCache, *, all_logits: bool = False
    ) -> tuple[Tensor, StepRecord]:
        """Run token ids that follow what `cache` holds, and add them to it.

        Returns:
            Logits in fp32, [1, vocab] of the last token or [tokens, vocab] with `all_logits`, and what the
            step cost. On an error the cache is cut back to what it held before.
        """
        past = cache.get_seq_length()
        try:
            return self._step(ids, cache, past, all_logits)
        except BaseException:
            # Layers before the failure have already appended their keys and values.
            cache.crop(past)
            raise

    def _step(
        self, ids: list[int], cache: DynamicCache, past: int, all_logits: bool
    ) -> tuple[Tensor, StepRecord]:
        began_ns = time.perf_counter_ns()
        hidden, context = self.trunk.embed(torch.tensor(ids), cache)
        mark_ns = time.perf_counter_ns()
        head_ns = mark_ns - began_ns
        layers: list[LayerRecord] = []
        for layer in range(self.trunk.layers):
            residual, expert_input, probabilities = self.trunk.attend(layer, hidden, context)
            # The copies to the host also wait for a GPU, so that the clock below is honest.
            x = expert_input.float().cpu().numpy()
            gate = self._policy(probabilities.cpu().numpy())
            attended_ns = time.perf_counter_ns()
            combined = self._experts.apply(layer, x, gate)
            output = torch.from_numpy(combined.output).to(residual.device, residual.dtype)
            hidden = residual + output[None]
            done_ns = time.perf_counter_ns()
            layers.append(
                LayerRecord(layer, attended_ns - mark_ns, done_ns - attended_ns, combined.dispatches)
            )
            mark_ns = done_ns
        logits = self.trunk.head(hidden if all_logits else hidden[:, -1:]).cpu()
        end_ns = time.perf_counter_ns()
        record = StepRecord(
            phase="decode" if len(ids) == 1 else "prefill",
            position=past,
            tokens=len(ids),
            total_ns=end_ns - began_ns,
            head_ns=head_ns + end_ns - mark_ns,
            layers=tuple(layers),
        )
        return logits, record
