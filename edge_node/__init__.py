"""An edge node: loads experts of a bundle, answers frames over MQTT, reports its status.

Runs on a Raspberry Pi as well as on a server: onnxruntime, paho-mqtt, psutil and numpy, never torch.
A request passes through `agent` (MQTT), `worker` (frame in, frame out) and `experts.runtime` (onnxruntime).
"""

import common  # noqa: F401 - switches off onnxruntime's telemetry before any module here imports it
