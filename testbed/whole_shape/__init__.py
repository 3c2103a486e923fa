"""Whole models of well-known shapes with random weights, on node processes with a core each, over emulated links."""
