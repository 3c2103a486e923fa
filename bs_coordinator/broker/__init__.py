"""Private brokers as child processes."""
