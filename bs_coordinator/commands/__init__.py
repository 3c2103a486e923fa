"""The `wdmoe-bs` commands."""
