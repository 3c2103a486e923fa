"""Nodes as on ARM boards: aarch64 wheels on an emulated processor, with a base station on this machine."""
