"""End an answer before the first of some strings. Pure."""

from collections.abc import Mapping, Sequence


class StopText:
    """Passes a text on piece by piece, and holds back an ending that may be the beginning of a stop string.

    Attributes:
        hit: a stop string was found: the text ends here.
    """

    def __init__(self, stops: Sequence[str], special_tokens: Mapping[int, str] | None = None) -> None:
        """Begin a text.

        Args:
            stops: the stop strings.
            special_tokens: names of the special tokens by id. They are no part of the text that is passed on, but
                stop strings that contain their names can match them.
        """
        self.hit = False
        self._stops = stops
        named = (special_tokens or {}).items()
        self._special = {id: name for id, name in named if any(name in stop for stop in stops)}
        self._held = ""
        self._hidden: list[bool] = []  # whether each character of `_held` belongs to a special token's name

    def push(self, text: str, id: int | None = None) -> str:
        """Add the next piece.

        Args:
            text: that the next token completes.
            id: of the token.

        Returns:
            The text that can be passed on now.
        """
        special = "" if id is None else self._special.get(id, "")
        self._held += special + text
        self._hidden += [True] * len(special) + [False] * len(text)
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
        given = "".join(c for c, hidden in zip(self._held[:length], self._hidden, strict=False) if not hidden)
        self._held, self._hidden = self._held[length:], self._hidden[length:]
        return given
