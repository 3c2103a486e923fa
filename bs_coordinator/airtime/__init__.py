"""Sharing the down-link's bandwidth between nodes."""
