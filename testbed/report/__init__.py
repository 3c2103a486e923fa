"""Reports: a run's folder becomes merged tables, a summary with intervals, plots, a trace, HTML and markdown."""
