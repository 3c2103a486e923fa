"""The choice of quantisation and threads for a device, made from measurements and kept in a file.

Later starts read the file. The choice is valid as long as the conditions of its measurements are.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from common.files import atomic_write
from common.jsonl import decode_json
from edge_node.config import Rule
from edge_node.errors import TuningError
from edge_node.experts.runtime import BATCH_ROWS
from wire.device_profiles import Provider

SCHEMA = 1
MAX_BYTES = 1 << 20
NEAR = 1.1
"""Times within this factor of the fastest count as equal: the smaller error decides, then fewer threads."""


class TuningMeasurement(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The measurement of one quantisation with one number of threads.

    Attributes:
        provider: execution provider that computed.
        experts: number of experts measured, in turn, so that none is still in the processor's cache.
        token_ms: median time of one expert with one hidden state, one entry per round of measuring.
        batch_ms: median time of one expert with `BATCH_ROWS` hidden states, one entry per round.
        error: mean output error of these experts against fp32, from the manifest.
        deviation: largest relative difference of a probe output from the one recorded at export.
        same_in_batch: whether a hidden state's output is the same to the last bit alone and in a batch.
        refused: why it can't be used here; the other values are meaningless then.
    """

    quantisation: str
    threads: int
    provider: Provider = "cpu"
    experts: int = 0
    token_ms: tuple[float, ...] = ()
    batch_ms: tuple[float, ...] = ()
    error: float = 0.0
    deviation: float = 0.0
    same_in_batch: bool = False
    refused: str = ""

    def joined(self, other: "TuningMeasurement") -> "TuningMeasurement":
        """This measurement with another round added."""
        return msgspec.structs.replace(
            self,
            token_ms=self.token_ms + other.token_ms,
            batch_ms=self.batch_ms + other.batch_ms,
            same_in_batch=self.same_in_batch and other.same_in_batch,
            refused=self.refused or other.refused,
        )


class Conditions(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Conditions of a choice's measurements; if one changes, the device is measured again.

    Attributes:
        processor: hash of the features by which onnxruntime chooses kernels.
        available: the quantisations to choose from.
        threads: numbers of threads to try.
        providers: execution providers, in the order in which they are tried.
    """

    model_sha256: str
    experts: str
    available: tuple[str, ...]
    threads: tuple[int, ...]
    providers: tuple[Provider, ...]
    processor: str
    onnxruntime: str


class Tuning(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of a tuning file: the choice, why it was made, and what it rests on."""

    schema: int
    tuned_unix_s: int
    quantisation: str
    threads: int
    why: str
    rule: Rule
    conditions: Conditions
    trials: tuple[TuningMeasurement, ...]


def best_ms(measurement: TuningMeasurement, rule: Rule) -> float:
    """The time that counts for a rule, in ms: the least of all rounds, since other processes only ever add time."""
    return min(measurement.token_ms if rule.prefer == "token" else measurement.batch_ms)


def decide(measurements: Sequence[TuningMeasurement], rule: Rule, conditions: Conditions) -> Tuning:
    """Choose by `rule`.

    Raises:
        TuningError: no measured bundle can be used; the message has the reason for each.
    """
    out = {measurement: _unfit(measurement, rule) for measurement in measurements}
    usable = [measurement for measurement, why in out.items() if not why]
    if not usable:
        reasons = dict.fromkeys(f"{measurement.quantisation}: {why}" for measurement, why in out.items())
        raise TuningError(f"no bundle can be used on this device ({'; '.join(reasons)})")
    fastest = min(best_ms(measurement, rule) for measurement in usable)
    near = [measurement for measurement in usable if best_ms(measurement, rule) <= NEAR * fastest]
    chosen = min(near, key=lambda measurement: (measurement.error, measurement.threads, best_ms(measurement, rule)))
    return Tuning(
        schema=SCHEMA,
        tuned_unix_s=int(time.time()),
        quantisation=chosen.quantisation,
        threads=chosen.threads,
        why=_why(chosen, usable, out, rule),
        rule=rule,
        conditions=conditions,
        trials=tuple(measurements),
    )


def read_tuning(path: Path) -> Tuning | None:
    """The choice in a tuning file; None if there is no file, or one of another schema version.

    Raises:
        TuningError: the file is not a tuning file.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TuningError(f"{path} is not a tuning file: remove it, or name another with --tuned")
        tuning = decode_json(path.read_bytes(), Tuning)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise TuningError(
            f"{path} is not a tuning file of this version ({error}): remove it, or name another with --tuned"
        ) from None
    return tuning if tuning.schema == SCHEMA else None


def write_tuning(path: Path, tuning: Tuning) -> None:
    """Write a choice to its file.

    Raises:
        StorageError: the file can't be written.
    """
    with atomic_write(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(tuning), indent=1) + b"\n")


def table(tuning: Tuning) -> str:
    """The measurements as text, one per line, the chosen one marked with `*`."""
    lines = [f"  {'experts':<16} threads  ms, token  ms, {BATCH_ROWS} rows  error  deviation  same in a batch"]
    for row in tuning.trials:
        mark = "*" if (row.quantisation, row.threads) == (tuning.quantisation, tuning.threads) else " "
        begin = f"{mark} {row.quantisation:<16} {row.threads:>7}"
        if row.refused:
            lines.append(f"{begin}  {row.refused}")
        else:
            lines.append(
                f"{begin}  {min(row.token_ms):>9.3f}  {min(row.batch_ms):>11.3f}  {row.error:>5.2g}  "
                f"{row.deviation:>9.1e}  {'yes' if row.same_in_batch else 'no'}"
            )
    return "\n".join(lines)


def what_changed(before: Conditions, now: Conditions) -> str:
    """Names of the conditions that differ, for people; empty if the choice is still valid."""
    return ", ".join(name for name in before.__struct_fields__ if getattr(before, name) != getattr(now, name))


def _unfit(measurement: TuningMeasurement, rule: Rule) -> str:
    if measurement.refused:
        return measurement.refused
    if measurement.error > rule.max_error:
        return f"output error {measurement.error:.2g}, at most {rule.max_error:.2g} is wanted"
    if rule.exact and not measurement.same_in_batch:
        return "a token's output depends on its batch"
    return ""


def _why(
    chosen: TuningMeasurement, usable: Sequence[TuningMeasurement], out: dict[TuningMeasurement, str], rule: Rule
) -> str:
    what = "token" if rule.prefer == "token" else f"batch of {BATCH_ROWS}"
    ms = best_ms(chosen, rule)
    parts = [f"{_name(chosen)} takes {ms:.3g} ms per expert and {what}, output error {chosen.error:.2g}"]
    rivals: dict[str, TuningMeasurement] = {}
    for measurement in usable:
        rival = rivals.get(measurement.quantisation)
        if measurement.quantisation != chosen.quantisation and (
            rival is None or best_ms(measurement, rule) < best_ms(rival, rule)
        ):
            rivals[measurement.quantisation] = measurement
    parts += [
        f"{_name(rival)} {best_ms(rival, rule):.3g} ms ({best_ms(rival, rule) / ms:.2f} times), error {rival.error:.2g}"
        for rival in rivals.values()
    ]
    parts += dict.fromkeys(f"{measurement.quantisation} is out: {why}" for measurement, why in out.items() if why)
    return "; ".join(parts)


def _name(measurement: TuningMeasurement) -> str:
    return f"{measurement.quantisation} on {measurement.threads} thread{'s' if measurement.threads > 1 else ''}"
