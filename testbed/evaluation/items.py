"""Measures the quality of a model's answers: multiple choice by log-likelihood, and perplexity.

Prompts and scoring follow lm-evaluation-harness: the prompt is `Question: …\\nAnswer:`, and the choice with the highest
summed log-probability counts (`acc`). Data sets are JSON Lines, with `question`, `choices` and `label` for multiple
choice, and `domain` and `text` for perplexity.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np
import torch
from msgspec import Meta, Struct
from torch import Tensor

from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import Policy, Routing
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.trunk.inputs import Packing, SequenceInput
from common.errors import WdmoeError
from common.jsonl import JsonLinesError, read_json_lines, strict_json
from wire.tensors import Array

_BATCH_ITEMS = 16
T = TypeVar("T")


class EachAlone:
    """A `Policy` that applies another policy to each token of a step separately, as in decoding one sequence.

    With it, the accuracy of a policy in decoding can be measured on many tokens at once.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def select(self, routing: Routing, forecast: LayerForecast) -> Array:
        """Select the experts of each token separately: gate weights float32 [tokens, experts]."""
        return np.concatenate(
            [self._policy.select(routing.rows(slice(i, i + 1)), forecast) for i in range(len(routing.weights))]
        )


class ChoiceItem(Struct, frozen=True):
    """One question with several answers; `choices[label]` is the right one."""

    question: str
    choices: Annotated[list[str], Meta(min_length=1)]
    label: int

    def __post_init__(self) -> None:
        if not 0 <= self.label < len(self.choices):
            raise ValueError(f"label {self.label} is none of the {len(self.choices)} choices, which count from 0")


class DomainText(Struct, frozen=True):
    """Held-out text of one domain."""

    domain: str
    text: str


def read_items(path: Path, kind: type[T], count: int | None = None) -> list[T]:
    """The first `count` items of a JSON Lines file.

    Raises:
        WdmoeError: the file is missing, or a line is not an item of this kind.
    """
    try:
        return list(islice(read_json_lines(path, lambda line: msgspec.convert(strict_json(line), kind)), count))
    except FileNotFoundError:
        raise WdmoeError(f"evaluation data {path} is missing: docs/measurement.md describes its format") from None
    except JsonLinesError as error:
        raise WdmoeError(f"not JSON Lines of {kind.__name__}: {error}") from None


def choose(
    model: DistributedModel, tokenizer: Tokenizer, items: Sequence[ChoiceItem], *, batch: int = _BATCH_ITEMS
) -> list[int]:
    """The index of the model's choice for each item.

    Args:
        batch: items per forward step.
    """
    chosen: list[int] = []
    for some in _batches(items, size=batch):
        encoded = [_encode(tokenizer, item) for item in some]
        prompts = [prompt for prompt, _ in encoded]
        choices = [(i, ids) for i, (_, choices) in enumerate(encoded) for ids in choices]
        scores = _score(model, prompts, choices)
        by_item: list[list[float]] = [[] for _ in some]
        for (i, _), score in zip(choices, scores, strict=True):
            by_item[i].append(score)
        chosen += [max(range(len(sums)), key=sums.__getitem__) for sums in by_item]
    return chosen


def _encode(tokenizer: Tokenizer, item: ChoiceItem) -> tuple[list[int], list[list[int]]]:
    """Token ids of an item's prompt, and of each choice as they follow it.

    A text encoded alone may begin with other tokens than within another: with BOS, or a space of its own. The last
    token of the prompt may also be merged with the first of a choice. What all choices share is therefore the prompt.
    """
    text = f"Question: {item.question}\nAnswer:"
    whole = [tokenizer.encode(f"{text} {choice}") for choice in item.choices]
    prompt = tokenizer.encode(text)
    shared = min(_shared(prompt, ids) for ids in whole)
    # Each choice needs a token to score, and a model needs one to begin with.
    shared = max(1, min(shared, *(len(ids) - 1 for ids in whole)))
    return prompt[:shared], [ids[shared:] for ids in whole]


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _score(
    model: DistributedModel, prompts: Sequence[list[int]], choices: Sequence[tuple[int, list[int]]]
) -> list[float]:
    """Log-likelihood of each choice after its prompt, computed in two steps for all choices.

    Args:
        choices: index of the prompt, and the token ids that follow it.
    """
    if not model.trunk.packs:
        return [_score_alone(model, prompts[i], ids) for i, ids in choices]
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
        _log_likelihood(torch.cat([first[i, None], following]), ids)
        for (i, ids), following in zip(choices, continued, strict=True)
    ]


def _score_alone(model: DistributedModel, prompt: list[int], choice: list[int]) -> float:
    """Log-likelihood of one choice, in a step of its own."""
    rows = list(range(len(prompt) - 1, len(prompt) + len(choice) - 1))
    (logits,), _ = model.step([SequenceInput([*prompt, *choice], model.trunk.new_cache(), rows=rows)])
    return _log_likelihood(logits, choice)


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


def _log_likelihood(logits: Tensor, ids: list[int]) -> float:
    log_probabilities = torch.log_softmax(logits, dim=-1)
    return float(log_probabilities.gather(1, torch.tensor(ids, dtype=torch.int64)[:, None]).sum())


def _batches(items: Sequence[T], size: int = _BATCH_ITEMS) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
