"""From the numbers of a run to what people read: sections, tables, plots, markdown and HTML."""
