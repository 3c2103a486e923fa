"""Trunk and step against transformers' MixtralForCausalLM, with the reference's own experts; also on a GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from bs_coordinator.config import TrunkDtype
from bs_coordinator.engine.experts import ExpertOutput, LargestAnswer, Ready
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.errors import AnswerError, DispatchError, TrunkError
from bs_coordinator.selection import TopK
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.llama import LlamaTrunk
from bs_coordinator.trunk.load import check_device, load_trunk
from wire.errors import BundleError
from wire.tensors import Array

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


class ReferenceExperts:
    """The experts of a transformers model, in fp32 on the CPU; can fail at a given layer."""

    def __init__(self, model: Any) -> None:
        self._layers = [layer.mlp.experts.float().cpu() for layer in model.model.layers]
        self.fail_at: int | None = None

    def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
        if layer == self.fail_at:
            raise DispatchError("as told")
        index = torch.arange(gate.shape[1]).expand(gate.shape)
        with torch.inference_mode():
            output = self._layers[layer](torch.from_numpy(hidden), index, torch.from_numpy(gate))
        return Ready(ExpertOutput(output.numpy()))

    def forecast(self, layer: int) -> LayerForecast:
        return LayerForecast.even(layer, len(self._layers[layer].gate_up_proj))


def _checkpoint(folder: Path, **changes: object) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "max_position_embeddings": 256, **changes,
    }  # fmt: skip
    model = MixtralForCausalLM(MixtralConfig(**settings)).eval()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    trunk = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    save_file(trunk, folder / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.03)])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"sliding_window": 16}])
def test_steps_are_transformers_steps(
    tmp_path: Path, device: str, dtype: TrunkDtype, tolerance: float, changes: dict[str, object]
) -> None:
    """bf16 is allowed what rounding to 8 bits of mantissa costs over three layers."""
    reference = _checkpoint(tmp_path, **changes)
    ids = torch.randint(0, 128, (40,)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    trunk = load_trunk(tmp_path, device=device, dtype=dtype)
    model = DistributedModel(trunk, ReferenceExperts(reference), TopK(2))
    cache = trunk.new_cache()
    pieces = [ids[:20], ids[20:33], *([i] for i in ids[33:])]
    logits = torch.cat([model.step([SequenceInput(piece, cache)], all_logits=True)[0][0] for piece in pieces])
    assert float((logits - expected).norm() / expected.norm()) <= tolerance


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.03)])
def test_graphs_are_the_eager_steps(tmp_path: Path, dtype: TrunkDtype, tolerance: float) -> None:
    """Past the point where the cache moves to a larger place, and after forgetting some of it."""
    reference = _checkpoint(
        tmp_path, hidden_size=512, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=1024
    )
    ids = torch.randint(0, 128, (300,)).tolist()
    results = []
    for graphs in (True, False):
        trunk = LlamaTrunk(tmp_path, device="cuda", dtype=dtype, graphs=graphs)
        model = DistributedModel(trunk, ReferenceExperts(reference), TopK(2))
        cache = trunk.new_cache()
        assert (trunk.graphs([SequenceInput(ids[:1], cache)]) is not None) is graphs
        model.step([SequenceInput(ids[:250], cache)])
        logits = [model.step([SequenceInput([i], cache)])[0][0] for i in ids[250:280]]
        trunk.truncate(cache, 260)
        logits += [model.step([SequenceInput([i], cache)])[0][0] for i in ids[280:]]
        results.append(torch.cat(logits))
    assert float((results[0] - results[1]).norm() / results[1].norm()) <= tolerance


def test_a_failed_step_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    reference = _checkpoint(tmp_path)
    trunk, experts = load_trunk(tmp_path), ReferenceExperts(reference)
    model = DistributedModel(trunk, experts, TopK(2))
    cache = trunk.new_cache()
    model.step([SequenceInput([1, 2, 3], cache)])
    for layer in (0, 1, 2):
        experts.fail_at = layer
        with pytest.raises(DispatchError):
            model.step([SequenceInput([4, 5], cache)])
        assert [kept.get_seq_length() for kept in cache.layers] == [3, 3, 3]
    experts.fail_at = None
    (after,), _ = model.step([SequenceInput([4, 5], cache)])
    (fresh,), _ = model.step([SequenceInput([1, 2, 3, 4, 5], trunk.new_cache())])
    np.testing.assert_allclose(after.numpy(), fresh.numpy(), atol=1e-5)


class _Liar(ReferenceExperts):
    """Gives one layer's output so large that the logits overflow, until its node is left out."""

    def __init__(self, model: Any, *, excess: float) -> None:
        super().__init__(model)
        self.excess = excess
        self.left_out: list[str] = []
        self.forgiven_after = 1

    def quarantine(self, node: str, why: str) -> None:
        assert "not finite" in why
        self.left_out.append(node)

    def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
        output = super().begin(layer, hidden, gate).output.output
        if layer == 1 and len(self.left_out) < self.forgiven_after:
            output = np.full_like(output, np.inf)
            return Ready(ExpertOutput(output, largest=LargestAnswer("liar", self.excess)))
        return Ready(ExpertOutput(output, largest=LargestAnswer("honest", 2.0)))


