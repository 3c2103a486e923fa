"""Helpers that every package uses: console, errors, configuration, files, sizes, clocks, CPU idle states."""
