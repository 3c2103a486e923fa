"""Planning a fleet: which device holds what, and how fast the whole is predicted to be. Pure."""
