"""The trunk that is transformers' own model: steps with the reference's experts against the whole model."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bs_coordinator.config import SamplingConfig, TrunkDtype
from bs_coordinator.engine.experts import ExpertOutput, Ready
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.sequence import Sequence
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.errors import AnswerError, DispatchError, TrunkError
from bs_coordinator.selection import TopK
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.trunk.forward_pass import ExpertCall, ForwardPass
from bs_coordinator.trunk.generic import GenericTrunk
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.llama import LlamaTrunk
from bs_coordinator.trunk.load import load_trunk
from bs_coordinator.trunk.meta_model import expert_modules
from bs_coordinator.trunk.routing_rule import find_rule
from tests.checkpoints import VOCABULARY, edit_config, tiny_moe
from wire.errors import BundleError
from wire.tensors import Array

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
IDS = torch.randint(3, VOCABULARY, (40,), generator=torch.Generator().manual_seed(5)).tolist()
_EXPERTS = re.compile(r"\.experts\.|block_sparse_moe\.(input|output)_linear")


class ReferenceExperts:
    """The experts of a whole model, in fp32 on the CPU; can fail at a given layer."""

    def __init__(self, model: Any) -> None:
        model.set_experts_implementation("eager")
        self._modules = expert_modules(model.float())
        self.fail_at: int | None = None
        self.requests = 0

    def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
        self.requests += 1
        if layer == self.fail_at:
            raise DispatchError("as told")
        weights, chosen = torch.topk(torch.from_numpy(gate), 2, dim=1)
        with torch.inference_mode():
            return Ready(ExpertOutput(self._modules[layer](torch.from_numpy(hidden), chosen, weights).numpy()))

    def forecast(self, layer: int) -> LayerForecast:
        return LayerForecast.even(layer, 8)


Built = tuple[Path, Any, ReferenceExperts]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Folder of the trunk, whole model and its experts, by family."""
    made: dict[str, Built] = {}

    def build(family: str) -> Built:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = tiny_moe(folder, family)
            tensors = load_file(folder / "model.safetensors")
            trunk = {name: tensor for name, tensor in tensors.items() if not _EXPERTS.search(name)}
            save_file(trunk, folder / "model.safetensors", {"format": "pt"})
            made[family] = folder, model, ReferenceExperts(model)
        made[family][2].fail_at = None
        return made[family]

    return build


def _logits(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([IDS])).logits[0]
    return logits


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("family", "layers", "rule"),
    [
        ("mixtral", 3, (False, False, True)),
        ("qwen2_moe", 3, (False, False, True)),
        ("deepseek_v3", 2, (True, False, False)),
        ("ernie4_5_moe", 2, (False, True, True)),
        ("lfm2_moe", 2, (True, True, True)),
        ("granitemoehybrid", 3, (False, False, True)),
        ("gpt_oss", 3, (False, False, True)),
        ("phimoe", 3, None),
    ],
)
def test_steps_are_transformers_steps(
    built: Callable[[str], Built], device: str, family: str, layers: int, rule: tuple[bool, bool, bool] | None
) -> None:
    """A prompt in pieces that are under way together, one that continues it, then single tokens."""
    folder, reference, experts = built(family)
    expected = _logits(reference)
    trunk = load_trunk(folder, device=device) if family != "mixtral" else GenericTrunk(folder, device=device)
    assert isinstance(trunk, GenericTrunk)
    assert trunk.layers == layers
    assert {f.rule and (f.rule.sigmoid, f.rule.bias is not None, f.rule.by_scores) for f in trunk.moe} == {rule}
    assert trunk.scored is (rule is not None)
    model = DistributedModel(trunk, experts, TopK(2))
    model.piece_tokens = 8
    experts.requests, cache = 0, trunk.new_cache()
    first, _ = model.step([SequenceInput(IDS[:22], cache)], all_logits=True)
    assert experts.requests == 3 * layers
    steps = [
        model.step([SequenceInput(ids, cache)], all_logits=True)[0] for ids in (IDS[22:34], *([i] for i in IDS[34:]))
    ]
    found = torch.cat([first[0], *(logits for (logits,) in steps)])
    assert _apart(found, expected) < 1e-5
    (some,), _ = model.step([SequenceInput(IDS, trunk.new_cache(), rows=[3, 20])])
    assert some.shape[0] == 2
    assert _apart(some, expected[[3, 20]]) < 1e-5


