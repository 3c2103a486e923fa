"""How many tokens to draft: from measured costs and measured acceptance. Pure.

A step with k drafts yields 1 + a + a² + … + aᵏ tokens on average, a being the share of drafts that is accepted, and
takes `fixed + k · (row + draft)` (Leviathan et al., arXiv 2211.17192, with the link's round trips as the fixed part).
The length is the k with the most tokens per second; where that is 0, nothing is drafted but for a rare look at
whether it would pay by now.
"""

MAX_DRAFT = 15
"""With the token before them, as many rows as the trunk runs as if each were alone."""

_MEMORY = 0.9
_LOOK_EVERY = 24
_FIRST_ACCEPTANCE = 0.6
_LEAST_GAIN = 1.05
"""What drafting must promise before it is done: estimates err, and plain decoding is safe."""


class StepCost:
    """What a decoding step costs: a line through what was measured, recent steps first.

    Shared by all sequences of a model.
    """

    def __init__(self, *, fixed_s: float = 0.1, row_s: float = 0.005) -> None:
        """Assume something until there is more than one size to compare.

        Args:
            fixed_s: of a step with one token.
            row_s: of each further token.
        """
        self._fixed_s = fixed_s
        self._row_s = row_s
        self._seen = False

    def observe(self, rows: int, seconds: float) -> None:
        """Take in one step."""
        if rows <= 1:
            self._fixed_s = seconds if not self._seen else _MEMORY * self._fixed_s + (1 - _MEMORY) * seconds
            self._seen = True
            return
        row_s = max(0.0, (seconds - self._fixed_s) / (rows - 1))
        # A single slow step should not end drafting: what one step adds is bounded.
        self._row_s = _MEMORY * self._row_s + (1 - _MEMORY) * min(row_s, self._fixed_s)

    def seconds(self, rows: int) -> float:
        """Expected time of a step with `rows` tokens."""
        return self._fixed_s + max(0, rows - 1) * self._row_s


class DraftLength:
    """The draft length of one sequence."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._acceptance = _FIRST_ACCEPTANCE
        self._draft_s = 0.0
        self._since_look = 0

    def choose(self) -> int:
        """How many tokens to draft now."""
        plain = 1.0 / self._cost.seconds(1)
        best, best_rate = 0, plain * _LEAST_GAIN
        tokens, chain = 1.0, 1.0
        for count in range(1, MAX_DRAFT + 1):
            chain *= self._acceptance
            tokens += chain
            rate = tokens / (self._cost.seconds(1 + count) + count * self._draft_s)
            if rate > best_rate:
                best, best_rate = count, rate
        if best == 0:
            self._since_look += 1
            if self._since_look >= _LOOK_EVERY:
                self._since_look = 0
                return 1
        return best

    def observe(self, drafted: int, accepted: int, draft_s: float) -> None:
        """Take in what became of a draft, and what making it took."""
        if drafted == 0:
            return
        # Drafts after the first refused one were not judged.
        for judged in [1.0] * accepted + [0.0] * (accepted < drafted):
            self._acceptance = _MEMORY * self._acceptance + (1 - _MEMORY) * judged
        self._draft_s = 0.5 * (self._draft_s + draft_s / drafted)
