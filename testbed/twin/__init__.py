"""Checkpoints with the exact shape of well-known models and random weights, to try sizes before a download."""
