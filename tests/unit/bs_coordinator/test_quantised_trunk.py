"""Trunks in int8 and int4 against the matrices that their codes stand for, and against the trunk in fp32."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bs_coordinator.config import TrunkQuantisation
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.errors import TrunkError
from bs_coordinator.selection import TopK
from bs_coordinator.trunk import quantised
from bs_coordinator.trunk.generic import GenericTrunk
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.llama import LlamaTrunk
from bs_coordinator.trunk.load import load_trunk
from bs_coordinator.trunk.quantised import Codes, QuantisedLinear, dequantise, pack_nibbles, quantise, unpack_nibbles
from tests.unit.bs_coordinator.test_trunk import ReferenceExperts, _checkpoint

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
SCHEMES: list[TrunkQuantisation] = ["int8", "int4"]
BF16_STEP = 2.0**-8


def _layer(outputs: int, inputs: int, *, bias: bool = False, device: str = "cpu") -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias, device=device)
    with torch.no_grad():
        # Outputs of very different sizes, and one that is zero.
        layer.weight *= torch.logspace(-2, 1, outputs, device=device)[:, None]
        layer.weight[3] = 0
    return layer.requires_grad_(False), torch.randn(20, inputs, device=device)


@pytest.mark.parametrize("bits", [8, 4])
def test_no_weight_is_further_from_its_code_than_half_a_step(bits: int) -> None:
    weight = _layer(50, 96)[0].weight.detach()
    codes = quantise(weight, bits, torch.float32)
    if bits == 8:
        step = (weight.abs().amax(dim=1, keepdim=True) / 127).expand_as(weight)
    else:
        grouped = weight.view(50, 3, 32)
        step = ((grouped.amax(dim=2) - grouped.amin(dim=2)) / 15).repeat_interleave(32, dim=1)
    assert bool(((dequantise(codes) - weight).abs() <= step * 0.5001).all())
    assert bool((dequantise(codes)[3] == 0).all())


def test_nibbles() -> None:
    codes = torch.randint(0, 16, (6, 96), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (6, 48)
    assert packed[2, 16 + 5] == codes[2, 32 + 5] + 16 * codes[2, 32 + 5 + 16]
    assert torch.equal(unpack_nibbles(packed), codes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_multiplies_by_the_matrix_of_its_codes(bits: int, bias: bool, device: str) -> None:
    """On a CPU, inputs and outputs are rounded to bf16. 50 outputs are no multiple of the kernels' blocks."""
    plain, x = _layer(50, 96, bias=bias, device=device)
    layer = QuantisedLinear(plain, bits)
    layer.weight = plain.weight
    matrix = dequantise(quantise(plain.weight.detach(), bits, torch.bfloat16 if device == "cpu" else torch.float32))
    expected = x.double() @ matrix.double().t() + (plain.bias.double() if bias else 0)
    found = layer(x)
    assert found.dtype == x.dtype
    sizes = x.abs().double() @ matrix.abs().double().t() + 1e-3
    tolerance = 2 * BF16_STEP if device == "cpu" else 1e-5
    assert float(((found - expected).abs() / sizes).max()) <= tolerance
    assert torch.equal(layer(x[None])[0], found)
    assert layer(x[:0]).shape == (0, 50)
    assert "weight" not in dict(layer.named_parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("scheme", "tolerance"), [("int8", 0.03), ("int4", 0.25)])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_steps_are_nearly_those_of_the_whole_weights(
    tmp_path: Path, device: str, scheme: TrunkQuantisation, tolerance: float, changes: dict[str, object]
) -> None:
    """Random weights are the hardest: 8 bits leave 0.7 % of each product's norm, 4 bits 9 %, over three layers."""
    reference = _checkpoint(tmp_path, **changes)
    ids = torch.randint(0, 128, (40,)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    trunk = load_trunk(tmp_path, device=device, quantisation=scheme)
    model, cache = DistributedModel(trunk, ReferenceExperts(reference), TopK(2)), trunk.new_cache()
    pieces = [ids[:20], ids[20:33], *([i] for i in ids[33:])]
    logits = torch.cat([model.step([SequenceInput(piece, cache)], all_logits=True)[0][0] for piece in pieces])
    apart = float((logits - expected).norm() / expected.norm())
    assert 1e-4 < apart <= tolerance


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_is_bitwise_the_same_alone_and_among_others(tmp_path: Path, scheme: TrunkQuantisation) -> None:
    _checkpoint(tmp_path)
    trunk = load_trunk(tmp_path, quantisation=scheme)
    if not trunk.batch_invariant:
        pytest.skip("this processor's kernels round several tokens differently from one")
    caches = [trunk.new_cache() for _ in range(3)]

    def step(*inputs: SequenceInput) -> list[Tensor]:
        with torch.inference_mode():
            trunk_pass = trunk.start_pass(inputs)
            for layer in range(trunk.layers):
                hidden, _ = trunk_pass.attend(layer)
                trunk_pass.add(0.5 * hidden)  # experts whose results do not depend on other rows
            return trunk_pass.logits(all_logits=True)

    for cache in caches:
        step(SequenceInput([5, 6, 7], cache))
    alone = [step(SequenceInput([i], caches[0]))[0] for i in (8, 9, 10)]
    among = step(SequenceInput([1, 2], caches[1]), SequenceInput([8, 9, 10], caches[2]))[1]
    assert torch.equal(torch.cat(alone), among)


def test_small_and_decisive_weights_stay_whole(tmp_path: Path) -> None:
    _checkpoint(tmp_path)
    for kind in (LlamaTrunk, GenericTrunk):
        trunk: Any = kind(tmp_path, quantisation="int4")
        model = trunk._modules if kind is LlamaTrunk else trunk._model
        names = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}
        assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}
        assert next(w for name, w in model.named_parameters() if "gate" in name).dtype == torch.float32


def test_groups_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _checkpoint(tmp_path, hidden_size=48, num_attention_heads=3, num_key_value_heads=1)
    with pytest.raises(TrunkError, match=r"int4: layers\.0\.self_attn\.q_proj has 48 inputs.*use int8"):
        load_trunk(tmp_path, quantisation="int4")
    assert load_trunk(tmp_path, quantisation="int8").layers == 3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_while_loading_no_second_weight_is_whole(
    tmp_path: Path, scheme: TrunkQuantisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a weight arrives, all that came before it are codes."""
    _checkpoint(tmp_path, num_hidden_layers=6)
    alive: list[weakref.ref[Tensor]] = []
    most = []

    def noting(weight: Tensor, bits: int, dtype: torch.dtype) -> Codes:
        alive.append(weakref.ref(weight))
        most.append(sum(reference() is not None for reference in alive))
        return quantise(weight, bits, dtype)

    monkeypatch.setattr(quantised, "quantise", noting)
    trunk = LlamaTrunk(tmp_path, quantisation=scheme)
    assert len(most) == 6 * 4 + 1
    assert max(most) == 1
    plain = LlamaTrunk(tmp_path).weight_bytes
    assert trunk.weight_bytes < 0.6 * plain
