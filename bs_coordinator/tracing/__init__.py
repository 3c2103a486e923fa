"""OpenTelemetry traces of answers, their steps and the layers' requests to nodes (docs/metrics.md)."""

from bs_coordinator.tracing.export import answer_traces

__all__ = ["answer_traces"]
