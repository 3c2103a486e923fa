"""The part of the model that the base station computes itself: embeddings, attention, gate, head and KV cache."""
