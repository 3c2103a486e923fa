"""The testbed: runs whole systems, measures them, writes the logs. May import every other package."""
