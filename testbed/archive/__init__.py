"""A run as one file, ready to publish, and back.

`pseudonyms` (pure) replaces what tells whose network it was, `dictionary` says what every column means, `export` puts
the archive together, `unpack` opens archives of others without trusting them.
"""
