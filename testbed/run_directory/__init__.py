"""A run's folder: what is in it, how its tables are declared, and how it is read back, from a folder or an archive."""
