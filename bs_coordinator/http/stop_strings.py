"""End an answer before the first of some strings. Pure."""

from collections.abc import Sequence


class StopText:
    """Passes a text on piece by piece, and holds back an ending that may be the beginning of a stop string.

    Attributes:
        hit: a stop string was found: the text ends here.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.hit = False
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """Add the next piece; returns the text that can be passed on now."""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            # The stop string that is complete first, so that the result does not depend on how the text is cut.
            self.hit = True
            return self._pass_on(min(found)[1])
        return self._pass_on(len(self._held) - max((self._started(stop) for stop in self._stops), default=0))

    def rest(self) -> str:
        """The text held back, for an answer that ends for another reason."""
        return self._pass_on(len(self._held))

    def _started(self, stop: str) -> int:
        """Length of the longest beginning of `stop` that ends the text."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)

    def _pass_on(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        return given
