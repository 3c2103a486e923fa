"""The demo model: a real Mixtral assembled from a dense base model and the deltas in `models/`."""
