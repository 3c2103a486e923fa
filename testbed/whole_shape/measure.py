"""Steps of a model with random weights: plain ones of several sequences, and ones that check draft tokens."""

import itertools
from collections.abc import Iterator
from typing import Any

from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.trunk.inputs import SequenceInput
from testbed.whole_shape.arms import ACCEPTANCE, BATCHES, Arm, StepRow

WARM_UP = 2
"""Steps after a change of links or batch, which are not kept."""
_PROMPT_TOKENS = 4
_NS = 1e6


class Decoder:
    """As many sequences as the largest batch, each with a short prompt of its own, which go on from arm to arm.

    Attributes:
        ids: by sequence, all tokens that greedy decoding has given.
    """

    def __init__(self, model: DistributedModel) -> None:
        """Read the prompts."""
        self._model = model
        self._vocab = int(model.trunk.config.vocab_size)
        self._caches = [model.trunk.new_cache() for _ in range(BATCHES[-1])]
        self.ids: list[list[int]] = [[] for _ in self._caches]
        prompts = [[self._token(4 * i + j) for j in range(_PROMPT_TOKENS)] for i in range(len(self._caches))]
        self._step([SequenceInput(prompt, cache) for prompt, cache in zip(prompts, self._caches, strict=True)])

    def steps(self, arm: Arm, count: int) -> Iterator[StepRow]:
        """Take `count` steps after the warm-up."""
        replayed = itertools.cycle(ACCEPTANCE)
        for number in range(WARM_UP + count):
            row = self._check_drafts(*next(replayed)) if arm.drafts else self._decode(arm.sequences)
            if number >= WARM_UP:
                yield row

    def _decode(self, sequences: int) -> StepRow:
        some = range(sequences)
        record = self._step([SequenceInput([self.ids[i][-1]], self._caches[i]) for i in some])
        return _row(record, sequences)

    def _check_drafts(self, drafted: int, right: int) -> StepRow:
        """A step that checks `drafted` tokens, of which `right` count as right whatever the model gives."""
        cache = self._caches[0]
        before = self._model.trunk.mark(cache).tokens
        ids = [self.ids[0][-1], *(self._token(before + i) for i in range(drafted))]
        record = self._step([SequenceInput(ids, cache, rows=list(range(len(ids))))])
        self._model.trunk.truncate(cache, before + 1 + right)
        return _row(record, 1 + right)

    def _step(self, inputs: list[SequenceInput]) -> StepRecord:
        logits, record = self._model.step(inputs)
        for ids, rows in zip(self.ids, logits, strict=False):
            ids.append(int(rows[-1].argmax()))
        return record

    def _token(self, number: int) -> int:
        """A token of a made-up text."""
        return (number * 7919 + 13) % self._vocab


def _row(record: StepRecord, tokens: int) -> StepRow:
    split: Any = record.split_ns()
    parts = {f"{part}_ms": getattr(split, part) / _NS for part in ("trunk", "network", "compute", "wait", "framing")}
    requests = sum(len(layer.dispatches) for layer in record.layers)
    return StepRow(rows=record.tokens, tokens=tokens, total_ms=record.total_ns / _NS, requests=requests, **parts)
