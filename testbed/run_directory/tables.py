"""All tables of a run by the names of their files, and the columns that merged tables begin with."""

from typing import Any

import pyarrow as pa

from testbed.run_directory.columns import Table
from testbed.run_directory.machine_tables import CLOCK_PROBES, CLOCKS, LINK_SAMPLES, SENSORS, TELEMETRY
from testbed.run_directory.result_tables import ANSWERS, CHOICES, FAILURES, GAPS, LAST_WORDS, LOSSES
from testbed.run_directory.step_tables import LATENCY, LAYERS, TOKENS

CELL_TABLES: tuple[Table[Any], ...] = (
    TOKENS, LAYERS, LATENCY, ANSWERS, CHOICES, LAST_WORDS, LOSSES,
    CLOCKS, CLOCK_PROBES, TELEMETRY, SENSORS, LINK_SAMPLES,
)  # fmt: skip
"""Tables that each cell has files of."""
ALL_TABLES: tuple[Table[Any], ...] = (*CELL_TABLES, FAILURES, GAPS)
"""With those that a report makes from the run's events."""
SCHEMAS: dict[str, pa.Schema] = {table.name: table.schema for table in CELL_TABLES}
"""Arrow schemas of the cells' tables, by name."""
COORDINATES = {
    "run": "name of the run",
    "commit": "commit of the code that measured",
    "cell": "id of the cell: one repetition, bundle, link profile, workload and policy",
    "repetition": "number of the repetition, from 0",
    "bundle": "quantised model, as the plan names it",
    "profile": "link profile of the emulated network; `default` if the network has only one",
    "workload": "workload, as the plan names it",
    "policy": "policy that chose the experts, with its options",
}
"""Meaning of the columns that every merged table begins with."""
