"""The testbed: runs whole systems, measures them, writes the logs. May import every other package."""

import common  # noqa: F401 - switches off onnxruntime's telemetry before any module here imports it
