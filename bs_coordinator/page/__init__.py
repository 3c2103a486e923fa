"""The live page of a base station: its documents, the feed that sends them, and the page's files."""
