"""Measures how well a model predicts texts: multiple choice by log-likelihood, last words, and perplexity.

Scoring follows lm-evaluation-harness: the choice with the highest summed log-probability counts (`acc`), and a last
word counts if all its tokens are the likeliest ones.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import Policy, Routing
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.policy import SelectsEach
from bs_coordinator.trunk.inputs import Packing, SequenceInput
from testbed.evaluation.data_sets import Alternative, ChoiceItem, LastWordItem, alternatives, last_word
from testbed.plan.schema import Form
from wire.tensors import Array

_BATCH_ITEMS = 16
_EACH_TOKENS = 64
"""Tokens selected for in one call, few enough for a policy's intermediate results to stay in a core's cache."""
T = TypeVar("T")


class EachAlone:
    """A `Policy` that applies another policy to each token of a step separately, as in decoding one sequence.

    With it, the accuracy of a policy in decoding can be measured on many tokens at once.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def select(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Select the experts of each token separately: gate weights float32 [tokens, experts]."""
        each, size = (
            (self._policy.select_each, _EACH_TOKENS)
            if isinstance(self._policy, SelectsEach)
            else (self._policy.select, 1)
        )
        return np.concatenate(
            [each(routing.rows(slice(i, i + size)), forecast) for i in range(0, len(routing.weights), size)]
        )


class Scored(NamedTuple):
    """How well a model predicts a continuation.

    Attributes:
        log_likelihood: summed, in nats.
        greedy: whether greedy decoding from the context gives exactly this continuation.
    """

    log_likelihood: float
    greedy: bool


def choose(
    model: DistributedModel,
    tokenizer: Tokenizer,
    items: Sequence[ChoiceItem],
    *,
    form: Form = "question",
    batch: int = _BATCH_ITEMS,
    separately: bool = False,
) -> list[int]:
    """The index of the model's choice for each item: the alternative with the highest summed log-likelihood.

    Args:
        batch: items per forward step.
        separately: compute each alternative with its context in a step of its own, as a server does.
    """
    chosen: list[int] = []
    for some in _batches(items, size=batch):
        scores = _score(model, tokenizer, [alternatives(item, form) for item in some], separately=separately)
        chosen += [max(range(len(by)), key=[s.log_likelihood for s in by].__getitem__) for by in scores]
    return chosen


def score_last_words(
    model: DistributedModel, tokenizer: Tokenizer, items: Sequence[LastWordItem], *, batch: int = _BATCH_ITEMS
) -> list[Scored]:
    """How well the model predicts the last word of each text.

    Args:
        batch: items per forward step.
    """
    scored: list[Scored] = []
    for some in _batches(items, size=batch):
        scored += [score for (score,) in _score(model, tokenizer, [[last_word(item)] for item in some])]
    return scored


class _Encoded(NamedTuple):
    """Token ids of a context, and of the continuations that follow it."""

    context: list[int]
    continuations: list[list[int]]


def _encode(tokenizer: Tokenizer, some: Sequence[Alternative]) -> _Encoded:
    """Token ids of alternatives with one context, each as it follows the context.

    A text encoded alone may begin with other tokens than within another: with BOS, or a space of its own. The last
    token of the context may also be merged with the first of a continuation. What all share is therefore the context.
    """
    context = tokenizer.encode(some[0].context)
    whole = [tokenizer.encode(context + continuation) for context, continuation in some]
    shared = min(_shared(context, ids) for ids in whole)
    # Each continuation needs a token to score, and a model needs one to begin with.
    shared = max(1, min(shared, *(len(ids) - 1 for ids in whole)))
    return _Encoded(context[:shared], [ids[shared:] for ids in whole])


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _score(
    model: DistributedModel,
    tokenizer: Tokenizer,
    items: Sequence[Sequence[Alternative]],
    *,
    separately: bool = False,
) -> list[list[Scored]]:
    """How well the model predicts each alternative of each item.

    Equal contexts of an item are computed once, unless everything is computed separately.
    """
    encoded = [
        [_encode(tokenizer, list(group)) for _, group in groupby(some, key=lambda alternative: alternative.context)]
        for some in items
    ]
    flat = [group for groups in encoded for group in groups]
    continuations = [(i, ids) for i, group in enumerate(flat) for ids in group.continuations]
    prompts = [group.context for group in flat]
    if separately or not model.trunk.packs:
        found = [_score_alone(model, prompts[i], ids) for i, ids in continuations]
    else:
        found = _score_ids(model, prompts, continuations)
    scores = iter(found)
    return [list(islice(scores, sum(len(group.continuations) for group in groups))) for groups in encoded]


def _score_ids(
    model: DistributedModel, prompts: Sequence[list[int]], choices: Sequence[tuple[int, list[int]]]
) -> list[Scored]:
    """How well the model predicts each continuation of its prompt, computed in two steps for all of them.

    Args:
        prompts: token ids.
        choices: index of the prompt, and the token ids that follow it.
    """
    cache = model.trunk.new_cache()
    owner = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor([len(p) for p in prompts]))
    ends = [sum(len(p) for p in prompts[: i + 1]) - 1 for i in range(len(prompts))]
    packing = Packing(_positions([len(p) for p in prompts]), _own_past(owner))
    (first,), _ = model.step([SequenceInput([id for p in prompts for id in p], cache, packing, ends)])
    # The prompt predicts the first token of a choice, and each token the next: the last one isn't needed as input.
    seen = [ids[:-1] for _, ids in choices]
    lengths = [len(ids) for ids in seen]
    rest = torch.empty((0, first.shape[1]))
    if sum(lengths):
        which = torch.repeat_interleave(torch.arange(len(choices)), torch.tensor(lengths))
        prompt = torch.tensor([i for i, _ in choices])[which]
        starts = torch.tensor([len(p) for p in prompts])[prompt]
        visible = torch.cat([prompt[:, None] == owner[None], _own_past(which)], dim=1)
        ids = [id for ids in seen for id in ids]
        feed = SequenceInput(ids, cache, Packing(starts + _positions(lengths), visible), list(range(len(ids))))
        (rest,), _ = model.step([feed])
    continued = torch.split(rest, lengths)
    return [
        _scored(torch.cat([first[i, None], following]), ids)
        for (i, ids), following in zip(choices, continued, strict=True)
    ]


def _score_alone(model: DistributedModel, prompt: list[int], choice: list[int]) -> Scored:
    """How well the model predicts one continuation, in a step of its own."""
    rows = list(range(len(prompt) - 1, len(prompt) + len(choice) - 1))
    (logits,), _ = model.step([SequenceInput([*prompt, *choice], model.trunk.new_cache(), rows=rows)])
    return _scored(logits, choice)


def _positions(lengths: Sequence[int]) -> Tensor:
    """Positions 0, 1, … of each of several sequences in a row, int64 [sum of lengths]."""
    return torch.cat([torch.arange(n) for n in lengths])


def _own_past(owner: Tensor) -> Tensor:
    """Causal mask within each sequence, bool [tokens, tokens]."""
    return (owner[:, None] == owner[None]).tril()


def losses(
    model: DistributedModel, tokenizer: Tokenizer, texts: Sequence[str], *, tokens: int
) -> list[tuple[float, int]]:
    """Summed negative log-likelihood in nats and number of predicted tokens, by text.

    Args:
        tokens: use at most this many tokens from the beginning of each text.
    """
    result: list[tuple[float, int]] = []
    for batch in _batches(texts, size=4):
        ids = [tokenizer.encode(text)[:tokens] for text in batch]
        logits, _ = model.step([SequenceInput(i, model.trunk.new_cache()) for i in ids], all_logits=True)
        result += [(-_log_likelihood(scored[:-1], i[1:]), len(i) - 1) for scored, i in zip(logits, ids, strict=True)]
    return result


def _scored(logits: Tensor, ids: list[int]) -> Scored:
    return Scored(_log_likelihood(logits, ids), logits.argmax(dim=-1).tolist() == ids)


def _log_likelihood(logits: Tensor, ids: list[int]) -> float:
    log_probabilities = torch.log_softmax(logits, dim=-1)
    return float(log_probabilities.gather(1, torch.tensor(ids, dtype=torch.int64)[:, None]).sum())


def _batches(items: Sequence[T], *, size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
