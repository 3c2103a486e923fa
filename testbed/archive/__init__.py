"""Archives: a run as one file that is ready to publish.

`pseudonyms` (pure) replaces names that reveal a network or its owner, `dictionary` describes every column, and `export`
builds the archive. `testbed.run_directory.unpack` opens archives again.
"""
