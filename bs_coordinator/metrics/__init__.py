"""Prometheus metrics of a base station and its nodes (docs/metrics.md)."""

from bs_coordinator.metrics.station_metrics import StationMetrics

__all__ = ["StationMetrics"]
