"""What one HTTP request got: numbers of tokens, and the times that they took."""

from collections.abc import Mapping
from typing import Any

from bs_coordinator.http.openai_responses import Token
from common.clock import Clock


class Tally:
    """Adds up the tokens of a request's choices as they come.

    Attributes:
        prompt_tokens: of all prompts together.
        new_tokens: of all choices together.
        degraded: new tokens that were computed without some expert.
        first_token_s: from the request's arrival to the first token; None before.
    """

    def __init__(self, clock: Clock) -> None:
        """The request arrives now."""
        self.prompt_tokens = self.new_tokens = self.degraded = 0
        self.first_token_s: float | None = None
        self._clock = clock
        self._began_s = clock.monotonic_s()
        self._spans: dict[int, tuple[float, float]] = {}
        self._drafted = self._accepted = self._step_ns = self._wait_ns = 0

    def add(self, index: int, token: Token) -> None:
        """Take in the next token of a choice."""
        now_s = self.elapsed_s
        if self.first_token_s is None:
            self.first_token_s = now_s
        self._spans[index] = (self._spans.get(index, (now_s,))[0], now_s)
        self.new_tokens += 1
        self.degraded += token.degraded
        self._drafted += token.drafted
        self._accepted += token.accepted
        self._step_ns += token.step_ns
        self._wait_ns += token.wait_ns

    @property
    def elapsed_s(self) -> float:
        """Since the request's arrival."""
        return self._clock.monotonic_s() - self._began_s

    @property
    def usage(self) -> dict[str, int]:
        """The `usage` field of a response."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
        }

    def details(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """The `wdmoe` field of a response.

        Args:
            about: how the base station is configured, such as its policy, and which options it ignored.
        """
        details: dict[str, Any] = {"degraded_tokens": self.degraded, **about}
        if self._drafted:
            details |= {"drafted_tokens": self._drafted, "accepted_tokens": self._accepted}
        if self.first_token_s is not None:
            details["ttft_ms"] = round(1e3 * self.first_token_s, 2)
        if (gaps := self.new_tokens - len(self._spans)) > 0:
            decoding_s = sum(last_s - first_s for first_s, last_s in self._spans.values())
            details["tpot_ms"] = round(1e3 * decoding_s / gaps, 2)
        if self._step_ns:
            details["layer_wait_share"] = round(self._wait_ns / self._step_ns, 3)
        return details
