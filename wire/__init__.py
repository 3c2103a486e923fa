"""What base station and edge node must agree on: topics, frames, status documents, the bundle manifest.

This room imports none of the others. Its documents and frames need numpy and msgspec only; `wire.mqtt` adds paho-mqtt.
Nothing here knows how an expert is computed or how experts are chosen.
"""

__version__ = "0.1.0"
