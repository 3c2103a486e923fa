"""The data dictionary of a run: every table and column with its unit and meaning."""

import msgspec
import pyarrow as pa
from msgspec import Struct

from testbed.experiment.tables import COORDINATES, SCHEMAS
from testbed.report.merge import FAILURES, GAPS

_UNITS = {
    "ns": "ns", "us": "µs", "ms": "ms", "s": "s", "bytes": "bytes", "mbps": "Mbit/s", "dbm": "dBm", "mhz": "MHz",
    "ghz": "GHz", "celsius": "°C", "watts": "W", "volts": "V", "percent": "%", "ppm": "10⁻⁶", "nats": "nat",
}  # fmt: skip
"""By the ending of a column's name."""

_TABLES = {
    "tokens": "one row per generated token, or per step of a batch where nothing is generated",
    "layers": "one row per token and layer",
    "latency": "one row per request to a node",
    "answers": "one row per generated answer",
    "choices": "one row per multiple-choice item",
    "losses": "one row per text",
    "clocks": "the base station's clocks at each sample; with a node, that node's clock against them",
    "clock_probes": "one row per probe of a node's clock",
    "telemetry": "what a node told of itself, about once a second",
    "sensors": "temperatures and supply rails of those samples, one row per sensor and quantity",
    "link_samples": "one row per sample, node and quantity",
    "failures": "failed attempts at cells",
    "gaps": "pauses of the runner before it was resumed",
}

_SHARED = {
    "run": "name of the run",
    "commit": "of the code that measured",
    "cell": "id of the cell: one repetition, bundle, link profile, workload and policy",
    "repetition": "number, from 0",
    "bundle": "quantised model, as the plan names it",
    "profile": "link profile of the emulated network; `default` where there is only one network",
    "workload": "as the plan names it",
    "policy": "that chose the experts, with its options",
    "answer": "which answer, batch or text of the cell; −1 in the warm-up",
    "token": "which token or step of it",
    "warm_up": "before the measurement: left out of every number",
    "phase": "prefill or decode",
    "step_tokens": "tokens that went through the model",
    "layer": "of the model, from 0",
    "node": "id of the node",
    "unix_ns": "base station's wall clock, since 1970",
    "monotonic_ns": "base station's steady clock",
    "trunk_ns": "attention, norms, gate and selection on the base station",
    "dispatch_ns": "from chosen experts to their sum: the layer wait",
    "network_ns": "links, broker and MQTT clients: round trip less the node's own durations",
    "pairs": "(token, expert) pairs that were asked for",
    "down_bytes": "base station to nodes, whole frames",
    "up_bytes": "nodes to base station, whole frames",
    "predicted_ns": "predicted before it was sent",
    "item": "line of the data set, from 0",
    "quantity": "what was measured; the unit ends the name",
    "value": "in the unit that ends the quantity's name",
    "warnings": "outputs of tools that could not be understood, since the node's start",
}

