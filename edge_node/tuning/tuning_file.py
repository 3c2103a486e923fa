"""Which quantisation and how many threads suit this device: what was measured, the choice, and why. No measuring here.

The choice is kept in a small file that later starts read. It holds as long as what it was measured under holds.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from common.files import atomic_write
from edge_node.config import Rule
from edge_node.errors import TuningError
from edge_node.experts.runtime import BATCH_ROWS
from wire.device_profiles import Provider

SCHEMA = 1
MAX_BYTES = 1 << 20
NEAR = 1.1
"""Times within this factor of the fastest are not told apart: the smaller error decides, then fewer threads."""


class TuningMeasurement(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One quantisation with one number of threads.

    Attributes:
        provider: what computed.
        experts: that were measured, in turn, so that none is still in the processor's cache.
        token_ms: median time of one expert and one hidden state, one entry per round of measuring.
        batch_ms: the same of `BATCH_ROWS` hidden states at once.
        error: mean output error of these experts to fp32, from the manifest.
        deviation: largest difference of a probe output from where it was exported.
        same_in_batch: a hidden state's output is the same to the last bit alone and in a batch.
        refused: why it can't be used here; the rest means nothing then.
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
        """The same trial with another round of measuring."""
        return msgspec.structs.replace(
            self,
            token_ms=self.token_ms + other.token_ms,
            batch_ms=self.batch_ms + other.batch_ms,
            same_in_batch=self.same_in_batch and other.same_in_batch,
            refused=self.refused or other.refused,
        )


class Conditions(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a choice was measured under: with any other it is measured anew.

    Attributes:
        processor: what onnxruntime chooses kernels by, hashed.
        available: the quantisations there were.
        threads: numbers that were tried.
        providers: what was to compute, see `edge_node.experts.providers`.
    """

    model_sha256: str
    experts: str
    available: tuple[str, ...]
    threads: tuple[int, ...]
    providers: tuple[Provider, ...]
    processor: str
    onnxruntime: str


class Tuning(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file."""

    schema: int
    tuned_unix_s: int
    quantisation: str
    threads: int
    why: str
    rule: Rule
    conditions: Conditions
    trials: tuple[TuningMeasurement, ...]


def best_ms(trial: TuningMeasurement, rule: Rule) -> float:
    """The time that counts: of the calmest round, since others on the machine only ever add."""
    return min(trial.token_ms if rule.prefer == "token" else trial.batch_ms)


def decide(trials: Sequence[TuningMeasurement], rule: Rule, conditions: Conditions) -> Tuning:
    """Choose.

    Raises:
        TuningError: none can be used, with the reason for each.
    """
    out = {trial: _unfit(trial, rule) for trial in trials}
    usable = [trial for trial, why in out.items() if not why]
    if not usable:
        reasons = dict.fromkeys(f"{trial.quantisation}: {why}" for trial, why in out.items())
        raise TuningError(f"no bundle can be used on this device ({'; '.join(reasons)})")
    fastest = min(best_ms(trial, rule) for trial in usable)
    near = [trial for trial in usable if best_ms(trial, rule) <= NEAR * fastest]
    chosen = min(near, key=lambda trial: (trial.error, trial.threads, best_ms(trial, rule)))
    return Tuning(
        schema=SCHEMA,
        tuned_unix_s=int(time.time()),
        quantisation=chosen.quantisation,
        threads=chosen.threads,
        why=_why(chosen, usable, out, rule),
        rule=rule,
        conditions=conditions,
        trials=tuple(trials),
    )


def read_tuning(path: Path) -> Tuning | None:
    """The choice of an earlier start; None if there is none.

    Raises:
        TuningError: the file is something else.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TuningError(f"{path} is no tuning file: remove it or name another")
        tuning = msgspec.json.decode(path.read_bytes(), type=Tuning)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TuningError(f"{path} is no tuning file of this version ({error}): remove it or name another") from None
    return tuning if tuning.schema == SCHEMA else None


def write_tuning(path: Path, tuning: Tuning) -> None:
    """Keep a choice.

    Raises:
        StorageError: it can't be written.
    """
    with atomic_write(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(tuning), indent=1) + b"\n")


def table(tuning: Tuning) -> str:
    """What was measured, a line per trial, the chosen one marked."""
    lines = [f"  {'experts':<16} threads  ms, token  ms, {BATCH_ROWS} rows  error  deviation  same in a batch"]
    for trial in tuning.trials:
        mark = "*" if (trial.quantisation, trial.threads) == (tuning.quantisation, tuning.threads) else " "
        begin = f"{mark} {trial.quantisation:<16} {trial.threads:>7}"
        if trial.refused:
            lines.append(f"{begin}  {trial.refused}")
        else:
            lines.append(
                f"{begin}  {min(trial.token_ms):>9.3f}  {min(trial.batch_ms):>11.3f}  {trial.error:>5.2g}  "
                f"{trial.deviation:>9.1e}  {'yes' if trial.same_in_batch else 'no'}"
            )
    return "\n".join(lines)


def what_changed(before: Conditions, now: Conditions) -> str:
    """The conditions that differ, for people; empty when the choice still holds."""
    return ", ".join(name for name in before.__struct_fields__ if getattr(before, name) != getattr(now, name))


def _unfit(trial: TuningMeasurement, rule: Rule) -> str:
    if trial.refused:
        return trial.refused
    if trial.error > rule.max_error:
        return f"output error {trial.error:.2g}, at most {rule.max_error:.2g} is wanted"
    if rule.exact and not trial.same_in_batch:
        return "a token's output depends on its batch"
    return ""


def _why(
    chosen: TuningMeasurement, usable: Sequence[TuningMeasurement], out: dict[TuningMeasurement, str], rule: Rule
) -> str:
    what = "token" if rule.prefer == "token" else f"batch of {BATCH_ROWS}"
    ms = best_ms(chosen, rule)
    parts = [f"{_name(chosen)} takes {ms:.3g} ms per expert and {what}, output error {chosen.error:.2g}"]
    rivals: dict[str, TuningMeasurement] = {}
    for trial in usable:
        rival = rivals.get(trial.quantisation)
        if trial.quantisation != chosen.quantisation and (rival is None or best_ms(trial, rule) < best_ms(rival, rule)):
            rivals[trial.quantisation] = trial
    parts += [
        f"{_name(rival)} {best_ms(rival, rule):.3g} ms ({best_ms(rival, rule) / ms:.2f} times), error {rival.error:.2g}"
        for rival in rivals.values()
    ]
    parts += dict.fromkeys(f"{trial.quantisation} is out: {why}" for trial, why in out.items() if why)
    return "; ".join(parts)


def _name(trial: TuningMeasurement) -> str:
    return f"{trial.quantisation} on {trial.threads} thread{'s' if trial.threads > 1 else ''}"
