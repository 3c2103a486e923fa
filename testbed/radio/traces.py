"""Routing traces: gate probabilities of a model on real text, recorded once to be replayed many times."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import Policy, Routing, TopK
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.load import load_trunk
from common.files import atomic_write
from common.jsonl import decode_strict_json
from testbed.errors import SimulationError
from testbed.evaluation.data_sets import ChoiceItem, DomainText, read_items
from testbed.evaluation.local_experts import LocalExperts
from testbed.evaluation.quality import DOMAINS, TASKS
from testbed.radio.npz_file import read_arrays
from wire.manifest import load_manifest, sha256_file
from wire.tensors import Array

_MAX_FACTS_BYTES = 1 << 20
_MAX_DIMENSION = 1 << 20
_MAX_SCORE = 1e6
"""Probabilities are at most 1, but for routers that scale them."""


class TraceFacts(Struct, frozen=True, kw_only=True):
    """Origin of a trace.

    Attributes:
        model_sha256: `Manifest.model_sha256`.
        quantisation: of the bundle.
        hidden, intermediate, top_k: dimensions of the model.
        data_sha256: hashes of the files with the texts, by name.
        commit: commit of this project that recorded the trace.
    """

    model_sha256: str
    quantisation: str
    hidden: int
    intermediate: int
    top_k: int
    data_sha256: dict[str, str]
    commit: str


class RoutingTrace:
    """Gate probabilities of a model for several prompts.

    Attributes:
        prompts: float32 [tokens, layers, experts] per prompt: softmax over all experts, with top-k routing.
        facts: origin of the trace.
    """

    def __init__(self, prompts: Sequence[Array], facts: TraceFacts) -> None:
        self.prompts = list(prompts)
        self.facts = facts

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.prompts[0].shape[1])

    @property
    def experts(self) -> int:
        """Number of experts per layer."""
        return int(self.prompts[0].shape[2])


class _Recorder:
    """A policy that chooses like another policy, and records the probabilities."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.recorded: list[Array] = []

    def select(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Record the probabilities, and choose with the other policy.

        Raises:
            SimulationError: the model chooses by something else.
        """
        if routing.scores is None or routing.order is not None:
            raise SimulationError("only models whose router chooses the experts that it weighs most can be traced")
        self.recorded.append(routing.scores)
        return self._policy.select(routing, forecast)


def trace_prompts(model: DistributedModel, policy: Policy, prompts: Sequence[Sequence[int]]) -> list[Array]:
    """The gates' probabilities for each prompt, float32 [tokens, layers, experts].

    Attention is causal, so the probabilities are the same when the tokens are decoded one by one.

    Args:
        model: model to run; its policy is replaced.
        policy: policy that routes meanwhile.
        prompts: token ids of each prompt.
    """
    traces = []
    for ids in prompts:
        recorder = _Recorder(policy)
        model.policy = recorder
        model.step([SequenceInput(list(ids), model.trunk.new_cache())])
        traces.append(np.stack(recorder.recorded, axis=1))
    return traces


def record_trace(
    bundle: Path, data: Path, *, items: int, texts: int, tokens: int, threads: int, commit: str
) -> RoutingTrace:
    """Record a trace of a bundle's model on evaluation data, in this process.

    Args:
        bundle: bundle of the model.
        data: folder with the evaluation data, as for `wdmoe-testbed quality`.
        items: questions per task, from the beginning, in the form of the evaluation.
        texts: texts from the domains' file, spread evenly over it.
        tokens: maximum length of a prompt.
        threads: threads per expert.
        commit: commit of this project.

    Raises:
        WdmoeError: the bundle or the data can't be used.
    """
    manifest = load_manifest(bundle)
    tokenizer = Tokenizer(bundle / "trunk")
    policy = TopK(manifest.dims.top_k)
    model = DistributedModel(load_trunk(bundle / "trunk"), LocalExperts(bundle, threads=threads), policy)
    prompts = [
        f"Question: {item.question}\nAnswer:"
        for file in TASKS.values()
        for item in read_items(data / file, ChoiceItem, items)
    ]
    files = list(TASKS.values()) if items else []
    if texts:
        all_texts = read_items(data / DOMAINS, DomainText)
        prompts += [all_texts[i].text for i in np.linspace(0, len(all_texts) - 1, texts).astype(int)]
        files.append(DOMAINS)
    traces = trace_prompts(model, policy, [tokenizer.encode(prompt)[:tokens] for prompt in prompts])
    facts = TraceFacts(
        model_sha256=manifest.model_sha256,
        quantisation=str(manifest.quantisation),
        hidden=manifest.dims.hidden,
        intermediate=manifest.dims.intermediate,
        top_k=manifest.dims.top_k,
        data_sha256={file: sha256_file(data / file) for file in files},
        commit=commit,
    )
    return RoutingTrace(traces, facts)


def write_trace(trace: RoutingTrace, path: Path) -> None:
    """Write a trace as an npz file.

    It contains `probabilities` float32 [tokens, layers, experts] of all prompts, `tokens` int64 [prompts] with their
    lengths, and `facts` as JSON.
    """
    with atomic_write(path) as file:
        np.savez_compressed(
            file,
            probabilities=np.concatenate(trace.prompts),
            tokens=np.array([len(prompt) for prompt in trace.prompts], np.int64),
            facts=np.frombuffer(msgspec.json.encode(trace.facts), np.uint8),
        )


def read_trace(path: Path) -> RoutingTrace:
    """Read a trace and check it.

    Raises:
        SimulationError: the file can't be read or is not a valid trace.
    """
    try:
        arrays = read_arrays(path, {"probabilities": ("float32", 3), "tokens": ("int64", 1), "facts": ("uint8", 1)})
        if len(arrays["facts"]) > _MAX_FACTS_BYTES:
            raise ValueError(f"its facts are longer than {_MAX_FACTS_BYTES} bytes")
        facts = decode_strict_json(arrays["facts"].tobytes(), TraceFacts)
        probabilities, tokens = arrays["probabilities"], arrays["tokens"]
        _check_values(probabilities, tokens, facts)
    except OSError as error:
        raise SimulationError(f"routing trace {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise SimulationError(f"{path} is not a routing trace: {error}") from None
    return RoutingTrace(np.split(probabilities, np.cumsum(tokens)[:-1]), facts)


def _check_values(probabilities: Array, tokens: NDArray[np.int64], facts: TraceFacts) -> None:
    rows, layers, experts = probabilities.shape
    # Each compared on its own: the sum of 64-bit lengths can wrap around to the right one.
    if not rows or not layers or tokens.min(initial=0) < 0 or tokens.max(initial=0) > rows or tokens.sum() != rows:
        raise ValueError(f"its prompts' lengths don't add up to its {rows} rows of {layers} layers")
    if not (tokens > 0).all():
        raise ValueError("it has a prompt of no tokens")
    if not 1 <= facts.top_k <= experts:
        raise ValueError(f"its facts name {facts.top_k} experts per token, of {experts}")
    if not all(1 <= size <= _MAX_DIMENSION for size in (facts.hidden, facts.intermediate)):
        raise ValueError(f"its facts name impossible dimensions: {facts.hidden} and {facts.intermediate}")
    if not np.isfinite(probabilities).all() or probabilities.min() < 0 or probabilities.max() > _MAX_SCORE:
        raise ValueError("it has a probability that is negative, absurdly large or no number")
    if not (probabilities.max(axis=2) > 0).all():
        raise ValueError("it has a token whose probabilities are all zero")
