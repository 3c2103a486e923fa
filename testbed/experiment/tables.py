"""The tables of a run: their columns and what they mean, for Parquet files and for the documents."""

from collections.abc import Iterable, Sequence

import pyarrow as pa

_INT, _FLOAT, _TEXT, _BOOL = pa.int64(), pa.float64(), pa.string(), pa.bool_()
_NAME = pa.dictionary(pa.int32(), pa.string())

_WHICH = (("answer", _INT), ("token", _INT), ("warm_up", _BOOL))

WIFI = (
    ("interface", _NAME), ("connected", _BOOL), ("ssid", _NAME), ("bssid", _NAME), ("rssi_dbm", _INT),
    ("rssi_average_dbm", _INT), ("up_phy_mbps", _FLOAT), ("down_phy_mbps", _FLOAT), ("up_mode", _NAME),
    ("down_mode", _NAME), ("up_mcs", _INT), ("down_mcs", _INT), ("up_streams", _INT), ("down_streams", _INT),
    ("up_packets", _INT), ("up_retries", _INT), ("up_failed", _INT), ("down_packets", _INT), ("down_dropped", _INT),
    ("beacon_losses", _INT), ("frequency_mhz", _INT), ("channel", _INT), ("width_mhz", _INT), ("band_ghz", _FLOAT),
    ("power_save", _BOOL), ("associated_s", _INT), ("inactive_ms", _INT), ("roams", _INT), ("disconnects", _INT),
)  # fmt: skip
THERMAL = (
    ("soc_celsius", _FLOAT), ("throttled_bits", _INT), ("throttling_now", _NAME), ("throttling_since_boot", _NAME),
    ("throttle_events", _INT),
)  # fmt: skip
POWER = (
    ("board_watts", _FLOAT), ("board_watts_from", _NAME), ("supply_volts", _FLOAT), ("core_volts", _FLOAT),
    ("mode", _NAME),
)  # fmt: skip
CLOCKS = (
    ("cpu_slowest_mhz", _FLOAT), ("cpu_fastest_mhz", _FLOAT), ("governor", _NAME), ("load_1min", _FLOAT),
    ("gpu_mhz", _FLOAT), ("gpu_percent", _FLOAT), ("memory_percent", _FLOAT),
)  # fmt: skip
"""Fields of `wire.telemetry` that `telemetry` has as columns, those of `WIFI` with `wifi_` in front."""

SCHEMAS: dict[str, pa.Schema] = {
    "tokens": pa.schema(
        [
            *_WHICH, ("token_id", _INT), ("phase", _NAME), ("step_tokens", _INT),
            ("began_unix_ns", _INT), ("began_monotonic_ns", _INT),
            ("total_ns", _INT), ("trunk_ns", _INT), ("network_ns", _INT), ("compute_ns", _INT), ("wait_ns", _INT),
            ("framing_ns", _INT), ("pairs", _INT), ("full_pairs", _INT), ("down_bytes", _INT), ("up_bytes", _INT),
            ("drafted", _INT), ("accepted", _INT), ("draft_ns", _INT), ("log_ns", _INT),
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
    "clock_probes": pa.schema(
        [
            ("unix_ns", _INT), ("node", _NAME), ("moment", _NAME), ("sent_unix_ns", _INT),
            ("node_arrived_unix_ns", _INT), ("node_left_unix_ns", _INT), ("arrived_unix_ns", _INT),
            ("offset_low_ns", _INT), ("offset_high_ns", _INT), ("down_estimated_ns", _INT), ("up_estimated_ns", _INT),
            ("one_way_error_ns", _INT),
        ]
    ),
    "telemetry": pa.schema(
        [
            ("unix_ns", _INT), ("monotonic_ns", _INT), ("node", _NAME), ("sequence", _INT), ("node_unix_ns", _INT),
            ("sampling_ms", _FLOAT), ("route", _NAME), *((f"wifi_{name}", kind) for name, kind in WIFI), *THERMAL,
            *POWER, *CLOCKS, ("warnings", _INT),
        ]
    ),
    "sensors": pa.schema(
        [
            ("unix_ns", _INT), ("monotonic_ns", _INT), ("node", _NAME), ("sensor", _NAME), ("quantity", _NAME),
            ("value", _FLOAT),
        ]
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
