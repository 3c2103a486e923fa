"""Expert requests on their way to the nodes and back."""
