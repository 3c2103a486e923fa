"""From the rows of a run to its numbers: units, metrics and the summary with intervals."""
