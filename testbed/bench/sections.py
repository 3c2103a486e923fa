"""The sections of `make bench`, in the order in which they run. To add one: write its module, name it here."""

SECTIONS: dict[str, str] = {
    "transport": "testbed.bench.transport",
    "experts": "testbed.bench.experts",
    "trunk": "testbed.bench.trunk",
    "decode": "testbed.bench.decode",
    "prefill": "testbed.bench.prefill",
    "scaling": "testbed.bench.scaling",
    "speculation": "testbed.bench.speculation",
    "batching": "testbed.bench.batching",
    "resident": "testbed.bench.resident",
}
"""Module by name. Imported only when its turn comes: some need torch, or Linux as root."""
