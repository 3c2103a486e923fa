"""Experiment plans: what users write, how it is checked, and the cells it expands to."""
