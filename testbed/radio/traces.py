"""Routing traces: how a model's routers score experts on real text, recorded once to be replayed many times."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import Policy, Routing, TopK
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.routing import join_routings, top_weights
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
"""Probabilities are at most 1, but for routers that scale them or add a bias."""


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


@dataclass(frozen=True, slots=True, eq=False)
class PromptRouting:
    """Routing of some tokens of one prompt, in all layers.

    Attributes:
        scores: float32 [tokens, layers, experts], `Routing.scores` of each layer: softmax over all experts, or sigmoid.
        order: float32 of the same shape, `Routing.order`; None where `scores` decide.
    """

    scores: Array
    order: Array | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.scores)

    def token(self, index: int) -> "PromptRouting":
        """The routing of one token."""
        return PromptRouting(self.scores[index][None], None if self.order is None else self.order[index][None])

    def layer(self, layer: int, top_k: int) -> Routing:
        """The routing of a layer. The weights of a token's `top_k` experts add up to 1, as no time depends on them."""
        scores = np.ascontiguousarray(self.scores[:, layer])
        order = None if self.order is None else np.ascontiguousarray(self.order[:, layer])
        return Routing(top_weights(scores, top_k, order), scores, order)


class RoutingTrace:
    """Routing of a model for several prompts.

    Attributes:
        prompts: routing of each prompt; all have `order`, or none has.
        facts: origin of the trace.
    """

    def __init__(self, prompts: Iterable[PromptRouting], facts: TraceFacts) -> None:
        self.prompts = list(prompts)
        self.facts = facts

    @property
    def tokens(self) -> int:
        """Number of tokens of all prompts."""
        return sum(prompt.tokens for prompt in self.prompts)

    @property
    def layers(self) -> int:
        """Number of layers with experts."""
        return int(self.prompts[0].scores.shape[1])

    @property
    def experts(self) -> int:
        """Number of experts per layer."""
        return int(self.prompts[0].scores.shape[2])


class _Recorder:
    """A policy that chooses like another policy, and records what it chose by."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._recorded: defaultdict[int, list[Routing]] = defaultdict(list)

    def select(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Record the routing, and choose with the other policy.

        Raises:
            SimulationError: the router follows no rule that gives every expert a score.
        """
        if routing.scores is None:
            raise SimulationError(
                "this model can't be traced: how its router scores the experts that it does not choose is not known"
            )
        self._recorded[forecast.layer].append(routing)
        return self._policy.select(routing, forecast)

    def recorded(self) -> PromptRouting:
        """What was recorded; a long prompt goes through each layer in pieces."""
        layers = [join_routings(pieces) for _, pieces in sorted(self._recorded.items())]
        scores = [layer.scores for layer in layers if layer.scores is not None]
        orders = [layer.order for layer in layers]
        if all(order is None for order in orders):
            return PromptRouting(np.stack(scores, axis=1))
        # A layer without a bias chooses by its scores.
        both = zip(scores, orders, strict=True)
        return PromptRouting(
            np.stack(scores, axis=1), np.stack([s if order is None else order for s, order in both], axis=1)
        )


def trace_prompts(model: DistributedModel, policy: Policy, prompts: Sequence[Sequence[int]]) -> list[PromptRouting]:
    """The routing of each prompt.

    Attention is causal, so the routing is the same when the tokens are decoded one by one.

    Args:
        model: model to run; its policy is replaced.
        policy: policy that routes meanwhile.
        prompts: token ids of each prompt.

    Raises:
        SimulationError: the model's router follows no rule that gives every expert a score.
    """
    traces = []
    for ids in prompts:
        recorder = _Recorder(policy)
        model.policy = recorder
        model.step([SequenceInput(list(ids), model.trunk.new_cache())])
        traces.append(recorder.recorded())
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

    It contains `probabilities` float32 [tokens, layers, experts], the scores of all prompts, `tokens` int64 [prompts]
    with their lengths, `facts` as JSON and, for models that choose by something else than the scores, `order` of the
    same type and shape as `probabilities`.
    """
    arrays: dict[str, Any] = {
        "probabilities": np.concatenate([prompt.scores for prompt in trace.prompts]),
        "tokens": np.array([prompt.tokens for prompt in trace.prompts], np.int64),
        "facts": np.frombuffer(msgspec.json.encode(trace.facts), np.uint8),
    }
    if orders := [prompt.order for prompt in trace.prompts if prompt.order is not None]:
        arrays["order"] = np.concatenate(orders)
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


def read_trace(path: Path) -> RoutingTrace:
    """Read a trace and check it.

    Raises:
        SimulationError: the file can't be read or is not a valid trace.
    """
    try:
        arrays = read_arrays(
            path,
            {"probabilities": ("float32", 3), "tokens": ("int64", 1), "facts": ("uint8", 1)},
            optional={"order": ("float32", 3)},
        )
        if len(arrays["facts"]) > _MAX_FACTS_BYTES:
            raise ValueError(f"its facts are longer than {_MAX_FACTS_BYTES} bytes")
        facts = decode_strict_json(arrays["facts"].tobytes(), TraceFacts)
        probabilities, tokens, order = arrays["probabilities"], arrays["tokens"], arrays.get("order")
        _check_values(probabilities, tokens, facts)
        if order is not None:
            _check_order(order, probabilities.shape)
    except OSError as error:
        raise SimulationError(f"routing trace {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise SimulationError(f"{path} is not a routing trace: {error}") from None
    ends = np.cumsum(tokens)[:-1]
    scores = np.split(probabilities, ends)
    orders = [None] * len(scores) if order is None else np.split(order, ends)
    return RoutingTrace(map(PromptRouting, scores, orders), facts)


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
        raise ValueError("it has a probability that is negative, absurdly large or not a number")
    if not (probabilities.max(axis=2) > 0).all():
        raise ValueError("it has a token whose probabilities are all zero")


def _check_order(order: Array, shape: tuple[int, ...]) -> None:
    if order.shape != shape:
        raise ValueError(f"'order' is {list(order.shape)}, but 'probabilities' {list(shape)}")
    if not np.isfinite(order).all() or np.abs(order).max() > _MAX_SCORE:
        raise ValueError("'order' has a value that is absurdly large or not a number")
