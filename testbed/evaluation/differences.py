"""Measures how much the experts of each layer differ, for the policy `similar`, and finds those not to be dropped.

After SiftMoE, arXiv 2603.23888, and "Unveiling Super Experts in Mixture-of-Experts Large Language Models",
arXiv 2507.23279; `bs_coordinator.selection.differences` defines the measures.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.engine.experts import ExpertOutput, Ready
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import TopK
from bs_coordinator.selection.differences import SCHEMA, DifferenceDocument
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.load import load_trunk
from common.errors import WdmoeError
from edge_node.experts import ExpertRuntime
from wire.experts import ExpertId, units_of
from wire.manifest import load_manifest, sha256_file
from wire.tensors import Array

_EXTREME = 10.0


class _ComparedExperts:
    """Runs all experts on all tokens, and sums the relative distance of the others' outputs from each chosen expert's.

    Attributes:
        rows: int64 [layers, experts], number of tokens routed to each expert.
        sums: float64 [layers, experts, experts], summed distance of the second expert's output from the first's.
        peaks: float64 [layers, experts], largest magnitude in each expert's outputs for the tokens routed to it.
    """

    def __init__(self, runtime: ExpertRuntime, layers: int, experts: int) -> None:
        self._runtime = runtime
        self._slices = runtime.manifest.dims.slices
        self._experts = experts
        self.rows = np.zeros((layers, experts), np.int64)
        self.sums = np.zeros((layers, experts, experts))
        self.peaks = np.zeros((layers, experts))

    def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
        """Run all experts of a layer and compare their outputs (`Experts.begin`)."""
        outputs = np.stack([self._output(ExpertId(layer, e), hidden) for e in range(self._experts)])
        for expert in range(self._experts):
            rows = np.flatnonzero(gate[:, expert])
            own = outputs[expert, rows]
            distance = np.linalg.norm(outputs[:, rows] - own, axis=2) / np.maximum(np.linalg.norm(own, axis=1), 1e-30)
            self.sums[layer, expert] += distance.sum(axis=1)
            self.rows[layer, expert] += len(rows)
            self.peaks[layer, expert] = max(self.peaks[layer, expert], np.abs(own).max(initial=0))
        return Ready(ExpertOutput(np.einsum("te,etd->td", gate, outputs).astype(np.float32)))

    def _output(self, id: ExpertId, hidden: Array) -> Array:
        """An expert's output, float32 [tokens, hidden]."""
        first, *others = units_of([id], self._slices)
        output = self._runtime.run(first, hidden).copy()
        for unit in others:
            output += self._runtime.run(unit, hidden)
        return output

    def forecast(self, layer: int) -> LayerForecast:
        """Equal costs for all experts (`Experts.forecast`)."""
        return LayerForecast.even(layer, self._experts)


def measure_differences(
    bundle: Path, text: Path, *, tokens: int, chunk: int, threads: int, progress: Callable[[int], None]
) -> DifferenceDocument:
    """Measure the table of expert differences of a bundle on a text.

    Args:
        text: UTF-8 file.
        tokens: number of tokens to use, from the beginning of the text.
        chunk: tokens per forward step; each step has its own context.
        progress: called with the number of tokens done.

    Raises:
        WdmoeError: the text can't be read, or is too short to reach every expert.
    """
    manifest = load_manifest(bundle)
    dims = manifest.dims
    tokenizer = Tokenizer(bundle / "trunk")
    ids = _read(text, tokenizer, tokens)
    trunk = load_trunk(bundle / "trunk")
    runtime = ExpertRuntime(bundle, manifest, [e.id for e in manifest.experts], threads=threads)
    experts = _ComparedExperts(runtime, dims.layers, dims.experts)
    model = DistributedModel(trunk, experts, TopK(dims.top_k))
    for start in range(0, len(ids), chunk):
        model.step([SequenceInput(list(ids[start : start + chunk]), trunk.new_cache())])
        progress(min(start + chunk, len(ids)))
    if (experts.rows == 0).any():
        layer, expert = np.argwhere(experts.rows == 0)[0].tolist()
        raise WdmoeError(
            f"{len(ids)} tokens of {text} never reached {ExpertId(layer, expert)}: use more, and more varied, text"
        )
    return DifferenceDocument(
        schema=SCHEMA,
        model_sha256=manifest.model_sha256,
        text_sha256=sha256_file(text),
        tokens=len(ids),
        rows=experts.rows.tolist(),
        differences=(experts.sums / experts.rows[:, :, None]).round(5).tolist(),
        peaks=experts.peaks.round(4).tolist(),
        super_experts=find_super_experts(experts.peaks),
    )


def find_super_experts(peaks: NDArray[np.float64]) -> list[tuple[int, int]]:
    """The experts (layer, expert) whose outputs are extreme: a few, or none.

    Their peak is above the 99.5th percentile of all experts, above a tenth of the largest (both as in arXiv
    2507.23279), and above `_EXTREME` times the median. The paper looks instead only at layers in which the hidden
    states' massive activations arise; the median keeps the largest of ordinary experts from being taken for one.

    Args:
        peaks: float64 [layers, experts], largest magnitude in each expert's outputs.
    """
    limit = max(np.percentile(peaks, 99.5), peaks.max() / 10, _EXTREME * np.median(peaks))
    # Not above but from the percentile on: of few experts, it is the largest one.
    return [(int(layer), int(expert)) for layer, expert in np.argwhere((peaks >= limit) & (peaks > 0))]


def _read(text: Path, tokenizer: Tokenizer, tokens: int) -> Sequence[int]:
    try:
        ids = tokenizer.encode(text.read_text("utf-8"))[:tokens]
    except OSError as error:
        raise WdmoeError(f"can't read {text}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise WdmoeError(f"{text} is not UTF-8 text") from None
    if len(ids) < tokens:
        raise WdmoeError(f"{text} has {len(ids)} tokens, but --tokens needs {tokens}")
    return ids
