"""Turns a mixture-of-experts checkpoint into a bundle: the trunk, one quantised ONNX graph per expert, and a manifest.

Exporting needs no torch: tensors are read as raw bytes, quantised with numpy and written as graphs that are built here.
"""

import common  # noqa: F401 - switches off onnxruntime's telemetry before any module here imports it
