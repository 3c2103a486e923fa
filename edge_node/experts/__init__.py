"""Experts in onnxruntime on one device: sessions, execution providers, memory, prepacked models."""
