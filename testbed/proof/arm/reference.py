"""Inputs for the boards' experts, and the outputs of fp32 experts for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.experts import Experts, Ready
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.sequence import Sequence as TokenSequence
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import TopK
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.trunk.load import load_trunk
from testbed.evaluation.local_experts import LocalExperts
from wire.experts import ExpertId
from wire.manifest import load_manifest
from wire.tensors import Array

PROMPT = "The capital of France is the city of Paris, and the largest city of Germany is"


class Reference(NamedTuple):
    """Inputs and fp32 outputs of one model's experts.

    Attributes:
        hidden: per layer float32 [rows, hidden], the experts' inputs for the first tokens of `PROMPT`. For the very
            first token, some experts' outputs are hundreds of times as large as others'.
        output: by expert float32 [rows, hidden], computed by onnxruntime with fp32 weights on this machine.
    """

    hidden: Sequence[Array]
    output: dict[ExpertId, Array]


def make_reference(fp32_bundle: Path, ids: Sequence[ExpertId], *, rows: int) -> Reference:
    """Run the model on the first `rows` tokens of `PROMPT` in this process, and the experts `ids` on their inputs."""
    experts = LocalExperts(fp32_bundle, threads=1)
    recorder = _RecordingExperts(experts)
    dims = load_manifest(fp32_bundle).dims
    model = DistributedModel(load_trunk(fp32_bundle / "trunk"), recorder, TopK(dims.top_k))
    tokenizer = Tokenizer(fp32_bundle / "trunk")
    sequence = TokenSequence(model, tokenizer)
    next(sequence.generate(tokenizer.encode(PROMPT)[:rows], SamplingConfig(max_tokens=1)))
    output = {id: ask(experts, id, recorder.hidden[id.layer], dims.experts) for id in ids}
    return Reference(recorder.hidden, output)


def ask(experts: Experts, id: ExpertId, hidden: Array, count: int) -> Array:
    """Output of one expert alone, float32 [rows, hidden].

    Args:
        hidden: float32 [rows, hidden].
        count: experts per layer.
    """
    gate = np.zeros((len(hidden), count), np.float32)
    gate[:, id.expert] = 1.0
    return experts.begin(id.layer, hidden, gate).result().output


class _RecordingExperts:
    """Experts that record their inputs."""

    def __init__(self, experts: LocalExperts) -> None:
        self.hidden: list[Array] = []
        self._experts = experts

    def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
        self.hidden.append(hidden.copy())
        return self._experts.begin(layer, hidden, gate)

    def forecast(self, layer: int) -> LayerForecast:
        return self._experts.forecast(layer)
