"""From logits to a token."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from bs_coordinator.config import SamplingConfig

_MIN_TEMPERATURE = 1e-4
"""Below this, logits would overflow, and the most probable token is drawn anyway."""


class TokenSampler:
    """Chooses tokens by a `SamplingConfig`; holds the state of its random number generator."""

    def __init__(self, config: SamplingConfig) -> None:
        self._greedy = config.temperature < _MIN_TEMPERATURE
        self._generator = torch.Generator().manual_seed(config.seed)
        self._skip = config.skip
        self._warpers = []
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(config.temperature))
            if config.top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(config.top_p))

    def choose(self, logits: Tensor) -> int:
        """The next token id from logits [1, vocab] on the CPU."""
        if self._greedy:
            return int(logits.argmax(dim=-1))
        return self._draw(self._probabilities(logits))

    def verify(self, logits: Tensor, rows: Mapping[tuple[int, ...], int]) -> list[int]:
        """The next tokens, given logits after each token of a draft: the accepted draft tokens, then one more.

        Each token is drawn as it would be without a draft, with the same random numbers, and a branch of the draft is
        followed for as long as it agrees. A draft token d is thereby accepted with probability p(d), and its
        replacement is distributed as p without d: the rejection rule of Leviathan et al. (arXiv 2211.17192) for drafts
        that put all their probability on one token. The result also equals, token by token, what the seed gives without
        drafts.

        Args:
            logits: [rows, vocab] on the CPU.
            rows: the row of logits after each branch of the draft, and after none of its tokens.
        """
        chosen: list[int] = []
        while (row := rows.get(tuple(chosen))) is not None:
            chosen.append(self.choose(logits[row][None]))
        return chosen

    def _probabilities(self, logits: Tensor) -> Tensor:
        for _ in range(self._skip):
            # A draw consumes one random number per vocabulary entry, whatever the probabilities.
            torch.multinomial(torch.ones_like(logits), 1, generator=self._generator)
        self._skip = 0
        for warper in self._warpers:
            logits = warper(None, logits)
        return torch.softmax(logits, dim=-1)

    def _draw(self, probabilities: Tensor) -> int:
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
