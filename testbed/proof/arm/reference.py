"""What the boards are asked, and what fp32 experts answer to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.experts import Experts, Ready
from bs_coordinator.engine.model import DistributedMixtral
from bs_coordinator.engine.sequence import Sequence as TokenSequence
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import TopK
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.trunk.trunk import Trunk
from testbed.evaluation.local_experts import LocalExperts
from wire.experts import ExpertId
from wire.manifest import load_manifest
from wire.tensors import Array

PROMPT = "The capital of France is the city of Paris, and the largest city of Germany is"


class Reference(NamedTuple):
    """Questions and answers of one model.

    Attributes:
        hidden: per layer float32 [rows, hidden], what the trunk gives its experts for the first tokens of `PROMPT`.
            The very first makes some experts answer hundreds of times as large as others do.
        output: float32 [rows, hidden] by expert, of onnxruntime with fp32 weights on this machine.
    """

    hidden: Sequence[Array]
    output: dict[ExpertId, Array]


def make_reference(fp32_bundle: Path, ids: Sequence[ExpertId], *, rows: int) -> Reference:
    """Run the model on `PROMPT` here, and its experts on what they got."""
    experts = LocalExperts(fp32_bundle, threads=1)
    listener = _Listener(experts)
    dims = load_manifest(fp32_bundle).dims
    model = DistributedMixtral(Trunk(fp32_bundle / "trunk"), listener, TopK(dims.top_k))
    tokenizer = Tokenizer(fp32_bundle / "trunk")
    sequence = TokenSequence(model, tokenizer)
    next(sequence.generate(tokenizer.encode(PROMPT)[:rows], SamplingConfig(max_tokens=1)))
    output = {id: ask(experts, id, listener.hidden[id.layer], dims.experts) for id in ids}
    return Reference(listener.hidden, output)


def ask(experts: Experts, id: ExpertId, hidden: Array, count: int) -> Array:
    """One expert's own answer to `hidden`.

    Args:
        count: experts of a layer.
    """
    gate = np.zeros((len(hidden), count), np.float32)
    gate[:, id.expert] = 1.0
    return experts.begin(id.layer, hidden, gate).result().output


class _Listener:
    """Experts that remember what they were asked."""

    def __init__(self, experts: LocalExperts) -> None:
        self.hidden: list[Array] = []
        self._experts = experts

    def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
        self.hidden.append(hidden.copy())
        return self._experts.begin(layer, hidden, gate)

    def forecast(self, layer: int) -> LayerForecast:
        return self._experts.forecast(layer)
