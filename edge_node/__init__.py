"""An edge node: loads experts of a bundle, answers frames over MQTT, reports its status.

Runs on a Raspberry Pi as well as on a server: onnxruntime, paho-mqtt, psutil and numpy, never torch.
The data's way in: `agent` (MQTT) → `worker` (frame in, frame out) → `runtime` (onnxruntime).
"""
