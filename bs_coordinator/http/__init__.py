"""The OpenAI-compatible HTTP interface of a base station."""
