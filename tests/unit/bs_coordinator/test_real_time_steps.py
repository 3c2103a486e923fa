"""Steps of few tokens have real-time priority, where the model is told so; prompts never have it."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bs_coordinator.engine.experts import Ready
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.load import load_trunk
from common import real_time
from testbed.evaluation.local_experts import LocalExperts
from wire.tensors import Array, WireDtype

REFUSED = real_time.why_not()


class _Experts(LocalExperts):
    """Notes the policy of the thread that asks."""

    def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
        self.policies = {*getattr(self, "policies", set()), os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK}
        return super().begin(layer, hidden, gate)


@pytest.mark.skipif(bool(REFUSED), reason=f"no real-time priority here: {REFUSED}")
@pytest.mark.parametrize(
    ("raises", "tokens", "policy"),
    [(True, 1, os.SCHED_RR), (True, 16, os.SCHED_RR), (True, 17, os.SCHED_OTHER), (False, 1, os.SCHED_OTHER)],
)
def test_a_step(random_bundle: Path, raises: bool, tokens: int, policy: int) -> None:
    experts = _Experts(random_bundle, threads=1, wire=WireDtype.FP16)
    model = DistributedModel(load_trunk(random_bundle / "trunk"), experts, TopK(2))
    model.raises_priority = raises

    def step() -> int:
        model.step([SequenceInput(list(range(1, tokens + 1)), model.trunk.new_cache())])
        return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK

    with ThreadPoolExecutor(1) as pool:
        after = pool.submit(step).result(60)
    assert experts.policies == {policy}
    assert after == os.SCHED_OTHER
