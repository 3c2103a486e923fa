"""Choosing quantisation and threads: the rule as a property, the measuring with real bundles."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_node.config import Rule
from edge_node.errors import TuningError
from edge_node.tuning.tune import thread_numbers
from edge_node.tuning.tuning_file import NEAR, Conditions, TuningMeasurement, decide, read_tuning
from wire.manifest import Scheme

Bundle = Callable[[Scheme], Path]
Run = Callable[..., subprocess.CompletedProcess[str]]

_CONDITIONS = Conditions(
    model_sha256="0" * 64,
    experts="L0:E0",
    available=("a", "b"),
    threads=(1, 2),
    providers=("cpu",),
    processor="p",
    onnxruntime="1",
)
_MS = st.floats(0.01, 100, allow_nan=False).map(lambda ms: (ms,))
_TRIALS = st.lists(
    st.builds(
        TuningMeasurement,
        quantisation=st.sampled_from(["int4 b32", "int8-dynamic", "fp16"]),
        threads=st.sampled_from([1, 2, 4]),
        token_ms=_MS,
        batch_ms=_MS,
        error=st.floats(0, 0.5),
        same_in_batch=st.booleans(),
        refused=st.sampled_from(["", "", "ended by signal 4"]),
    ),
    min_size=1,
    unique_by=lambda trial: (trial.quantisation, trial.threads),
)
_RULES = st.builds(Rule, prefer=st.sampled_from(["token", "batch"]), max_error=st.floats(0, 0.5), exact=st.booleans())


@given(_TRIALS, _RULES)
def test_nothing_that_may_be_used_is_clearly_faster_or_as_fast_and_better(
    trials: list[TuningMeasurement], rule: Rule
) -> None:
    fit = [t for t in trials if not t.refused and t.error <= rule.max_error and (t.same_in_batch or not rule.exact)]
    if not fit:
        with pytest.raises(TuningError, match="no bundle can be used"):
            decide(trials, rule, _CONDITIONS)
        return
    tuning = decide(trials, rule, _CONDITIONS)
    (chosen,) = [t for t in fit if (t.quantisation, t.threads) == (tuning.quantisation, tuning.threads)]

    def ms(trial: TuningMeasurement) -> float:
        return (trial.token_ms if rule.prefer == "token" else trial.batch_ms)[0]

    fastest = min(map(ms, fit))
    assert ms(chosen) <= NEAR * fastest
    as_fast = [t for t in fit if ms(t) <= NEAR * fastest]
    assert chosen.error == min(t.error for t in as_fast)
    assert chosen.threads == min(t.threads for t in as_fast if t.error == chosen.error)
    assert tuning.quantisation in tuning.why


def test_thread_numbers_end_with_all_processors() -> None:
    assert [thread_numbers(n) for n in (1, 2, 4, 6)] == [(1,), (1, 2), (1, 2, 4), (1, 2, 4, 6)]


def test_the_first_start_measures_and_later_ones_read_why(tiny_bundle: Bundle, tmp_path: Path, run: Run) -> None:
    broken, good, file = tmp_path / "int8", tiny_bundle("int4"), tmp_path / "tuned.json"
    shutil.copytree(tiny_bundle("int8"), broken)
    weights = next(broken.glob("experts/L00/*.weights"))
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    # A broker that is not there: the choice has been made, and the experts loaded, by then.
    node = ["--id", "a", "--experts", "L*:E*", "--broker", "mqtt://127.0.0.1:1", "--tuned", file]

    first = run("edge_node", "--bundle", broken, "--bundle", good, "--threads", 1, *node)
    assert first.returncode == 30, first.stderr
    assert "measuring them once" in first.stderr
    tuning = read_tuning(file)
    assert tuning is not None
    assert (tuning.quantisation, tuning.threads) == ("int4 b32", 1)
    assert "int8 b32 is out" in tuning.why
    assert "does not match its SHA-256" in tuning.why

    written = file.read_bytes()
    second = run("edge_node", "--bundle", broken, "--bundle", good, *node)
    assert second.returncode == 30, second.stderr
    assert "measuring" not in second.stderr
    assert f"serving from {good}" in second.stderr
    assert file.read_bytes() == written

    document = json.loads(written)
    document["conditions"]["onnxruntime"] = "1.0"
    file.write_text(json.dumps(document))
    third = run("edge_node", "serve", "--bundle", broken, "--bundle", good, *node)
    assert "measuring again: onnxruntime changed" in third.stderr
    again = read_tuning(file)
    assert again is not None
    assert again.conditions == tuning.conditions


def test_variants_must_be_of_one_model_and_each_another(tiny_bundle: Bundle, tmp_path: Path, run: Run) -> None:
    int4 = tiny_bundle("int4")
    node = ["--id", "a", "--experts", "L*:E0", "--broker", "mqtt://127.0.0.1:1"]
    twice = run("edge_node", "--bundle", int4, "--bundle", int4, "--tuned", tmp_path / "t", *node)
    assert (twice.returncode, "are both int4 b32" in twice.stderr) == (23, True)
    nowhere = run("edge_node", "--bundle", int4, "--bundle", tiny_bundle("int8"), *node)
    assert (nowhere.returncode, "--tuned FILE" in nowhere.stderr) == (2, True)
    (tmp_path / "t").write_text("{}")
    garbled = run("edge_node", "--bundle", int4, "--tuned", tmp_path / "t", *node)
    assert (garbled.returncode, "is not a tuning file" in garbled.stderr) == (23, True)
    assert (tmp_path / "t").read_text() == "{}"
