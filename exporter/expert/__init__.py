"""One expert as a quantised ONNX model, and the proof of its output."""
