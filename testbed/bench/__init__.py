"""Benchmarks as ratios: time taken, divided by what the hardware allows, measured or computed in the same run.

`sections.py` lists the sections; add new ones there. A section is a module with

    def measure(settings: Settings) -> Iterator[Row | Skipped]

which yields each row as soon as it is measured. `rows.py` defines the row and `in_turns`, which interleaves the samples
of both arms; `document.py` prints the table and writes the JSON; `run.py` runs the sections.
"""
