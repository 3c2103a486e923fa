"""A trace of a run in the Chrome trace event format, for Perfetto and chrome://tracing.

Each cell is a process that begins at zero, so that policies can be compared side by side. Thread 0 shows the base
station: tokens, in them layers, in those trunk and dispatch. The other threads show each node's requests, and in them
the node's own durations.

The log has durations of layers, but timestamps only of requests. So the layers of a step are drawn without gaps, as
late as needed for no request to leave before the dispatch of its layer. Embedding and head are in the gaps between
tokens. A node's work is drawn in the middle of its round trip, because the network time of each direction is unknown.
"""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from testbed.run_directory.cell_rows import CellRows

Event = dict[str, Any]
TOKENS_PER_CELL = 4
_WORK = ("queue", "decode", "load", "compute", "encode")


class Trace:
    """Collects the trace of a run, cell by cell.

    Attributes:
        events: trace events so far.
    """

    def __init__(self, tokens: int = TOKENS_PER_CELL) -> None:
        """Keep the first `tokens` tokens of each cell after the warm-up: viewers can't open very large files."""
        self.events: list[Event] = []
        self._tokens = tokens
        self._cells = 0

    def add(self, rows: CellRows) -> None:
        """Add the tokens of one cell."""
        self._cells += 1
        pid = self._cells
        tokens = rows.table("tokens")
        tokens = tokens.filter(pc.invert(tokens["warm_up"])).slice(0, self._tokens).to_pylist()
        if not tokens:
            return
        wanted = {(t["answer"], t["token"]) for t in tokens}
        layers = _by_token(rows.table("layers"), wanted)
        requests = _by_token(rows.table("latency"), wanted)
        self._name("process_name", pid, 0, f"{rows.cell}")
        self._name("thread_name", pid, 0, "base station")
        begun = len(self.events)
        lanes: dict[str, list[int]] = {}
        thread_ids: dict[tuple[str, int], int] = {}
        free_ns = 0
        for token in tokens:
            key = token["answer"], token["token"]
            free_ns = self._token(pid, token, layers.get(key, []), requests.get(key, []), free_ns)
            for request in requests.get(key, []):
                lane = _lane(lanes.setdefault(request["node"], []), request)
                tid = thread_ids.setdefault((request["node"], lane), len(thread_ids) + 1)
                self._request(pid, tid, request)
        _begin_at_zero(self.events[begun:])
        for (node, lane), tid in thread_ids.items():
            self._name("thread_name", pid, tid, node if lane == 0 else f"{node} ({lane + 1})")

    def encode(self) -> bytes:
        """The trace as JSON."""
        document = {
            "traceEvents": self.events,
            "displayTimeUnit": "ms",
            "otherData": {"tokens_per_cell": f"the first {self._tokens}", "clock": "base station"},
        }
        return json.dumps(document, separators=(",", ":")).encode()

    def _token(self, pid: int, token: Event, layers: list[Event], requests: list[Event], free_ns: int) -> int:
        """Add the spans of one token; returns the earliest start of the next one, in ns."""
        steps = [[*some] for _, some in itertools.groupby(layers, key=lambda layer: layer["step"])]
        sent = [[*some] for _, some in itertools.groupby(requests, key=lambda request: request["position"])]
        begin_ns = None
        for number, step in enumerate(steps):
            # A step without requests (all experts in this process) follows the previous one.
            first_ns = _begin_ns(step, sent[number]) if number < len(sent) else token["began_unix_ns"]
            at_ns = max(free_ns, first_ns)
            begin_ns = at_ns if begin_ns is None else begin_ns
            for layer in step:
                at_ns = self._layer(pid, layer, at_ns)
            free_ns = at_ns
        if begin_ns is not None:
            args = {k: token[k] for k in ("answer", "token", "token_id", "phase", "step_tokens", "pairs", "full_pairs")}
            args["total_us"] = _us(token["total_ns"])
            self._span(pid, 0, f"token {token['token']}", "token", begin_ns, free_ns - begin_ns, args)
        return free_ns

    def _layer(self, pid: int, layer: Event, at_ns: int) -> int:
        """Add the spans of one layer; returns the start of the next one, in ns."""
        args = {"pairs": layer["pairs"], "slowest": layer["slowest"], "predicted_us": _us(layer["predicted_ns"])}
        trunk_ns, dispatch_ns = int(layer["trunk_ns"]), int(layer["dispatch_ns"])
        self._span(pid, 0, f"layer {layer['layer']}", "layer", at_ns, trunk_ns + dispatch_ns, args)
        self._span(pid, 0, "trunk", "trunk", at_ns, trunk_ns)
        self._span(pid, 0, "dispatch", "dispatch", at_ns + trunk_ns, dispatch_ns)
        return at_ns + trunk_ns + dispatch_ns

    def _request(self, pid: int, tid: int, request: Event) -> None:
        args = {k: request[k] for k in ("layer", "experts", "tokens", "down_bytes", "up_bytes")}
        args |= {"predicted_us": _us(request["predicted_ns"])}
        sent_ns, took_ns = request["sent_unix_ns"], request["round_trip_ns"]
        self._span(
            pid, tid, f"layer {request['layer']}: experts {request['experts']}", "request", sent_ns, took_ns, args
        )
        at_ns = sent_ns + request["network_ns"] // 2
        for work in _WORK:
            # Old runs have no column for loading.
            work_ns = min(request[f"node_{work}_ns"] or 0, sent_ns + took_ns - at_ns)
            if work_ns > 0:
                self._span(pid, tid, work, "node", at_ns, work_ns)
                at_ns += work_ns

    def _span(self, pid: int, tid: int, name: str, kind: str, at_ns: int, ns: int, args: Event | None = None) -> None:
        event = {"name": name, "cat": kind, "ph": "X", "ts": at_ns, "dur": ns, "pid": pid, "tid": tid}
        if args:
            event["args"] = {k: v for k, v in args.items() if v is not None}
        self.events.append(event)

    def _name(self, kind: str, pid: int, tid: int, name: str) -> None:
        self.events.append({"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}})


def _begin_at_zero(events: list[Event]) -> None:
    """Convert wall time in ns to the format's µs, counted from the first of the events."""
    first_ns = min((event["ts"] for event in events), default=0)
    for event in events:
        event["ts"], event["dur"] = _us(event["ts"] - first_ns), _us(event["dur"])


def _begin_ns(layers: list[Event], requests: list[Event]) -> int:
    """Start of a step's layers, in ns: as late as needed for no request to leave before its layer's dispatch."""
    sent_ns: dict[int, int] = {}
    for request in requests:
        layer, at_ns = request["layer"], request["sent_unix_ns"]
        sent_ns[layer] = min(at_ns, sent_ns.get(layer, at_ns))
    latest, upto_ns = [], 0
    for layer in layers:
        if layer["layer"] in sent_ns:
            latest.append(sent_ns[layer["layer"]] - upto_ns - layer["trunk_ns"])
        upto_ns += layer["trunk_ns"] + layer["dispatch_ns"]
    return int(min(latest, default=requests[0]["sent_unix_ns"]))


def _by_token(table: pa.Table, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], list[Event]]:
    found: dict[tuple[int, int], list[Event]] = {}
    for row in _rows(table, wanted):
        found.setdefault((row["answer"], row["token"]), []).append(row)
    return found


def _rows(table: pa.Table, wanted: set[tuple[int, int]]) -> Iterator[Event]:
    answers = pa.array(sorted({answer for answer, _ in wanted}))
    for row in table.filter(pc.is_in(table["answer"], value_set=answers)).to_pylist():
        if (row["answer"], row["token"]) in wanted:
            yield row


def _lane(free_ns: list[int], request: Event) -> int:
    """The first lane of a node that is free when the request leaves; spans in one lane must not overlap."""
    end_ns = request["sent_unix_ns"] + request["round_trip_ns"]
    for lane, free in enumerate(free_ns):
        if free <= request["sent_unix_ns"]:
            free_ns[lane] = end_ns
            return lane
    free_ns.append(end_ns)
    return len(free_ns) - 1


def _us(ns: int | None) -> float | None:
    return None if ns is None else ns / 1e3
