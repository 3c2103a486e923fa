"""Reports: merged tables, a summary with intervals, plots, a trace, and the report as HTML and Markdown."""
