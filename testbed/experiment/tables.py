"""The tables of a run: their columns and what they mean, for Parquet files and for the documents."""

from collections.abc import Iterable, Sequence

import pyarrow as pa

_INT, _FLOAT, _TEXT, _BOOL = pa.int64(), pa.float64(), pa.string(), pa.bool_()
_NAME = pa.dictionary(pa.int32(), pa.string())

_WHICH = (("answer", _INT), ("token", _INT), ("warm_up", _BOOL))

SCHEMAS: dict[str, pa.Schema] = {
    "tokens": pa.schema(
        [
            *_WHICH, ("token_id", _INT), ("phase", _NAME), ("step_tokens", _INT),
            ("began_unix_ns", _INT), ("began_monotonic_ns", _INT),
            ("total_ns", _INT), ("trunk_ns", _INT), ("network_ns", _INT), ("compute_ns", _INT), ("wait_ns", _INT),
            ("framing_ns", _INT), ("pairs", _INT), ("full_pairs", _INT), ("down_bytes", _INT), ("up_bytes", _INT),
            ("log_ns", _INT),
        ]
    ),
    "layers": pa.schema(
        [
            *_WHICH, ("step", _INT), ("layer", _INT), ("trunk_ns", _INT), ("dispatch_ns", _INT), ("pairs", _INT),
            ("slowest", _NAME), ("predicted_ns", _INT),
        ]
    ),
    "latency": pa.schema(
        [
            *_WHICH, ("phase", _NAME), ("position", _INT), ("step_tokens", _INT), ("layer", _INT),
            ("trunk_ns", _INT), ("dispatch_ns", _INT), ("node", _NAME), ("experts", _NAME), ("tokens", _INT),
            ("sent_unix_ns", _INT), ("round_trip_ns", _INT), ("network_ns", _INT), ("node_queue_ns", _INT),
            ("node_decode_ns", _INT), ("node_compute_ns", _INT), ("node_encode_ns", _INT), ("down_bytes", _INT),
            ("up_bytes", _INT), ("predicted_ns", _INT),
        ]
    ),
    "answers": pa.schema(
        [
            ("answer", _INT), ("prompt", _INT), ("warm_up", _BOOL), ("prompt_tokens", _INT), ("tokens", _INT),
            ("first_token_ns", _INT), ("wall_ns", _INT), ("stop", _NAME), ("token_sha256", _TEXT), ("text", _TEXT),
        ]
    ),
    "choices": pa.schema([("item", _INT), ("chosen", _INT), ("label", _INT), ("right", _BOOL)]),
    "losses": pa.schema([("item", _INT), ("domain", _NAME), ("loss_nats", _FLOAT), ("tokens", _INT)]),
    "clocks": pa.schema(
        [("unix_ns", _INT), ("monotonic_ns", _INT), ("node", _NAME), ("offset_ns", _INT), ("error_ns", _INT)]
    ),
    "link_samples": pa.schema(
        [
            ("unix_ns", _INT), ("monotonic_ns", _INT), ("node", _NAME), ("kind", _NAME), ("quantity", _NAME),
            ("value", _FLOAT),
        ]
    ),
}  # fmt: skip
"""By name of the file. `docs/experiments.md` is the data dictionary."""

COORDINATES = ("run", "commit", "cell", "repetition", "bundle", "profile", "workload", "policy")
"""Columns that every merged table begins with."""


def table(name: str, rows: Iterable[Sequence[object]]) -> pa.Table:
    """Rows in the order of the schema's columns, as a table."""
    schema = SCHEMAS[name]
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
