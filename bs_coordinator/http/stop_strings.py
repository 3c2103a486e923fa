"""Where an answer ends by its text: before the first of some strings. Pure."""

from collections.abc import Sequence


class StopText:
    """Gives out a text as it comes, but for what may turn out to be the beginning of a stop string.

    Attributes:
        hit: whether one was found; nothing more comes then.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.hit = False
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """What has become certain with the next piece of text."""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            # The one that is complete first, so that it does not matter in which pieces the text comes.
            self.hit = True
            return self._give(min(found)[1])
        return self._give(len(self._held) - max((self._begun(stop) for stop in self._stops), default=0))

    def rest(self) -> str:
        """What was held back, where the answer ends for another reason."""
        return self._give(len(self._held))

    def _begun(self, stop: str) -> int:
        """Length of the longest beginning of `stop` that the text ends with."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)

    def _give(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        return given
