"""A token's hidden states and logits do not depend on the tokens computed with it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.load import load_trunk
from testbed.evaluation.local_experts import LocalExperts
from wire.manifest import Scheme
from wire.tensors import WireDtype


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp32"])
def test_a_token_gets_bitwise_the_same_alone_in_a_draft_and_in_a_batch(
    tiny_bundle: Callable[[Scheme], Path], scheme: Scheme
) -> None:
    bundle = tiny_bundle(scheme)
    trunk = load_trunk(bundle / "trunk")
    model = DistributedModel(trunk, LocalExperts(bundle, threads=1, wire=WireDtype.FP16), TopK(2))
    ids = torch.randint(0, 40000, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    alone = trunk.new_cache()
    model.step([SequenceInput(ids[:30], alone)])
    expected = [model.step([SequenceInput([id], alone)])[0][0] for id in ids[30:46]]
    other = trunk.new_cache()
    model.step([SequenceInput(ids[10:50], other)])
    for count in (2, 3, 5, 8, 9, 16):
        trunk.truncate(alone, 30)
        drafted = SequenceInput(ids[30 : 30 + count], alone, rows=list(range(count)))
        (_, logits), _ = model.step([SequenceInput([ids[7]], other), drafted])
        for row, one in zip(logits, expected[:count], strict=True):
            assert torch.equal(row, one[0]), count
