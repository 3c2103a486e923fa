"""Metrics of requests: how many, what became of them, and their latencies as their callers see them."""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from bs_coordinator.engine.scheduler import Progress
from bs_coordinator.engine.sequence import StopReason
from bs_coordinator.errors import (
    AnswerError,
    BusyError,
    ContextLengthError,
    DispatchError,
    ExpertsLostError,
    PlacementError,
)
from bs_coordinator.http.observers import AnswerObserver
from bs_coordinator.http.requests import Request
from common.clock import Clock
from common.errors import WdmoeError
from wire.errors import BrokerError

_FINISHED: dict[StopReason, str] = {"eos": "eos", "max-tokens": "max_tokens", "context": "context"}
_FAILED: tuple[tuple[type[WdmoeError], str], ...] = (
    (ContextLengthError, "context"),
    (AnswerError, "answer"),
    (ExpertsLostError, "experts_lost"),
    (PlacementError, "experts_lost"),
    (DispatchError, "timeout"),
    (BrokerError, "broker"),
    (WdmoeError, "other"),
)
"""Names of errors as reasons; the first class that fits counts."""

_WHOLE_ANSWER_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)


@dataclass(slots=True)
class _Live:
    """A request that is not over. Times are by the server's monotonic clock.

    Attributes:
        started: a step has run for it.
        tokens: generated so far.
        first_s, last_s: when its first and its newest token came.
        stop: why the answer is finished, once it is.
    """

    started: bool = False
    tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    stop: StopReason | None = None


class RequestMetrics(AnswerObserver):
    """Counts requests and measures their latencies."""

    def __init__(self, registry: CollectorRegistry, clock: Clock) -> None:
        """Nothing is counted yet.

        Args:
            registry: where the metrics are registered.
            clock: the answer server's.
        """
        self._clock = clock
        self._live: dict[int, _Live] = {}
        self._accepted = Counter("wdmoe_requests_accepted", "Requests that got a place.", registry=registry)
        self._refused = Counter("wdmoe_requests_refused", "Requests that got no place.", ["reason"], registry=registry)
        self._finished = Counter("wdmoe_requests_finished", "Complete answers.", ["reason"], registry=registry)
        self._failed = Counter(
            "wdmoe_requests_failed", "Accepted requests that ended with an error.", ["reason"], registry=registry
        )
        self._cancelled = Counter(
            "wdmoe_requests_cancelled",
            "Accepted requests that were ended early: a stop string was found, or the caller hung up.",
            registry=registry,
        )
        self._waiting = Gauge(
            "wdmoe_requests_waiting", "Accepted requests for which no step has run yet.", registry=registry
        )
        self._running = Gauge(
            "wdmoe_requests_running", "Requests for which a step has run and that are not over.", registry=registry
        )
        self._prompt_tokens = Counter("wdmoe_prompt_tokens", "Tokens of prompts that were computed.", registry=registry)
        self._generated = Counter("wdmoe_generated_tokens", "Tokens of answers.", registry=registry)
        self._degraded = Counter(
            "wdmoe_degraded_tokens",
            "Tokens of answers that were computed without some expert, because no node could provide it.",
            registry=registry,
        )
        self._drafts_offered = Counter(
            "wdmoe_draft_tokens_offered", "Draft tokens that were checked by a step.", registry=registry
        )
        self._drafts_accepted = Counter("wdmoe_draft_tokens_accepted", "Draft tokens accepted.", registry=registry)
        self._first_token = Histogram(
            "wdmoe_time_to_first_token_seconds",
            "From accepting a request to its first token.",
            buckets=_WHOLE_ANSWER_S,
            registry=registry,
        )
        self._inter_token = Histogram(
            "wdmoe_inter_token_latency_seconds",
            "From one token of an answer to the next; tokens that come together share the time evenly.",
            buckets=_PER_TOKEN_S,
            registry=registry,
        )
        self._per_token = Histogram(
            "wdmoe_time_per_output_token_seconds",
            "Of each complete answer of several tokens, the mean time from one token to the next.",
            buckets=_PER_TOKEN_S,
            registry=registry,
        )
        self._whole = Histogram(
            "wdmoe_request_duration_seconds",
            "From accepting a request to the last token of its complete answer.",
            buckets=_WHOLE_ANSWER_S,
            registry=registry,
        )
        # Rates of counters need their zero.
        self._refused.labels("busy")
        for reason in _FINISHED.values():
            self._finished.labels(reason)
        for _, reason in _FAILED:
            self._failed.labels(reason)

    def accepted(self, request: Request) -> None:
        """Count it as waiting."""
        self._live[id(request)] = _Live()
        self._accepted.inc()
        self._waiting.inc()

    def refused(self, error: BusyError) -> None:
        """Count it."""
        self._refused.labels("busy").inc()

    def progressed(self, request: Request, progress: Progress) -> None:
        """Measure the time since its last token."""
        live = self._live[id(request)]
        if not live.started:
            live.started = True
            self._waiting.dec()
            self._running.inc()
        tokens = len(progress.events)
        if not tokens:
            return
        now_s = self._clock.monotonic_s()
        later = tokens
        if not live.tokens:
            self._prompt_tokens.inc(progress.answer.prompt_tokens)
            self._first_token.observe(now_s - request.accepted_s)
            live.first_s = live.last_s = now_s
            later -= 1
        for _ in range(later):
            self._inter_token.observe((now_s - live.last_s) / later)
        self._generated.inc(tokens)
        self._degraded.inc(sum(event.degraded for event in progress.events))
        live.tokens += tokens
        live.last_s = now_s
        live.stop = progress.events[-1].stop
        for event in progress.events:
            for step in event.steps:
                if step.drafted:
                    self._drafts_offered.inc(step.drafted)
                    self._drafts_accepted.inc(step.accepted)

    def ended(self, request: Request, error: WdmoeError | None) -> None:
        """Count its end."""
        live = self._live.pop(id(request))
        (self._running if live.started else self._waiting).dec()
        if error is not None:
            self._failed.labels(next(reason for kind, reason in _FAILED if isinstance(error, kind))).inc()
        elif live.stop is None:
            self._cancelled.inc()
        else:
            self._finished.labels(_FINISHED[live.stop]).inc()
            self._whole.observe(live.last_s - request.accepted_s)
            if live.tokens > 1:
                self._per_token.observe((live.last_s - live.first_s) / (live.tokens - 1))
