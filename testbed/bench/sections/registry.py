"""The sections of `make bench`, in the order in which they run. To add one, write its module and list it here."""

SECTIONS: dict[str, str] = {
    "transport": "testbed.bench.sections.transport",
    "experts": "testbed.bench.sections.experts",
    "many-experts": "testbed.bench.sections.many_experts",
    "trunk": "testbed.bench.sections.trunk",
    "trunk-precision": "testbed.bench.sections.trunk_precision",
    "graphs": "testbed.bench.sections.graphs",
    "generic-trunk": "testbed.bench.sections.generic_trunk",
    "decode": "testbed.bench.sections.decode",
    "hops": "testbed.bench.sections.hops",
    "prefill": "testbed.bench.sections.prefill",
    "llama-bench": "testbed.bench.sections.llama_bench",
    "scaling": "testbed.bench.sections.scaling",
    "speculation": "testbed.bench.sections.speculation",
    "batching": "testbed.bench.sections.batching",
    "resident": "testbed.bench.sections.resident",
    "levers": "testbed.bench.sections.levers",
    "planner": "testbed.bench.sections.planner",
    "observers": "testbed.bench.sections.observers",
    "export": "testbed.bench.sections.export",
    "load": "testbed.bench.sections.load",
}
"""Module of each section, imported when the section runs: some need torch, or Linux as root."""
