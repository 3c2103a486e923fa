"""The worker: frames in, weighted sums out, computed by real onnxruntime sessions."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from common import real_time
from edge_node.errors import MemoryBudgetError
from edge_node.experts import memory
from edge_node.experts.memory import check_memory, needed_bytes
from edge_node.experts.runtime import ExpertRuntime
from edge_node.worker import Worker
from wire import frames
from wire.errors import BundleError, ProbeError
from wire.experts import ExpertId, parse_selector
from wire.frame_auth import ClusterKey
from wire.frames import (
    ErrorFrame,
    ExpertRows,
    Frame,
    NodeDurations,
    PingFrame,
    PongFrame,
    RequestId,
    ResultFrame,
    Status,
    WorkFrame,
)
from wire.manifest import Scheme, load_manifest
from wire.probe import probe_input
from wire.tensors import Array, WireDtype

Bundle = Callable[[Scheme], Path]
REFUSED = real_time.why_not()


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Bundle) -> ExpertRuntime:
    bundle = tiny_bundle("int8")
    ids = parse_selector("L*:E2-3", layers=2, experts=8)
    return ExpertRuntime(bundle, load_manifest(bundle), ids)


def _work(experts: list[ExpertRows], tokens: int = 4, hidden: int = 576, deadline_ms: int = 0) -> WorkFrame:
    x = probe_input(hidden, rows=tokens)
    return WorkFrame(RequestId(1, 2, 3), 1, deadline_ms, experts, x, WireDtype.FP32)


def _rows(expert: int, rows: list[int], weights: list[float]) -> ExpertRows:
    return ExpertRows(expert, np.array(rows, np.uint32), np.array(weights, np.float32))


def _answer(worker: Worker, frame: WorkFrame, waited_ms: int = 0) -> Frame:
    reply = worker.answer(frames.encode(frame), time.perf_counter_ns() - waited_ms * 1_000_000)
    assert reply is not None
    return frames.decode(reply)


def test_the_answer_is_the_weighted_sum(runtime: ExpertRuntime) -> None:
    frame = _work([_rows(2, [0, 1, 3], [0.25, 1, 0.5]), _rows(3, [0], [0.75])])
    result = _answer(Worker(runtime), frame)
    assert isinstance(result, ResultFrame)
    assert (result.id, result.layer, result.dtype) == (frame.id, 1, WireDtype.FP32)
    e2 = runtime.run(ExpertId(1, 2), frame.hidden).copy()
    e3 = runtime.run(ExpertId(1, 3), frame.hidden).copy()
    expected = np.stack([0.25 * e2[0] + 0.75 * e3[0], e2[1], 0 * e2[2], 0.5 * e2[3]])
    # Other batch sizes may use other kernels: fp32 sums in another order.
    np.testing.assert_allclose(result.output, expected, atol=1e-4 * float(np.abs(expected).max()))
    assert result.durations.compute_ns > 0
    assert result.durations.encode_ns > 0


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "int8", "int4"])
def test_a_token_does_not_depend_on_its_batch_mates(tiny_bundle: Bundle, scheme: Scheme) -> None:
    """One call with many tokens and many calls with one give the same to float rounding, in every such scheme."""
    bundle = tiny_bundle(scheme)
    runtime = ExpertRuntime(bundle, load_manifest(bundle), [ExpertId(0, 0)])
    x = probe_input(576, rows=9) * np.geomspace(0.1, 10, 9, dtype=np.float32)[:, None]
    together = runtime.run(ExpertId(0, 0), x).copy()
    for row in range(9):
        alone = runtime.run(ExpertId(0, 0), x[row : row + 1])[0]
        assert np.linalg.norm(together[row] - alone) <= 1e-4 * np.linalg.norm(alone)


@pytest.mark.parametrize(
    ("frame", "waited_ms", "status"),
    [
        (_work([_rows(5, [0], [1])]), 0, Status.UNKNOWN_EXPERT),
        (_work([_rows(2, [0], [1])], hidden=64), 0, Status.WRONG_SHAPE),
        (_work([_rows(2, [0], [1])], deadline_ms=5), 50, Status.EXPIRED),
        (_work([_rows(2, [0], [3e38]), _rows(3, [0], [3e38])]), 0, Status.NOT_FINITE),
    ],
)
def test_refusals_have_a_reason(runtime: ExpertRuntime, frame: WorkFrame, waited_ms: int, status: Status) -> None:
    worker = Worker(runtime)
    with np.errstate(over="ignore", invalid="ignore"):
        refusal = _answer(worker, frame, waited_ms)
    assert isinstance(refusal, ErrorFrame)
    assert (refusal.status, refusal.id) == (status, frame.id)
    assert worker.counts[f"refused:{status.name.lower()}"] == 1


def test_requests_that_were_recorded_before_a_restart_are_dropped(
    runtime: ExpertRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    key = ClusterKey("lab", bytes(32))
    before, after = (Worker(runtime, node_key=key.node_key("a")) for _ in range(2))
    base_station = key.authenticator("a", before.boot_id)
    work = frames.encode(_work([_rows(2, [0], [1])]), authenticator=base_station)
    ping = frames.encode(PingFrame(RequestId(1, 9)), authenticator=base_station)
    for recorded in (work, ping):
        assert before.answer(recorded, time.perf_counter_ns()) is not None
        assert before.answer(recorded, time.perf_counter_ns()) is None
        assert after.answer(recorded, time.perf_counter_ns()) is None
    assert before.counts["dropped:replayed"] == 2
    assert after.counts == {"dropped:forged": 2}
    assert [record.message for record in caplog.records if "an earlier start" in record.message] != []
    assert len(caplog.records) == 1  # an attacker must not fill the log


def test_pings_are_answered_and_noise_is_not(runtime: ExpertRuntime) -> None:
    worker = Worker(runtime)
    pong = worker.answer(
        frames.encode(PingFrame(RequestId(1, 2), b"xyz", reply_bytes=5)), time.perf_counter_ns() - 10**7
    )
    assert pong is not None
    answer = frames.decode(pong)
    assert isinstance(answer, PongFrame)
    assert (answer.id, answer.payload) == (RequestId(1, 2), bytes(5))
    assert answer.durations.queue_ns >= 10**7
    result = ResultFrame(RequestId(1, 2), 0, np.ones((1, 4), np.float32), WireDtype.FP32, NodeDurations())
    for noise in (b"", b"\0" * 100, frames.encode(result)):
        assert worker.answer(noise, 0) is None
    assert sum(n for reason, n in worker.counts.items() if reason.startswith("dropped")) == 3


def test_an_expert_that_computes_something_else_is_not_served(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = tiny_bundle("int8")
    manifest = load_manifest(bundle)
    first, second = manifest.experts[:2]
    swapped = type(first)(
        layer=first.layer, expert=first.expert, files=first.files, probe_output=second.probe_output,
        error=first.error, source_sha256=first.source_sha256,
    )  # fmt: skip
    import msgspec

    other = msgspec.structs.replace(manifest, experts=(swapped,))
    with pytest.raises(ProbeError, match="L00:E0 computes something else"):
        ExpertRuntime(bundle, other, [first.id])
    with pytest.raises(BundleError, match="no expert L01:E7"):
        ExpertRuntime(bundle, other, [ExpertId(1, 7)])


def test_memory_is_asked_before_loading(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = load_manifest(tiny_bundle("fp32")).experts
    needed = needed_bytes(entries, "fp32")
    assert needed > sum(entry.bytes for entry in entries)
    check_memory(needed, budget=needed)
    with pytest.raises(MemoryBudgetError) as refused:
        check_memory(needed, budget=needed - 1)
    assert (refused.value.needed_bytes, refused.value.available_bytes) == (needed, needed - 1)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(MemoryBudgetError, match="available on this device"):
        check_memory(needed, budget=None)


@pytest.mark.parametrize(("scheme", "same"), [("int4", True), ("int8-dynamic", False)])
def test_a_runtime_finds_out_whether_results_depend_on_the_batch(
    tiny_bundle: Bundle, scheme: Scheme, same: bool
) -> None:
    bundle = tiny_bundle(scheme)
    id = ExpertId(1, 2)
    assert ExpertRuntime(bundle, load_manifest(bundle), [id]).batch_invariant(id) is same


@pytest.mark.skipif(bool(REFUSED), reason=f"no real-time priority here: {REFUSED}")
def test_many_tokens_are_computed_with_normal_priority(runtime: ExpertRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    policies: list[int] = []
    run = runtime.run

    def noting(unit: ExpertId, x: Array) -> Array:
        policies.append(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)
        return run(unit, x)

    monkeypatch.setattr(runtime, "run", noting)

    def answer() -> None:
        with real_time.raised():
            for tokens in (1, 16, 17, 1):
                answered = _answer(Worker(runtime), _work([_rows(2, [0], [1])], tokens=tokens))
                assert isinstance(answered, ResultFrame)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(answer).result(60)
    assert policies == [os.SCHED_RR, os.SCHED_RR, os.SCHED_OTHER, os.SCHED_RR]
