"""Accuracy of the model's answers while a policy sees the simulated links: the cost of dropped experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.engine.experts import Experts, Pending
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import Policy
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.trunk.load import load_trunk
from testbed.evaluation.data_sets import ChoiceItem, read_items
from testbed.evaluation.local_experts import LocalExperts
from testbed.evaluation.quality import TASKS
from testbed.evaluation.scoring import choose
from testbed.radio.setting import Cell
from wire.tensors import Array


class SimulatedLinks:
    """Experts (`bs_coordinator.engine.experts.Experts`) with the forecasts of a simulated cell.

    Attributes:
        draw: channel draw to forecast.
        pairs: number of (token, expert) pairs requested so far.
        tokens: number of hidden states sent so far, over all layers.
    """

    def __init__(self, experts: Experts, cell: Cell) -> None:
        self._experts = experts
        self._cell = cell
        self.draw = 0
        self.pairs = 0
        self.tokens = 0

    def begin(self, layer: int, hidden: Array, gate: Array) -> Pending:
        """Count the requested pairs, and begin computing with the underlying experts."""
        self.pairs += int(np.count_nonzero(gate))
        self.tokens += len(gate)
        return self._experts.begin(layer, hidden, gate)

    def forecast(self, layer: int) -> LayerForecast:
        """The forecast of the simulated links for a layer, in the current draw."""
        return self._cell.forecast(self.draw, layer)


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Answers to the evaluation data under one policy.

    Attributes:
        right: by task bool [items], whether each item was answered correctly.
        asked: requested (token, expert) pairs per token and layer.
    """

    right: dict[str, NDArray[np.bool_]]
    asked: float


def evaluate(
    bundle: Path, data: Path, cell: Cell, policies: Sequence[Policy], *, items: int, batch: int, threads: int
) -> list[Answers]:
    """Evaluate a bundle's model in this process under each policy, all on the same items and draws.

    Args:
        bundle: bundle of the model.
        data: folder with the files of `TASKS`.
        cell: simulated cell.
        policies: policies to evaluate.
        items: number of items per task, from the beginning.
        batch: items per forward step; they share a channel draw and the policy's decision.
        threads: threads per expert.

    Raises:
        WdmoeError: the bundle or the data can't be used.
    """
    tokenizer = Tokenizer(bundle / "trunk")
    trunk, experts = load_trunk(bundle / "trunk"), LocalExperts(bundle, threads=threads)
    questions = {task: read_items(data / file, ChoiceItem, items) for task, file in TASKS.items()}
    answers = []
    for policy in policies:
        links = SimulatedLinks(experts, cell)
        model = DistributedModel(trunk, links, policy)
        right = {}
        for task, all_ in questions.items():
            chosen: list[int] = []
            for start in range(0, len(all_), batch):
                links.draw = start // batch % cell.draws
                chosen += choose(model, tokenizer, all_[start : start + batch], batch=batch)
            right[task] = np.array([c == item.label for c, item in zip(chosen, all_, strict=True)])
        answers.append(Answers(right, links.pairs / links.tokens))
    return answers
