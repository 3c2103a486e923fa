"""How good a model's answers are: multiple choice by log-likelihood, and perplexity.

Prompts and scoring follow lm-evaluation-harness: `Question: …\\nAnswer:`, and of the choices the one with the
highest summed log-probability (`acc`). Items are JSON lines with `question`, `choices` and `label`; texts for
perplexity have `domain` and `text`.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from bs_coordinator.generate import Tokenizer
from bs_coordinator.model import DistributedMixtral, Feed
from wire.errors import WdmoeError

_BATCH_ITEMS = 16
T = TypeVar("T")


class ChoiceItem(Struct, frozen=True):
    """One question with several answers, of which `choices[label]` is right."""

    question: str
    choices: list[str]
    label: int


class DomainText(Struct, frozen=True):
    """Held-out text of one domain."""

    domain: str
    text: str


def read_items(path: Path, kind: type[T], count: int | None = None) -> list[T]:
    """The first `count` JSON lines of a file.

    Raises:
        WdmoeError: the file is missing or a line is not such an item.
    """
    try:
        lines = path.read_bytes().splitlines()[:count]
        return [msgspec.json.decode(line, type=kind) for line in lines]
    except FileNotFoundError:
        raise WdmoeError(f"evaluation data {path} is missing: see docs/measurement.md for its format") from None
    except msgspec.DecodeError as error:
        raise WdmoeError(f"{path} is not JSON lines of {kind.__name__}: {error}") from None


def choose(model: DistributedMixtral, tokenizer: Tokenizer, items: Sequence[ChoiceItem]) -> list[int]:
    """The model's choice for each item."""
    chosen: list[int] = []
    for batch in _batches(items):
        prompts = [tokenizer.encode(f"Question: {item.question}\nAnswer:") for item in batch]
        feeds = [Feed(prompt, model.trunk.new_cache()) for prompt in prompts]
        logits, _ = model.step(feeds)
        # Every choice continues its own copy of its question's cache.
        choice_ids = [[tokenizer.encode(f" {choice}") for choice in item.choices] for item in batch]
        flat = [
            Feed(ids, copy.deepcopy(feed.cache))
            for feed, choices in zip(feeds, choice_ids, strict=True)
            for ids in choices
        ]
        continued, _ = model.step(flat, all_logits=True)
        scores = iter(continued)
        for last, choices in zip(logits, choice_ids, strict=True):
            sums = [
                _log_likelihood(torch.cat([last, scored[:-1]]), ids)
                for ids, scored in zip(choices, scores, strict=False)
            ]
            chosen.append(max(range(len(sums)), key=sums.__getitem__))
    return chosen


def losses(
    model: DistributedMixtral, tokenizer: Tokenizer, texts: Sequence[str], *, tokens: int
) -> list[tuple[float, int]]:
    """Per text the summed negative log-likelihood (nats) and the number of predicted tokens.

    Args:
        tokens: of each text at most this many from its beginning.
    """
    result: list[tuple[float, int]] = []
    for batch in _batches(texts, size=4):
        ids = [tokenizer.encode(text)[:tokens] for text in batch]
        logits, _ = model.step([Feed(i, model.trunk.new_cache()) for i in ids], all_logits=True)
        result += [(-_log_likelihood(scored[:-1], i[1:]), len(i) - 1) for scored, i in zip(logits, ids, strict=True)]
    return result


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share = right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def _log_likelihood(logits: Tensor, ids: list[int]) -> float:
    log_probabilities = torch.log_softmax(logits, dim=-1)
    return float(log_probabilities.gather(1, torch.tensor(ids)[:, None]).sum())


def _batches(items: Sequence[T], size: int = _BATCH_ITEMS) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
