"""From a Mixtral checkpoint to a bundle: the trunk, one quantised ONNX graph per expert, and a manifest.

Nothing in the export path needs torch: tensors are read as raw bytes, quantised with numpy and written
as graphs of our own. This room imports `wire` and no other.
"""
