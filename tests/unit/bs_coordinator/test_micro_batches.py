"""Long inputs in micro-batches, several under way: each token once, in order, and bitwise as piece after piece."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from bs_coordinator.engine.experts import ExpertOutput
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.errors import DispatchError, ExpertsLostError, PlacementError
from bs_coordinator.selection import TopK
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.trunk.inputs import SequenceInput, cut_inputs
from bs_coordinator.trunk.load import load_trunk
from testbed.evaluation.local_experts import LocalExperts
from tests.checkpoints import VOCABULARY
from wire.tensors import Array, WireDtype

CACHE = DynamicCache()
inputs_of_a_step = st.lists(
    st.builds(
        SequenceInput,
        st.integers(1, 40).map(lambda count: list(range(count))),
        st.just(CACHE),
        rows=st.none() | st.just([0]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=50)
@given(inputs_of_a_step, st.integers(1, 12), st.booleans())
def test_pieces_hold_every_token_once_and_in_order(inputs: list[SequenceInput], most: int, all_logits: bool) -> None:
    batches = cut_inputs(inputs, most_tokens=most, all_logits=all_logits)
    step = [id for sequence in inputs for id in sequence.ids]
    for number, sequence in enumerate(inputs):
        pieces = [piece for batch in batches for piece in batch if piece.number == number]
        assert [id for piece in pieces for id in piece.inputs.ids] == sequence.ids
        # One piece per micro-batch, from the first on.
        assert all(piece in batch for batch, piece in zip(batches, pieces, strict=False))
        if len(pieces) > 1:
            sizes = [len(piece.inputs.ids) for piece in pieces]
            assert max(sizes) <= most
            assert max(sizes) - min(sizes) <= 1
            assert [piece.inputs.rows for piece in pieces] == [[]] * (len(pieces) - 1) + [None]
        for piece in pieces:
            end = piece.first_token + len(piece.inputs.ids)
            assert step[piece.first_token : end] == piece.inputs.ids
    assert all(batches)


class _Pending:
    def __init__(self, experts: "_LateExperts", layer: int, work: tuple[Array, Array]) -> None:
        self._experts = experts
        self.layer = layer
        self._work = work
        self.cancelled = False

    def result(self) -> ExpertOutput:
        if self.layer == self._experts.fail_at or self is self._experts.failing:
            self._experts.fail()
        self._experts.under_way.remove(self)
        return self._experts.local.begin(self.layer, *self._work).result()

    def cancel(self) -> None:
        self.cancelled = True


class _LateExperts:
    """Compute when they are waited for; count how many are under way."""

    def __init__(self, bundle: Path) -> None:
        self.local = LocalExperts(bundle, threads=1, wire=WireDtype.FP16)
        self.under_way: list[_Pending] = []
        self.most = 0
        self.fail_at = -1
        self.failing: _Pending | None = None

    def begin(self, layer: int, hidden: Array, gate: Array) -> _Pending:
        pending = _Pending(self, layer, (hidden.copy(), gate.copy()))
        self.under_way.append(pending)
        self.most = max(self.most, len(self.under_way))
        return pending

    def forecast(self, layer: int) -> LayerForecast:
        return self.local.forecast(layer)

    def fail(self) -> None:
        raise DispatchError("failed")


@pytest.fixture(scope="module")
def bundle(random_bundle: Path) -> Path:
    return random_bundle


IDS = [int(i) for i in np.random.default_rng(0).integers(1, VOCABULARY, 103)]


def test_pieces_under_way_together_give_bitwise_what_they_give_one_by_one(bundle: Path) -> None:
    trunk, experts = load_trunk(bundle / "trunk"), _LateExperts(bundle)
    model = DistributedModel(trunk, experts, TopK(2))
    model.piece_tokens = 1000
    one_by_one = trunk.new_cache()
    logits = []
    for start, end in ((0, 25), (25, 51), (51, 77), (77, 103)):
        (some,), _ = model.step([SequenceInput(IDS[start:end], one_by_one)], all_logits=True)
        logits.append(some)
    assert experts.most == 1
    model.piece_tokens = 26
    together = trunk.new_cache()
    (whole,), record = model.step([SequenceInput(IDS, together)], all_logits=True)
    assert experts.most == 4
    assert torch.equal(whole, torch.cat(logits))
    for kept, other in zip(together.layers, one_by_one.layers, strict=True):
        assert torch.equal(kept.keys, other.keys)
        assert torch.equal(kept.values, other.values)
    assert (record.tokens, [layer.pairs for layer in record.layers]) == (103, [206, 206])
    # The last token's alone, beside another sequence in the first piece.
    (last, beside), _ = model.step([SequenceInput(IDS, trunk.new_cache()), SequenceInput([5], trunk.new_cache())])
    trunk.truncate(one_by_one, 77)
    (expected,), _ = model.step([SequenceInput(IDS[77:], one_by_one)])
    (alone,), _ = model.step([SequenceInput([5], trunk.new_cache())])
    assert torch.equal(last, expected)
    assert torch.equal(beside, alone)


def test_a_failure_cancels_what_is_under_way_and_leaves_the_cache_as_it_was(bundle: Path) -> None:
    trunk, experts = load_trunk(bundle / "trunk"), _LateExperts(bundle)
    model = DistributedModel(trunk, experts, TopK(2))
    model.piece_tokens = 26
    cache = trunk.new_cache()
    model.step([SequenceInput(IDS[:7], cache)])
    experts.fail_at = 1
    with pytest.raises(DispatchError, match="failed"):
        model.step([SequenceInput(IDS, cache)])
    assert experts.under_way
    assert all(pending.cancelled for pending in experts.under_way)
    assert [layer.get_seq_length() for layer in cache.layers] == [7, 7]


def test_lost_experts_are_named_by_the_step_s_own_tokens(bundle: Path) -> None:
    class Losing(_LateExperts):
        """The second of two pieces loses an expert on its way."""

        def begin(self, layer: int, hidden: Array, gate: Array) -> _Pending:
            pending = super().begin(layer, hidden, gate)
            if layer == 0 and len(self.under_way) == 2 and not self.local.lost:
                self.failing = pending
            return pending

        def fail(self) -> None:
            self.local.lost, self.failing = frozenset({3}), None
            raise ExpertsLostError("failed")

    trunk = load_trunk(bundle / "trunk")
    experts = Losing(bundle)
    model = DistributedModel(trunk, experts, TopK(2), degrade=True)
    model.piece_tokens = 52
    _, record = model.step([SequenceInput(IDS, trunk.new_cache())])
    whole = DistributedModel(trunk, LocalExperts(bundle, threads=1, wire=WireDtype.FP16), TopK(2), degrade=True)
    assert isinstance(whole._experts, LocalExperts)
    whole._experts.lost = frozenset({3})
    whole.piece_tokens = 52
    _, expected = whole.step([SequenceInput(IDS, trunk.new_cache())])
    in_second_piece = {token for token in expected.layers[0].degraded if token >= len(IDS) // 2}
    assert in_second_piece
    assert set(record.layers[0].degraded) == in_second_piece


def test_a_holder_that_leaves_between_forecast_and_request_is_done_without(bundle: Path) -> None:
    class Leaving(_LateExperts):
        """A node says goodbye while its neighbours compute for the layer before."""

        def begin(self, layer: int, hidden: Array, gate: Array) -> _Pending:
            if layer == 1 and not self.local.lost:
                self.local.lost = frozenset({int(gate.any(axis=0).argmax())})
            if layer == 1 and gate[:, sorted(self.local.lost)].any():
                raise PlacementError("failed")
            return super().begin(layer, hidden, gate)

    trunk = load_trunk(bundle / "trunk")
    _, record = DistributedModel(trunk, Leaving(bundle), TopK(2), degrade=True).step(
        [SequenceInput(IDS, trunk.new_cache())]
    )
    assert not record.layers[0].degraded
    assert record.layers[1].degraded
    with pytest.raises(PlacementError, match="failed"):
        DistributedModel(trunk, Leaving(bundle), TopK(2)).step([SequenceInput(IDS, trunk.new_cache())])


def test_without_degrade_lost_experts_are_asked_and_the_step_fails(bundle: Path) -> None:
    class Lost(_LateExperts):
        """The forecast already knows that an expert is lost."""

        def begin(self, layer: int, hidden: Array, gate: Array) -> _Pending:
            if gate[:, sorted(self.local.lost)].any():
                raise PlacementError("no node holds it")
            return super().begin(layer, hidden, gate)

    trunk = load_trunk(bundle / "trunk")
    experts = Lost(bundle)
    experts.local.lost = frozenset({0, 1, 2})
    with pytest.raises(PlacementError, match="no node holds it"):
        DistributedModel(trunk, experts, TopK(2)).step([SequenceInput(IDS, trunk.new_cache())])
