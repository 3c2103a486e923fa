"""What base station and edge node must agree on: topics, frames, status documents, the bundle manifest.

It imports `common` only. Documents and frames need numpy and msgspec; `wire.transports` adds paho-mqtt,
`wire.signature` cryptography. Nothing here knows how an expert is computed or how experts are chosen.
"""

__version__ = "0.1.0"