_OWN = {
    "tokens": {
        "token_id": "that was generated; empty where nothing is",
        "began_unix_ns": "when it began, wall clock",
        "began_monotonic_ns": "when it began, steady clock",
        "total_ns": "of the token; trunk, network, compute, wait and framing add up to it",
        "compute_ns": "of each layer's slowest request: the node's experts",
        "wait_ns": "of each layer's slowest request: the node's queue",
        "framing_ns": "the rest: packing, unpacking, adding up",
        "full_pairs": "pairs that plain top-k would have asked for",
        "drafted": "guesses that the token's step carried",
        "accepted": "of them that were right",
        "draft_ns": "making the guesses; part of `total_ns`",
        "log_ns": "spent on logging this token",
    },
    "layers": {
        "step": "of the token's steps",
        "slowest": "node that was waited for longest",
    },
    "latency": {
        "position": "of the step's first token in its sequence",
        "experts": "indices that were asked for",
        "tokens": "hidden states that were sent",
        "sent_unix_ns": "when it was sent, wall clock",
        "round_trip_ns": "from publishing to reading the answer off the socket",
        "node_queue_ns": "in the node's queue, by the node's clock",
        "node_decode_ns": "unpacking, by the node's clock",
        "node_compute_ns": "the experts, by the node's clock",
        "node_encode_ns": "packing, by the node's clock",
        "node_load_ns": "reading experts from disk, by the node's clock",
    },
    "answers": {
        "prompt": "its number in the workload",
        "prompt_tokens": "in the prompt",
        "tokens": "that were generated",
        "first_token_ns": "until the first token",
        "wall_ns": "until the last",
        "stop": "why it ended",
        "token_sha256": "of the token ids as little-endian int32: equal for equal answers",
        "text": "the answer",
    },
    "choices": {
        "chosen": "index of the choice",
        "label": "index of the right one",
        "right": "whether they are equal",
    },
    "losses": {
        "domain": "of the text",
        "loss_nats": "summed negative log-likelihood",
        "tokens": "that were predicted",
    },
    "clocks": {
        "offset_ns": "node's wall clock less the base station's, estimated by four timestamps",
        "error_ns": "the offset is right within this",
    },
    "clock_probes": {
        "unix_ns": "the middle of the probe, by the base station's wall clock",
        "moment": "before, during or after the cell's measurement",
        "sent_unix_ns": "when the probe left the base station, by its wall clock",
        "node_arrived_unix_ns": "when it arrived, by the node's wall clock",
        "node_left_unix_ns": "when its answer left, by the node's wall clock",
        "arrived_unix_ns": "when that arrived, by the base station's wall clock",
        "offset_low_ns": "the node's clock is at least this far ahead",
        "offset_high_ns": "the node's clock is at most this far ahead",
        "down_estimated_ns": "one way, base station to node, estimated",
        "up_estimated_ns": "one way, node to base station, estimated",
        "one_way_error_ns": "both are right within this",
    },
    "telemetry": {
        "sequence": "counts up from 0; a gap is a sample lost on the way",
        "node_unix_ns": "when it was read, by the node's wall clock",
        "sampling_ms": "that the reading took",
        "route": "interface by which the node reaches the broker",
        "wifi_interface": "wireless interface that the columns of Wi-Fi are about",
        "wifi_connected": "to an access point",
        "wifi_ssid": "of the network",
        "wifi_bssid": "of the access point's radio",
        "wifi_rssi_dbm": "signal of the last frames",
        "wifi_rssi_average_dbm": "as the driver smooths it",
        "wifi_up_phy_mbps": "bit rate of the radio towards the access point",
        "wifi_down_phy_mbps": "bit rate of the radio from the access point",
        "wifi_up_mode": "legacy, ht, vht, he or eht",
        "wifi_down_mode": "legacy, ht, vht, he or eht",
        "wifi_up_mcs": "modulation and coding index",
        "wifi_down_mcs": "modulation and coding index",
        "wifi_up_streams": "spatial streams",
        "wifi_down_streams": "spatial streams",
        "wifi_up_packets": "sent since the association",
        "wifi_up_retries": "sent again since the association",
        "wifi_up_failed": "given up since the association",
        "wifi_down_packets": "received since the association",
        "wifi_down_dropped": "dropped on receiving since the association",
        "wifi_beacon_losses": "since the association",
        "wifi_frequency_mhz": "of the channel's centre",
        "wifi_channel": "number",
        "wifi_width_mhz": "of the channel",
        "wifi_band_ghz": "2.4, 5 or 6",
        "wifi_power_save": "whether the radio sleeps between frames",
        "wifi_associated_s": "since the association",
        "wifi_inactive_ms": "since the last frame from the access point",
        "wifi_roams": "changes of the access point since the node's start",
        "wifi_disconnects": "losses of the association since the node's start",
        "soc_celsius": "hottest sensor of the processor",
        "throttled_bits": "Raspberry Pi firmware's flags; 0 when all is well",
        "throttling_now": "flags that are set now, in words",
        "throttling_since_boot": "flags that were set since boot, in words",
        "throttle_events": "counted by the kernel since boot",
        "board_watts": "of the whole board",
        "board_watts_from": "rail that tells, or `sum of rails`",
        "supply_volts": "at the board's input",
        "core_volts": "of the processor's cores",
        "mode": "power mode by name",
        "cpu_slowest_mhz": "slowest core that is online",
        "cpu_fastest_mhz": "fastest core that is online",
        "governor": "of the cores' frequency",
        "load_1min": "processes that want to run, mean of a minute",
        "gpu_mhz": "clock of the GPU",
        "gpu_percent": "how busy the GPU is",
        "memory_percent": "how busy the memory controller is",
    },
    "sensors": {"sensor": "name of the sensor or rail"},
    "link_samples": {
        "kind": "truth (as configured, emulated networks only), estimate, or forecast (what selection is told)",
    },
    "failures": {
        "what": "the cell in words",
        "attempt": "number, from 1",
        "kind": "of the error",
        "error": "its line",
    },
    "gaps": {
        "gap_s": "from the last event to the resumption",
        "after": "what happened last before it",
        "lost": "unfinished cells that were removed",
    },
}  # fmt: skip


class Column(Struct, frozen=True):
    """One column.

    Attributes:
        unit: empty for counts, names and truth values.
    """

    name: str
    type: str
    unit: str
    meaning: str


class TableEntry(Struct, frozen=True):
    """One table."""

    name: str
    rows: str
    columns: list[Column]


def dictionary() -> list[TableEntry]:
    """All tables.

    Raises:
        KeyError: a column has no meaning here.
    """
    schemas = {**SCHEMAS, "failures": FAILURES, "gaps": GAPS}
    return [
        TableEntry(name, _TABLES[name], [_column(name, field) for field in schema]) for name, schema in schemas.items()
    ]


def dictionary_json() -> bytes:
    """For programs."""
    return msgspec.json.format(msgspec.json.encode(dictionary()), indent=1) + b"\n"


def dictionary_markdown() -> str:
    """For people."""
    lines = [
        "# Data dictionary",
        "",
        "Durations are by the base station's steady clock, `node_*` by the node's own. A value that is not known is "
        "empty (null). Tables of cells lie in `cells/<id>/<table>.parquet`; merged ones (`<table>.parquet` and "
        f"`<table>.csv`) begin with {', '.join(f'`{name}`' for name in COORDINATES)}:",
        "",
    ]
    lines += [f"- `{name}`: {_SHARED[name]}" for name in COORDINATES]
    for table in dictionary():
        lines += ["", f"## `{table.name}`", "", f"{table.rows[0].upper()}{table.rows[1:]}.", ""]
        lines += ["| column | type | unit | meaning |", "|---|---|---|---|"]
        lines += [f"| `{c.name}` | {c.type} | {c.unit} | {c.meaning} |" for c in table.columns]
    return "\n".join(lines) + "\n"


def _column(table: str, field: pa.Field) -> Column:
    meaning = _OWN.get(table, {}).get(field.name) or _SHARED[field.name]
    kind = "text" if pa.types.is_dictionary(field.type) else str(field.type).replace("string", "text")
    return Column(field.name, kind, _UNITS.get(field.name.rpartition("_")[2], ""), meaning)