def test_logits_that_are_not_finite_find_the_node_and_the_step_is_repeated(tmp_path: Path) -> None:
    reference = _checkpoint(tmp_path)
    trunk, experts = load_trunk(tmp_path), _Liar(reference, excess=1e4)
    model = DistributedModel(trunk, experts, TopK(2), quarantine=experts.quarantine)
    cache = trunk.new_cache()
    (logits,), _ = model.step([SequenceInput([1, 2, 3], cache)])
    assert experts.left_out == ["liar"]
    (right,), _ = DistributedModel(trunk, ReferenceExperts(reference), TopK(2)).step(
        [SequenceInput([1, 2, 3], trunk.new_cache())]
    )
    np.testing.assert_array_equal(logits.numpy(), right.numpy())
    assert [kept.get_seq_length() for kept in cache.layers] == [3, 3, 3]


@pytest.mark.parametrize(("excess", "forgiven_after", "left_out"), [(2.5, 1, 0), (1e4, 99, 3)])
def test_logits_that_stay_infinite_are_an_error_of_the_answer(
    tmp_path: Path, excess: float, forgiven_after: int, left_out: int
) -> None:
    reference = _checkpoint(tmp_path)
    trunk, experts = load_trunk(tmp_path), _Liar(reference, excess=excess)
    experts.forgiven_after = forgiven_after
    acquitted: list[str] = []
    model = DistributedModel(trunk, experts, TopK(2), quarantine=experts.quarantine, acquit=acquitted.append)
    cache = trunk.new_cache()
    with pytest.raises(AnswerError, match="logits are not finite"):
        model.step([SequenceInput([1, 2, 3], cache)])
    assert len(experts.left_out) == left_out
    assert acquitted == experts.left_out  # it is the prompt's fault: other callers need the nodes
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_failed_token_can_be_tried_again(tmp_path: Path, device: str) -> None:
    reference = _checkpoint(tmp_path)
    trunk, experts = load_trunk(tmp_path, device=device), ReferenceExperts(reference)
    model = DistributedModel(trunk, experts, TopK(2))
    cache = trunk.new_cache()
    model.step([SequenceInput([1, 2, 3], cache)])
    for layer in (0, 1, 2):
        experts.fail_at = layer
        with pytest.raises(DispatchError):
            model.step([SequenceInput([4], cache)])
        # Other sequences may use the GPU before this one.
        experts.fail_at = None
        model.step([SequenceInput([1, 2, 3], trunk.new_cache())])
    (after,), _ = model.step([SequenceInput([4], cache)])
    (fresh,), _ = model.step([SequenceInput([1, 2, 3, 4], trunk.new_cache())])
    np.testing.assert_allclose(after.numpy(), fresh.numpy(), atol=1e-5)


def test_a_trunk_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"config\.json"):
        load_trunk(tmp_path)
    _checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BundleError, match=r"norm\.weight"):
        load_trunk(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(BundleError, match="can't read"):
        load_trunk(tmp_path)


def test_a_trunk_runs_on_processors_and_gpus_that_are_there() -> None:
    check_device("cpu")
    for name in ("", "banana", "mps", "meta", f"cuda:{torch.cuda.device_count()}"):
        with pytest.raises(TrunkError, match=rf"--device {name}:"):
            check_device(name)
