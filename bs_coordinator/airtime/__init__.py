"""Sharing the bandwidth of the base station's down-link among nodes."""
