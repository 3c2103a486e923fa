"""Spans of answers: one per answer, one per step of it, one per layer that asked nodes in the step.

Made from the records of steps that have run, with their times, so that nothing is measured twice. Names of attributes
are those of OpenTelemetry's conventions for generative AI where these have one. Prompts and answers are in no span.
"""

from dataclasses import dataclass
from typing import Any

from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from bs_coordinator.engine.scheduler import Progress
from bs_coordinator.engine.step_records import LayerRecord, StepRecord, TimeSplit
from bs_coordinator.http.observers import AnswerObserver
from bs_coordinator.http.requests import Request
from common.clock import SYSTEM_CLOCK, Clock
from common.errors import WdmoeError, one_line

_STAGES = tuple(TimeSplit.__dataclass_fields__)
_MS = 1e6
_MOST_ERROR = 500


@dataclass(slots=True)
class _Live:
    """An answer that is not over."""

    span: Span
    tokens: int = 0
    degraded: int = 0


class AnswerSpans(AnswerObserver):
    """Makes the spans. Sampling and sending them are the tracer's."""

    def __init__(self, tracer: Tracer, *, model: str, clock: Clock = SYSTEM_CLOCK) -> None:
        """No answer so far.

        Args:
            tracer: makes spans; ended spans must be sent in the background.
            model: name of the model.
            clock: for the times of answers; those of steps come from their records.
        """
        self._tracer = tracer
        self._model = model
        self._clock = clock
        self._live: dict[int, _Live] = {}
        self._step: StepRecord | None = None
        self._step_context: SpanContext | None = None

    def accepted(self, request: Request) -> None:
        """Begin an answer's span: in the caller's trace, if the request came with one."""
        sampling, operation = request.sampling, "text_completion" if request.same_text else "chat"
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            TraceContextTextMapPropagator().extract(request.trace._asdict()),
            SpanKind.SERVER,
            {
                "gen_ai.operation.name": operation,
                "gen_ai.request.model": self._model,
                "gen_ai.request.max_tokens": sampling.max_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
            },
            start_time=self._clock.unix_ns(),
        )
        self._live[id(request)] = _Live(span)

    def progressed(self, request: Request, progress: Progress) -> None:
        """Add a step's spans to its answer."""
        live = self._live.get(id(request))
        if live is None or not live.span.is_recording():
            return
        if progress.events and not live.tokens:
            live.span.add_event("first token", timestamp=self._clock.unix_ns())
            live.span.set_attribute("gen_ai.usage.input_tokens", progress.answer.prompt_tokens)
        live.tokens += len(progress.events)
        if progress.events and (stop := progress.events[-1].stop):
            live.span.set_attribute("gen_ai.response.finish_reasons", [stop])
        if progress.step is not None:
            live.degraded += sum(event.degraded for event in progress.events)
            own = progress.events[0].steps[-1] if progress.events else progress.step
            self._add_step(live.span, progress.step, own)

    def ended(self, request: Request, error: WdmoeError | None) -> None:
        """End an answer's span."""
        live = self._live.pop(id(request), None)
        if live is None:
            return
        span = live.span
        span.set_attributes({"gen_ai.usage.output_tokens": live.tokens, "wdmoe.degraded_tokens": live.degraded})
        if error is not None:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR, one_line(error)[:_MOST_ERROR]))
        span.end(self._clock.unix_ns())

    def _add_step(self, answer: Span, step: StepRecord, own: StepRecord) -> None:
        """A step's span; with its layers if this is the first answer of the step, else with a link to that one's.

        Args:
            step: as all answers in it have it.
            own: the same with the answer's own drafts.
        """
        shared = self._step_context if step is self._step else None
        split = step.split_ns()
        attributes: dict[str, Any] = {f"wdmoe.{stage}_ms": getattr(split, stage) / _MS for stage in _STAGES}
        attributes |= {
            "wdmoe.position": step.position,
            "wdmoe.tokens": step.tokens,
            "wdmoe.degraded_tokens": len(step.degraded),
        }
        if own.drafted:
            attributes |= {"wdmoe.drafted_tokens": own.drafted, "wdmoe.accepted_tokens": own.accepted}
        span = self._tracer.start_span(
            step.phase, set_span_in_context(answer), attributes=attributes, links=[Link(shared)] if shared else [],
            start_time=step.began_unix_ns,
        )  # fmt: skip
        if not shared:
            self._step, self._step_context = step, span.get_span_context()
            inside = set_span_in_context(span)
            for layer in step.layers:
                if layer.dispatches:
                    first_ns = min(dispatch.sent_unix_ns for dispatch in layer.dispatches)
                    last_ns = max(dispatch.sent_unix_ns + dispatch.round_trip_ns for dispatch in layer.dispatches)
                    self._tracer.start_span(
                        "dispatch", inside, SpanKind.CLIENT, _layer_attributes(layer), start_time=first_ns
                    ).end(last_ns)
        span.end(step.began_unix_ns + step.total_ns)


def _layer_attributes(layer: LayerRecord) -> dict[str, Any]:
    dispatches = layer.dispatches
    attributes: dict[str, Any] = {
        "wdmoe.layer": layer.layer,
        "wdmoe.nodes": [dispatch.node for dispatch in dispatches],
        "wdmoe.rows": sum(dispatch.tokens for dispatch in dispatches),
        "wdmoe.down_bytes": sum(dispatch.down_bytes for dispatch in dispatches),
        "wdmoe.up_bytes": sum(dispatch.up_bytes for dispatch in dispatches),
        "wdmoe.wait_ms": layer.dispatch_ns / _MS,
        "wdmoe.degraded_tokens": len(layer.degraded),
    }
    if (slowest := layer.critical) is not None:
        attributes |= {
            "wdmoe.slowest_node": slowest.node,
            "wdmoe.slowest_compute_ms": slowest.durations.compute_ns / _MS,
        }
    return attributes
