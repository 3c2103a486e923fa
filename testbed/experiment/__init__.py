"""Experiments: a plan becomes cells, cells become files, files become a report. `docs/experiments.md`."""
