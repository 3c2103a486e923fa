"""The demo models: real mixtures of experts assembled from a dense base model and the deltas in `models/`."""
