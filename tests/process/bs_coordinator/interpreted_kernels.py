"""Steps through the kernels of the trunk's graphs in Triton's interpreter, and through eager modules; prints distances.

Runs in a process of its own with TRITON_INTERPRET=1, which Triton reads when kernels are defined. Instead of captured
graphs there are calls, one per segment, as where a graph can't wait.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bs_coordinator.config import TrunkQuantisation
from bs_coordinator.trunk import cuda_graph, llama, packed, quantised
from bs_coordinator.trunk.graph_kernels import Tuning
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.passes import BlocksPass, GraphsPass

PAST = (37, 20)
STEPS = ([(0, 1)], [(0, 3)], [(0, 4), (1, 1)], [(1, 2)], [(0, 1)])
"""Tokens of each step by sequence; some repeat their last token up to the next number of rows."""


class _Call(NamedTuple):
    replay: Callable[[], None]


class _Calls:
    """A launcher without a GPU."""

    processors = 4

    def tuned(self, tuning: Tuning) -> Tuning:
        return tuning._replace(overlap=False, fetch_output_bytes=64, fetch_next_bytes=64)

    def capture(self, launch: Callable[[int], None], segments: int, turn: Tensor) -> Sequence[Any]:
        return [_Call(partial(launch, segment)) for segment in range(segments)]

    def check(self) -> None:
        return

    def finish(self) -> None:
        return


def _logits(trunk: llama.LlamaTrunk, kind: type[Any]) -> Tensor:
    caches, found = [trunk.new_cache() for _ in PAST], []
    ids = torch.randint(0, 64, (2, 100), generator=torch.Generator().manual_seed(1)).tolist()
    at = [0, 0]

    def step(counts: Sequence[tuple[int, int]], kind: type[Any]) -> Tensor:
        inputs = []
        for number, count in counts:
            inputs.append(SequenceInput(ids[number][at[number] : at[number] + count], caches[number]))
            at[number] += count
        trunk_pass = trunk.start_pass(inputs)
        assert isinstance(trunk_pass, kind), trunk_pass
        for layer in range(trunk.layers):
            hidden, routing = trunk_pass.attend(layer)
            # Outputs that depend on the gate, too.
            trunk_pass.add(0.5 * hidden + routing.weights.sum(axis=1, keepdims=True) * hidden[:, ::-1])
        return torch.cat(trunk_pass.logits(all_logits=True))

    with torch.inference_mode():
        for number, count in enumerate(PAST):
            step([(number, count)], BlocksPass)
        found = [step(counts, kind) for counts in STEPS]
    return torch.cat(found)


def _decoder(modules: Any, rotary: Any, config: Any, device: Any, dtype: Any) -> cuda_graph.GraphedDecoder:
    return cuda_graph.GraphedDecoder(modules, rotary, config, device, dtype, launcher=_Calls())


def main() -> None:
    """Print how far logits are apart, for a folder and a quantisation."""
    folder, quantisation = Path(sys.argv[1]), cast(TrunkQuantisation, sys.argv[2])
    # The layout that the kernels read, and no pass by rows, which is for CPUs.
    quantised.by_torch = lambda device: False
    packed.available = lambda: False
    results = []
    for kind, decoder in ((GraphsPass, _decoder), (BlocksPass, lambda *_: None)):
        llama._graphed = decoder
        trunk = llama.LlamaTrunk(folder, quantisation=quantisation)
        trunk._fp32_on_cpu = False
        results.append(_logits(trunk, kind))
    found, expected = results
    print(json.dumps([float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]))


if __name__ == "__main__":
    main()
