"""Measuring which bundle and thread count suit this device."""
