"""`python -m exporter`: the same as `wdmoe-export`."""

from exporter.cli import main

# Export workers are spawned processes that import this module again.
if __name__ == "__main__":
    main()