def test_generic_and_own_blocks_agree(built: Callable[[str], Built]) -> None:
    folder, _, experts = built("mixtral")
    steps = []
    for trunk in (GenericTrunk(folder), load_trunk(folder)):
        model, cache = DistributedModel(trunk, experts, TopK(2)), trunk.new_cache()
        steps.append(torch.cat([model.step([SequenceInput(ids, cache)])[0][0] for ids in (IDS[:20], IDS[20:21])]))
    assert isinstance(trunk, LlamaTrunk)
    assert _apart(steps[0], steps[1]) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.05)])
def test_bf16(built: Callable[[str], Built], dtype: TrunkDtype, tolerance: float) -> None:
    folder, reference, experts = built("deepseek_v3")
    trunk = GenericTrunk(folder, dtype=dtype)
    model = DistributedModel(trunk, experts, TopK(2))
    (logits,), _ = model.step([SequenceInput(IDS, trunk.new_cache())], all_logits=True)
    assert logits.dtype == torch.float32
    # Where rounding decides between two experts of nearly the same score, a token's logits differ.
    apart = (logits - _logits(reference)).norm(dim=1) / _logits(reference).norm(dim=1)
    assert float(apart.median()) < tolerance


def test_int8(built: Callable[[str], Built]) -> None:
    """Shared experts are quantised too, and still computed while the others are awaited; what weighs them is not."""
    folder, reference, experts = built("qwen2_moe")
    trunk = GenericTrunk(folder, quantisation="int8")
    kept = {name.rpartition(".")[2] for name, m in trunk._model.named_modules() if type(m) is torch.nn.Linear}
    assert kept == {"shared_expert_gate"}
    assert [len(layer) for layer in trunk.beside] == [1] * trunk.layers
    model = DistributedModel(trunk, experts, TopK(2))
    (logits,), _ = model.step([SequenceInput(IDS, trunk.new_cache())], all_logits=True)
    # Where rounding decides between two experts of nearly the same score, a token's logits differ.
    apart = (logits - _logits(reference)).norm(dim=1) / _logits(reference).norm(dim=1)
    assert 1e-4 < float(apart.median()) < 0.05


@pytest.mark.parametrize("family", ["gpt_oss", "lfm2_moe", "granitemoehybrid"])
def test_a_failed_step_leaves_the_cache_as_it_was(built: Callable[[str], Built], family: str) -> None:
    folder, _, experts = built(family)
    trunk = GenericTrunk(folder)
    model, cache, undisturbed = DistributedModel(trunk, experts, TopK(2)), trunk.new_cache(), trunk.new_cache()
    model.piece_tokens = 4
    for held in (cache, undisturbed):
        model.step([SequenceInput(IDS[:10], held)])
    for ids in (IDS[10:11], IDS[10:30]):
        for layer in range(trunk.layers):
            experts.fail_at = layer
            with pytest.raises(DispatchError):
                model.step([SequenceInput(ids, cache)])
            assert cache.get_seq_length() == 10
    experts.fail_at = None
    for ids in (IDS[10:11], IDS[11:20]):
        (after,), _ = model.step([SequenceInput(ids, cache)])
        (expected,), _ = model.step([SequenceInput(ids, undisturbed)])
        np.testing.assert_array_equal(after.numpy(), expected.numpy())


@pytest.mark.parametrize(("family", "before"), [("qwen2_moe", True), ("deepseek_v3", False)])
def test_shared_experts_are_computed_while_the_others_are_awaited(
    built: Callable[[str], Built], family: str, before: bool
) -> None:
    """Between the request for a layer's experts and its answer, not before and not after."""
    folder, _, experts = built(family)
    trunk = GenericTrunk(folder)
    assert [[beside.before for beside in layer] for layer in trunk.beside] == [[before]] * trunk.layers
    computed: list[int] = []
    for layer, (beside,) in enumerate(trunk.beside):
        beside._compute = _noting(beside._compute, computed, layer)
    seen = []

    class Late(ReferenceExperts):
        def begin(self, layer: int, hidden: Array, gate: Array) -> Ready:
            seen.append(list(computed))
            return super().begin(layer, hidden, gate)

    late = Late.__new__(Late)
    vars(late).update(vars(experts))
    model = DistributedModel(trunk, late, TopK(2))
    for count in (3, 1):
        computed.clear()
        seen.clear()
        model.step([SequenceInput(IDS[:count], trunk.new_cache())])
        assert seen == [list(range(layer)) for layer in range(trunk.layers)]
        assert computed == list(range(trunk.layers))


