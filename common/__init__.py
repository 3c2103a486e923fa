"""Helpers that every package uses: console, errors, configuration, files, sizes, clocks, CPU idle states."""

import os

# onnxruntime 1.32 for Linux sends facts about this machine and the loaded graphs to Microsoft. It reads this variable
# when it is imported; its disable_telemetry_events() comes after it has made an id for the machine (docs/security.md).
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
