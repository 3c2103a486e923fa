"""Whether answers are traced, and where their spans go: by OTLP over HTTP, as OpenTelemetry's variables say."""

import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from bs_coordinator.http.observers import AnswerObserver
from common.errors import MissingPackageError
from wire import __version__

log = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_DEFAULT_ENDPOINT = "http://localhost:4318"
_LAST_SPANS_S = 5.0
"""How long the end of the process waits for spans that are not sent yet."""


@contextmanager
def answer_traces(*, asked_for: bool, model: str) -> Iterator[list[AnswerObserver]]:
    """The observers that trace answers within the context: one, or none if tracing is off.

    It is on if it is asked for, or if an environment variable names a collector; `OTEL_SDK_DISABLED=true` and
    `OTEL_TRACES_EXPORTER=none` turn it off in any case.

    Args:
        asked_for: by an option; without a variable, spans go to http://localhost:4318.
        model: name of the model.

    Raises:
        MissingPackageError: it is asked for, and OpenTelemetry is not installed.
    """
    if not _wanted(asked_for):
        yield []
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        message = f"no traces: the Python package {error.name} is not installed: pip install 'wdmoe[tracing]'"
        if asked_for:
            raise MissingPackageError(message) from None
        log.warning("%s", message)
        yield []
        return
    from bs_coordinator.tracing.answer_spans import AnswerSpans

    # What the environment says of the service comes last, and so counts.
    resource = Resource({"service.name": "wdmoe-bs", "service.version": __version__})
    provider = TracerProvider(resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    log.info("traces of answers go to %s", _collector())
    try:
        yield [AnswerSpans(provider.get_tracer("wdmoe", __version__), model=model)]
    finally:
        # With a collector that does not answer, its shutdown alone would wait for half a minute.
        ending = threading.Thread(target=provider.shutdown, daemon=True)
        ending.start()
        ending.join(_LAST_SPANS_S)
        if ending.is_alive():
            log.warning("the last spans could not be sent within %.0f s", _LAST_SPANS_S)


def _collector() -> str:
    """The collector's URL without what may be secret in it: user name, password and query."""
    url = next((url for name in _ENDPOINTS if (url := os.environ.get(name))), _DEFAULT_ENDPOINT)
    return re.sub(r"//[^/]*@", "//", url.partition("?")[0])


def _wanted(asked_for: bool) -> bool:
    environment = os.environ
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        if asked_for:
            log.warning("no traces: OTEL_SDK_DISABLED or OTEL_TRACES_EXPORTER turns them off")
        return False
    return asked_for or any(environment.get(name) for name in _ENDPOINTS)
