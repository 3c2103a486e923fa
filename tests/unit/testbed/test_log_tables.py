"""What is measured reaches the log: changing any field of a record changes some logged value."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from bs_coordinator.engine.step_records import DispatchRecord, LayerRecord, StepRecord
from bs_coordinator.nodes.telemetry_inbox import ReceivedTelemetry
from bs_coordinator.selection.forecast import LayerForecast
from testbed.run_directory.machine_tables import SENSORS, TELEMETRY, sensor_rows
from testbed.run_directory.step_tables import LATENCY, LAYERS, TOKENS, TokenRecord
from tests.unit.wire.test_telemetry import SAMPLE
from wire.frames import NodeDurations
from wire.telemetry import Clocks, Power, Rail, Telemetry, Thermal, Wifi

NOT_LOGGED = {
    "LayerRecord.degraded",  # the tokens' numbers; the failures themselves are in the events and the nodes' status
    "StepRecord.began_unix_ns",  # of spans; the log has the answer's wall clock, and durations
    "Telemetry.schema",  # of the message
    "Telemetry.boot_id",  # in the run's events, with the nodes' status
}

DURATIONS = NodeDurations(11_000, 12_000, 13_000, 14_000, 15_000)
FORECAST = LayerForecast.even(3, 4)
DISPATCH = DispatchRecord(
    node="a",
    experts=(1,),
    tokens=2,
    sent_unix_ns=10**18,
    round_trip_ns=1_000_000,
    durations=DURATIONS,
    down_bytes=300,
    up_bytes=400,
    predicted_ns=900_000,
)
GATE = np.eye(2, 4, dtype=np.float32)
LAYER = LayerRecord(3, 200_000, 2_000_000, ((GATE, FORECAST),), (DISPATCH,))
STEP = StepRecord("decode", 7, 2, 3_000_000, 100_000, (LAYER,), drafted=1, accepted=1, draft_ns=50_000)
TOKEN = TokenRecord(1, 2, False, 99, (STEP,), 2 * 10**18, 10**12, 321, top_k=2)


def _logged(token: TokenRecord) -> list[list[dict[str, Any]]]:
    tables = (TOKENS.build([token]), LAYERS.build(token.layer_rows()), LATENCY.build(token.request_rows()))
    return [table.to_pylist() for table in tables]


def _other(value: object) -> Any:
    """A different value of the same type."""
    others: dict[type, Callable[[Any], object]] = {
        bool: lambda v: not v,
        int: lambda v: v + 1000,
        float: lambda v: v + 1000.0,
        str: lambda v: "prefill" if v == "decode" else v + "x",
    }
    return others[type(value)](value) if type(value) in others else ()


def _variants(record: Any, **special: Any) -> Iterator[tuple[str, Any]]:
    """The record with one field changed, for each field."""
    struct = isinstance(record, msgspec.Struct)
    for name in record.__struct_fields__ if struct else [field.name for field in fields(record)]:
        other = {name: special.get(name, _other(getattr(record, name)))}
        changed = msgspec.structs.replace(record, **other) if struct else replace(record, **other)
        yield f"{type(record).__name__}.{name}", changed


def _changed_tokens() -> Iterator[tuple[str, TokenRecord]]:
    def of_dispatch(dispatch: DispatchRecord) -> TokenRecord:
        return of_layer(replace(LAYER, dispatches=(dispatch,)))

    def of_layer(layer: LayerRecord) -> TokenRecord:
        return of_step(replace(STEP, layers=(layer,)))

    def of_step(step: StepRecord) -> TokenRecord:
        return replace(TOKEN, steps=(step,))

    for name, durations in _variants(DURATIONS):
        yield name, of_dispatch(msgspec.structs.replace(DISPATCH, durations=durations))
    for name, dispatch in _variants(DISPATCH, durations=NodeDurations(0, 0, 0, 0)):
        yield name, of_dispatch(dispatch)
    for name, layer in _variants(LAYER, asked=((GATE + 1, FORECAST),), degraded=(1,)):
        yield name, of_layer(layer)
    for name, step in _variants(STEP):
        yield name, of_step(step)
    yield "TokenRecord.probe_down_bytes", replace(TOKEN, probe_down_bytes=5)
    yield "TokenRecord.probe_up_bytes", replace(TOKEN, probe_up_bytes=5)


CHANGED_TOKENS = dict(_changed_tokens())


@pytest.mark.parametrize("field", CHANGED_TOKENS)
def test_every_field_of_a_step_is_in_the_log(field: str) -> None:
    assert (_logged(CHANGED_TOKENS[field]) != _logged(TOKEN)) == (field not in NOT_LOGGED)


def test_loading_time_has_its_own_column() -> None:
    (row,) = _logged(TOKEN)[2]
    assert row["node_load_ns"] == DURATIONS.load_ns


def _full(kind: type[msgspec.Struct]) -> Any:
    """A struct with a value in every field."""
    values: dict[str, object] = {}
    for number, field in enumerate(msgspec.structs.fields(kind), 1):
        text = str(field.type)
        values[field.name] = (
            field.name if "str" in text else True if "bool" in text else 2.5 * number if "float" in text else number
        )
    return values


def _telemetry_fields() -> Iterator[tuple[str, Telemetry]]:
    wifi = Wifi(**_full(Wifi))
    thermal = Thermal(**_full(Thermal) | {"sensors_celsius": {"cpu": 41.5}})
    power = Power(**_full(Power) | {"rails": {"5V": Rail(volts=5.0, amperes=1.0, watts=5.0)}})
    full = msgspec.structs.replace(
        SAMPLE, wifi=wifi, thermal=thermal, power=power, clocks=Clocks(**_full(Clocks)), warnings={"iw": 2}
    )
    yield "", full
    for part in ("wifi", "thermal", "power", "clocks"):
        struct = getattr(full, part)
        for name in struct.__struct_fields__:
            other = {} if isinstance(getattr(struct, name), dict) else _other(getattr(struct, name))
            changed = msgspec.structs.replace(struct, **{name: other})
            yield f"{type(struct).__name__}.{name}", msgspec.structs.replace(full, **{part: changed})
    for name in ("schema", "node", "boot_id", "sequence", "unix_ns", "sampling_ms", "route"):
        yield f"Telemetry.{name}", msgspec.structs.replace(full, **{name: _other(getattr(full, name))})
    yield "Telemetry.warnings", msgspec.structs.replace(full, warnings={})


def _telemetry_rows(sample: Telemetry) -> list[pa.Table]:
    arrived = ReceivedTelemetry(1, 2, sample)
    return [TELEMETRY.build([arrived]), SENSORS.build(sensor_rows(arrived))]


def test_every_field_of_telemetry_is_in_the_log() -> None:
    (_, full), *changed = _telemetry_fields()
    assert not [
        name for name, column in zip(TELEMETRY.schema.names, _telemetry_rows(full)[0], strict=True) if column.null_count
    ]
    missing = {field for field, sample in changed if _telemetry_rows(sample) == _telemetry_rows(full)}
    assert missing == {field for field in NOT_LOGGED if field.startswith("Telemetry.")}


def test_without_a_radio_its_columns_are_empty() -> None:
    row = TELEMETRY.build([ReceivedTelemetry(1, 2, msgspec.structs.replace(SAMPLE, wifi=None))]).to_pylist()[0]
    assert {value for name, value in row.items() if name.startswith("wifi_")} == {None}
