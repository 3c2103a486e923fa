"""Benchmarks as ratios: what we take against what the hardware allows, measured or computed in the same run.

`sections.py` lists the sections and is the place to hook in another. A section is a module with

    def measure(settings: Settings) -> Iterator[Row | Skipped]

which yields each row as soon as it is measured. `rows.py` has the row and `in_turns`, which takes both arms' samples
in turns; `document.py` prints the table and writes the JSON; `run.py` goes through the sections.
"""
