"""Finds answers that are finite and yet suspicious: from a node with faulty memory or arithmetic, or a lying one. Pure.

Size alone proves nothing: for the first token of a sequence, some layers' experts give outputs hundreds of times larger
than for any other token. So a suspicious answer is compared with another holder's.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from wire.experts import ExpertId
from wire.manifest import Manifest
from wire.probe import decode_probe_output, probe_input
from wire.tensors import Array

FACTOR = 20.0
"""A gain this many times the largest one that is known to be right is suspicious."""
ABSURD_FACTOR = 1e5
"""An answer whose gain is this many times that of the manifest's probes never counts, even without other holders."""
AGREEMENT = 0.3
"""Relative difference up to which two answers count as the same: int4 and int8 of one expert differ by 0.15."""


class OutputGuard:
    """Knows, per layer, the largest gain ‖y‖ / ‖x‖ of a row x and its experts' weighted sum y.

    It begins with the gains of the manifest's probes, not with what nodes answer: a node that lies from the start must
    not set the measure for itself.
    """

    def __init__(self, probe_gains: Sequence[float]) -> None:
        """Nothing is learnt yet.

        Args:
            probe_gains: by layer, the largest gain of the manifest's probes; 0 where it is not known, and then the
                first answer is believed.
        """
        self._probes = list(probe_gains)
        self._largest = list(probe_gains)

    def suspects(self, layer: int, gain: float) -> bool:
        """Whether an answer's largest gain is so large that another holder should be asked."""
        return gain > FACTOR * self._largest[layer] > 0

    def absurd(self, layer: int, gain: float) -> bool:
        """Whether an answer's largest gain is so large that the answer must not count."""
        return gain > ABSURD_FACTOR * self._probes[layer] > 0

    def excess(self, layer: int, gain: float) -> float:
        """A gain relative to that of the manifest's probes; 0 if that is not known."""
        return gain / self._probes[layer] if self._probes[layer] else 0.0

    def learn(self, layer: int, gain: float) -> None:
        """Take in the largest gain of an answer that was right."""
        self._largest[layer] = max(self._largest[layer], gain)


def probe_gains(manifest: Manifest) -> list[float]:
    """By layer, the largest ‖y‖ / ‖x‖ of an expert's probe output y and the probe input x, to about 5 %.

    The norms of a sliced expert's outputs are added up: a node that holds all its slices answers at most that.
    """
    hidden = manifest.dims.hidden
    size = float(np.linalg.norm(probe_input(hidden)))
    norms: defaultdict[ExpertId, float] = defaultdict(float)
    for entry in manifest.experts:
        norms[ExpertId(entry.layer, entry.expert)] += float(
            np.linalg.norm(decode_probe_output(entry.probe_output, hidden))
        )
    gains = [0.0] * manifest.dims.layers
    for id, norm in norms.items():
        gains[id.layer] = max(gains[id.layer], norm / size)
    return gains


def largest_gain(x: Array, y: Array) -> float:
    """The largest ‖y‖ / ‖x‖ of the rows of float32 [rows, hidden]; not finite if a square overflows float32."""
    if len(x) == 1:
        return math.sqrt(float(np.vdot(y, y)) / max(float(np.vdot(x, x)), 1e-24))
    shrink = np.maximum(np.einsum("ij,ij->i", x, x), np.float32(1e-24))
    return math.sqrt(float((np.einsum("ij,ij->i", y, y) / shrink).max()))


def agree(first: Array, second: Array) -> bool:
    """Whether two answers to one request, float32 [rows, hidden], differ by no more than quantisation explains."""
    size = max(float(np.linalg.norm(first)), float(np.linalg.norm(second)))
    return float(np.linalg.norm(first - second)) <= AGREEMENT * size