def _noting(compute: Callable[[Tensor], Tensor], notes: list[int], layer: int) -> Callable[[Tensor], Tensor]:
    def noted(x: Tensor) -> Tensor:
        notes.append(layer)
        return compute(x)

    return noted


def test_an_abandoned_pass_ends_where_it_is(built: Callable[[str], Built]) -> None:
    folder, _, _ = built("qwen2_moe")
    trunk = GenericTrunk(folder)
    ended = []

    def call() -> Tensor:
        try:
            return cast(Tensor, trunk._model(input_ids=torch.tensor([IDS]), use_cache=False).logits)
        finally:
            ended.append(True)

    with torch.inference_mode():
        running = ForwardPass(call)
        assert isinstance(running.resume(), ExpertCall)
        running.abandon()
        assert ended == [True]
        running.abandon()
        ForwardPass(call).abandon()
    assert ended == [True]


def test_sequences_in_one_step_are_computed_by_themselves(built: Callable[[str], Built]) -> None:
    """One request for each layer, and bitwise what each sequence gets alone."""
    folder, _, experts = built("granitemoehybrid")
    trunk = GenericTrunk(folder)
    model = DistributedModel(trunk, experts, TopK(2))
    lengths = (5, 9, 1)
    caches = [trunk.new_cache() for _ in range(2 * len(lengths))]
    alone = [model.step([SequenceInput(IDS[:n], cache)])[0][0] for n, cache in zip(lengths, caches, strict=False)]
    experts.requests = 0
    both, _ = model.step([SequenceInput(IDS[:n], c) for n, c in zip(lengths, caches[len(lengths) :], strict=True)])
    assert experts.requests == trunk.layers
    for found, expected in zip(both, alone, strict=True):
        # Experts compute the rows of all sequences in one product.
        assert _apart(found, expected) < 1e-6


def test_recurrent_layers_can_only_grow(built: Callable[[str], Built], tmp_path: Path) -> None:
    """A prompt that continues what is cached is continued; any other is computed anew. Nothing is drafted."""
    folder, _, experts = built("lfm2_moe")
    trunk = GenericTrunk(folder)
    assert not trunk.can_truncate
    model = DistributedModel(trunk, experts, TopK(2))
    sequence = Sequence(model, Tokenizer(folder), speculation=cast(Any, SimpleNamespace(drafter=pytest.fail)))
    sequence.model.step([SequenceInput(IDS[:10], sequence.cache)])
    sequence.cached_ids = IDS[:10]
    assert sequence.reuse_cache(IDS[:12]) == IDS[10:12]
    cache = sequence.cache
    assert sequence.reuse_cache(IDS[:8]) == IDS[:8]
    assert sequence.cache is not cache
    assert sequence.cached_ids == []
    with pytest.raises(TrunkError, match="can't be cut"):
        trunk.truncate(cache, 5)


def test_steps_may_run_in_any_thread(built: Callable[[str], Built]) -> None:
    """A pass lives in the thread that runs its step; the model was loaded in another."""
    folder, reference, experts = built("qwen2_moe")
    model = DistributedModel(GenericTrunk(folder), experts, TopK(2))
    cache = model.trunk.new_cache()
    for ids in (IDS[:10], IDS[10:]):
        with ThreadPoolExecutor(1) as thread:
            (logits,), _ = thread.submit(model.step, [SequenceInput(ids, cache)]).result()
    assert _apart(logits[0], _logits(reference)[-1]) < 1e-5
    assert logits.is_inference()


