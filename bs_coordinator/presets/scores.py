"""What choices cost in quality, as measured with the demo models (docs/results.md, docs/performance.md).

A choice that changes answers is made only for a model on which it was measured: what a model loses depends on how it
was trained (docs/policies.md).
"""

from typing import NamedTuple

_FIRST = "8bb31b3f4496b7604494232389dedb51e6dab8a46d04997220d75fb82f9ebbc0"
"""`Manifest.model_sha256` of smol-mixtral-8x135m."""
_SECOND = "f8aeb8b2a749ef1e882494762136d2b79e6a25103bef6dd709f3b282a1019814"
"""Of smol-qwen3moe-16x."""

MOST_LOST_POINTS = 1.0
"""How much a preset may lose: points of accuracy, mean of six data sets."""
MOST_PERPLEXITY = 0.01
"""How much perplexity may rise, as a share, where accuracy was not measured. It shows losses before accuracy does."""


class PolicyScore(NamedTuple):
    """A policy compared with the model's own choice, on links of which some are slow.

    Attributes:
        waits_less: share of the layer wait saved, on links of their own and on one channel.
        points: change of accuracy in points, mean of six data sets, on both.
        perplexity: change of perplexity, as a share, where every token chooses alone.
    """

    policy: str
    waits_less: tuple[float, float]
    points: tuple[float, float]
    perplexity: float


POLICIES: dict[str, tuple[PolicyScore, ...]] = {
    _FIRST: (PolicyScore("subset", (0.42, 0.32), (0.3, 0.1), 10.0 / 9.49 - 1),),
    _SECOND: (PolicyScore("subset", (0.34, 0.39), (-3.1, -5.3), 23.7 / 9.28 - 1),),
}
"""By model, the policies that need no table of the model, except those that are worse in both respects."""

INT8_WIRE: dict[str, float] = {_FIRST: 0.036}
"""By model, the change of perplexity with int8 on the wire instead of fp32, as a share."""
