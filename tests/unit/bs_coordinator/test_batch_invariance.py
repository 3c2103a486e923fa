"""A token's hidden states and logits do not depend on the tokens computed with it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.selection import TopK
from bs_coordinator.trunk import llama
from bs_coordinator.trunk import packed as packed_weights
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.load import load_trunk
from bs_coordinator.trunk.packed import PackedLinear, available
from testbed.evaluation.local_experts import LocalExperts
from wire.manifest import Scheme
from wire.tensors import WireDtype


@pytest.mark.parametrize(("scheme", "packed"), [("int4", True), ("int8", True), ("fp32", True), ("fp32", False)])
def test_a_token_gets_bitwise_the_same_alone_in_a_draft_and_in_a_batch(
    tiny_bundle: Callable[[Scheme], Path], scheme: Scheme, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr(packed_weights, "available", lambda: False)
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


@pytest.mark.skipif(not available(), reason="this torch has no kernels for packed weights")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 100])
def test_packed_weights_multiply_like_unpacked_ones(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    plain = torch.nn.Linear(96, 40, bias=bias).requires_grad_(False)
    layer = PackedLinear(plain)
    layer.weight = plain.weight
    x = torch.randn(1, rows, 96)
    exact = torch.nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    # A sum of 96 products, each rounded to 24 bits.
    assert torch.allclose(layer(x).double(), exact, rtol=0, atol=96 * 2**-24 * float(exact.abs().max()))
    assert torch.equal(layer.unpacked().weight, plain.weight)
    assert torch.equal(layer.unpacked()(x), plain(x))


def test_where_packed_rows_depend_on_each_other_weights_are_not_packed(
    tiny_bundle: Callable[[Scheme], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_bundle("fp32") / "trunk"

    def logits() -> torch.Tensor:
        trunk = load_trunk(folder)
        assert trunk.batch_invariant
        model = DistributedModel(trunk, LocalExperts(tiny_bundle("fp32"), threads=1), TopK(2))
        return model.step([SequenceInput([5, 6, 7], trunk.new_cache())])[0][0]

    trials = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(llama, "rows_are_independent", lambda layers: next(trials))
        unpacked = logits()
    monkeypatch.setattr(packed_weights, "available", lambda: False)
    assert torch.equal(unpacked, logits())