def test_a_model_that_forgets_its_state_gets_prompts_whole(built: Callable[[str], Built]) -> None:
    """transformers' Jamba starts anew if several tokens follow others."""
    folder, reference, experts = built("jamba")
    trunk = GenericTrunk(folder)
    assert (trunk.continues, trunk.pipelines) == (False, False)
    model = DistributedModel(trunk, experts, TopK(2))
    model.piece_tokens = 4
    answer = Sequence(model, Tokenizer(folder)).answer(IDS, SamplingConfig(max_tokens=1))
    inputs = answer.next_input(prefill_tokens=8)
    (logits,), _ = model.step([inputs])
    assert _apart(logits[0], _logits(reference)[-1]) < 1e-5


def test_errors_of_transformers_are_one_line_and_leave_the_cache(built: Callable[[str], Built]) -> None:
    folder, _, experts = built("granitemoehybrid")
    trunk = GenericTrunk(folder)
    model, cache = DistributedModel(trunk, experts, TopK(2)), trunk.new_cache()
    model.step([SequenceInput(IDS[:4], cache)])
    with pytest.raises(AnswerError, match=r"^transformers failed: IndexError: [^\n]+$"):
        model.step([SequenceInput([VOCABULARY + 9], cache)])
    assert cache.get_seq_length() == 4
    with pytest.raises(TrunkError, match="experts are elsewhere"):
        trunk._model(input_ids=torch.tensor([IDS]))


def test_a_trunk_that_does_not_fit_is_refused(built: Callable[[str], Built], tmp_path: Path) -> None:
    folder, _, _ = built("qwen2_moe")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BundleError, match=r"describes: model\.norm\.weight$"):
        load_trunk(tmp_path)
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BundleError, match=r"norm\.weight"):
        load_trunk(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(BundleError, match="can't read"):
        load_trunk(tmp_path)
    edit_config(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(TrunkError, match="no experts that can be computed elsewhere"):
        load_trunk(tmp_path)
    edit_config(tmp_path, model_type="unheard_of")
    with pytest.raises(TrunkError, match=r"^transformers can't build the model [^\n]+unheard_of[^\n]+$"):
        load_trunk(tmp_path)
    (tmp_path / "theirs.py").write_text("raise SystemExit('code of a checkpoint was run')")
    edit_config(tmp_path, auto_map={"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"})
    with pytest.raises(TrunkError, match=r"^transformers can't build the model [^\n]+$"):
        load_trunk(tmp_path)


_RANDOM = torch.Generator().manual_seed(3)
_ROUTER = torch.randn(50, 16, generator=_RANDOM)
_BIAS = torch.randn(16, generator=_RANDOM)
_SCALE = torch.rand(16, generator=_RANDOM) + 0.5


def _chosen(scores: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    chosen = order.topk(4, dim=1).indices
    weights = scores.gather(1, chosen)
    return chosen, 2.5 * weights / weights.sum(dim=1, keepdim=True)


def test_rules_are_found_and_give_the_models_choice() -> None:
    soft, sigmoid = _ROUTER.softmax(dim=1), _ROUTER.sigmoid()
    groups = (sigmoid.view(50, 4, 4).sum(dim=2, keepdim=True).argsort(dim=1).argsort(dim=1) >= 2).expand(-1, -1, 4)
    for scores, order, expected in (
        (soft, soft, (False, False, False, True)),
        (sigmoid, sigmoid + _BIAS, (True, False, True, True)),
        (soft * _SCALE, soft * _SCALE, (False, True, False, True)),
        (sigmoid, sigmoid * groups.reshape(50, 16), (True, False, False, False)),
    ):
        chosen, weights = _chosen(scores, order)
        rule = find_rule(_ROUTER, chosen, weights, [_BIAS, _SCALE])
        assert rule is not None
        assert (rule.sigmoid, rule.scale is not None, rule.bias is not None, rule.by_scores) == expected
        dense = torch.zeros_like(scores).scatter(1, chosen, weights).numpy()
        routing = rule.routing(_ROUTER, dense)
        assert routing.scores is not None
        best = np.argsort(-(routing.scores if routing.order is None else routing.order), axis=1)[:, :4]
        np.testing.assert_array_equal(np.sort(best), np.sort(chosen.numpy()))
        ratio = np.take_along_axis(dense / routing.scores, best, axis=1)
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-4)


def test_a_rule_that_is_not_known_is_not_found() -> None:
    chosen, weights = _chosen(_ROUTER.exp() ** 2, _ROUTER)
    assert find_rule(_ROUTER, chosen, weights, [_BIAS, _SCALE]) is None
