"""The draft model of a bundle."""
