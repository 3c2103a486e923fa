"""Steps of a model with random weights: plain ones of several sequences, and ones that check draft tokens.

Sequences get made-up tokens, each its own. Greedy decoding of random weights soon repeats one token in all sequences,
whose rows would then ask the same experts.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.selection.forecast import Index
from bs_coordinator.trunk.inputs import SequenceInput
from testbed.whole_shape.arms import ACCEPTANCE, BATCHES, Arm, StepRow

WARM_UP = 2
"""Steps after a change of links or batch, which are not kept."""
_PROMPT_TOKENS = 4
_RECORDED_LAYERS = 24
"""Layers of steps from which the routing is known, of all recorded steps together."""
_NS = 1e6


class Decoder:
    """As many sequences as the largest batch, each with a short prompt of its own, which go on from arm to arm.

    Attributes:
        ids: by sequence, the model's greedy choice after each step.
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
            row, _ = self._check_drafts(*next(replayed)) if arm.drafts else self._decode(arm.sequences)
            if number >= WARM_UP:
                yield row

    def routing(self, top_k: int) -> dict[int, Index]:
        """Which experts steps ask, by their number of rows: intp [steps, layers, rows, k], of all batches and drafts.

        The rows of a step resemble each other, so they ask fewer experts than rows drawn independently.
        """
        steps = -(-_RECORDED_LAYERS // self._model.trunk.layers)
        found: dict[int, list[Index]] = {}
        for _ in range(steps):
            for sequences in BATCHES:
                found.setdefault(sequences, []).append(_experts(self._decode(sequences)[1], top_k))
            for drafted, right in sorted(set(ACCEPTANCE)):
                found.setdefault(1 + drafted, []).append(_experts(self._check_drafts(drafted, right)[1], top_k))
        return {rows: np.stack(some) for rows, some in found.items()}

    def _decode(self, sequences: int) -> tuple[StepRow, StepRecord]:
        some = range(sequences)
        record = self._step([SequenceInput([self._token(31 * len(self.ids[i]) + i)], self._caches[i]) for i in some])
        return _row(record, sequences), record

    def _check_drafts(self, drafted: int, right: int) -> tuple[StepRow, StepRecord]:
        """A step that checks `drafted` tokens, of which `right` count as right whatever the model gives."""
        cache = self._caches[0]
        before = self._model.trunk.mark(cache).tokens
        ids = [self._token(before + i) for i in range(1 + drafted)]
        record = self._step([SequenceInput(ids, cache, rows=list(range(len(ids))))])
        self._model.trunk.truncate(cache, before + 1 + right)
        return _row(record, 1 + right), record

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


def _experts(record: StepRecord, top_k: int) -> Index:
    """The experts that each row asked, intp [layers, rows, k]."""
    gates = [np.concatenate([gate for gate, _ in layer.asked]) for layer in record.layers]
    return np.argpartition(-np.stack(gates), top_k - 1, axis=-1)[..., :top_k].astype(np.intp)
