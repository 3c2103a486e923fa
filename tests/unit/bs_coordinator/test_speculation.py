"""Drafting: draft tokens never change an answer, and drafting that does not pay ends by itself."""

import pathlib
import random
import statistics
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.sampling import TokenSampler
from bs_coordinator.engine.scheduler import Scheduler
from bs_coordinator.engine.sequence import GeneratedAnswer
from bs_coordinator.engine.sequence import Sequence as TokenSequence
from bs_coordinator.engine.speculation import Draft, DraftLength, NgramDrafter, Proposals, Speculation
from bs_coordinator.engine.speculation.acceptance import Acceptance
from bs_coordinator.engine.speculation.cost import StepCost
from bs_coordinator.engine.speculation.draft_tree import StoppingRule, grow
from bs_coordinator.engine.speculation.drafts import Choices, DraftToken, FirstOf, Path, Share
from bs_coordinator.engine.speculation.spare_time import SpareTime
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.kv_cache import keep_branch
from bs_coordinator.trunk.load import load_trunk
from testbed.evaluation.local_experts import LocalExperts
from tests.checkpoints import VOCABULARY
from tests.drafts import greedy
from wire.tensors import WireDtype


class _Hindsight:
    """Knows the answer, and drafts every `wrong`-th token wrong."""

    def __init__(self, text: Sequence[int], wrong: int) -> None:
        self._text, self._wrong = text, wrong

    def prepare(self, ids: Sequence[int]) -> None:
        pass

    def read_ahead(self, ids: Sequence[int], draft: Draft, share: Share, spare: SpareTime) -> None:
        pass

    def find(self, ids: Sequence[int], path: Path) -> Choices:
        return self.known(ids, path) or ()

    def known(self, ids: Sequence[int], path: Path) -> Choices | None:
        position = len(ids) + len(path)
        if position >= len(self._text):
            return ()
        right = self._text[position]
        drafted = [right, *((right + i) % VOCABULARY for i in range(1, 3))]
        if position % self._wrong == 0:
            # The right one is the second, the third, or not among them.
            turn = position // self._wrong % 3
            drafted[0], drafted[1 + turn % 2] = drafted[1 + turn % 2], right if turn < 2 else VOCABULARY - 1
        return tuple(DraftToken(id, f"rank {rank}", 0.8 if rank == 0 else 0.1) for rank, id in enumerate(drafted))


class _Model:
    """A draft model whose drafters know the present `text`."""

    def __init__(self, wrong: int) -> None:
        self.text: list[int] = []
        self._wrong = wrong

    def drafter(self) -> _Hindsight:
        return _Hindsight(self.text, self._wrong)


def _unknown(path: Path) -> Choices | None:
    """Of a drafter that knows nothing beforehand."""
    return None


class _Eager(DraftLength):
    """Always drafts, whether it pays or not, so that results do not depend on how long steps take."""

    def draft(self, proposals: Proposals, longest: int, *, sequences: int = 1, branching: bool = False) -> Draft:
        rule = StoppingRule(price=0.0, row_s=0.0, making_s=0.0, most=15, longest=min(longest, 5))
        return grow(proposals, lambda token: token.prior, rule, branching=branching)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bs_coordinator.engine.sequence.DraftLength", _Eager)


@pytest.fixture(scope="module")
def tokenizer(random_bundle: pathlib.Path) -> Tokenizer:
    return Tokenizer(random_bundle / "trunk")


@pytest.fixture(scope="module")
def model(random_bundle: pathlib.Path) -> DistributedModel:
    experts = LocalExperts(random_bundle, threads=1, wire=WireDtype.FP16)
    return DistributedModel(load_trunk(random_bundle / "trunk"), experts, TopK(2))


PROMPTS = [
    [random.Random(seed).randrange(1, VOCABULARY) for _ in range(length)]  # noqa: S311 (not a secret)
    for seed, length in ((1, 9), (2, 30))
]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("wrong", "branching"), [(3, False), (3, True), (10**9, False), (10**9, True)])
def test_right_and_wrong_drafts_change_nothing_alone_and_in_a_batch(
    model: DistributedModel, tokenizer: Tokenizer, wrong: int, branching: bool
) -> None:
    config = SamplingConfig(max_tokens=24)
    prompts = PROMPTS
    plain = [[e.id for e in TokenSequence(model, tokenizer).generate(ids, config)] for ids in prompts]
    oracle = _Model(wrong)
    speculation = Speculation("dense", oracle, branching=branching)
    answers = []
    for ids, answer in zip(prompts, plain, strict=True):
        oracle.text = ids + answer
        events = list(TokenSequence(model, tokenizer, speculation=speculation).generate(ids, config))
        assert [e.id for e in events] == answer
        steps = [step for event in events for step in event.steps]
        assert sum(s.accepted for s in steps) + len(steps) == len(answer)
        assert all(s.phase == "decode" for s in steps[1:])
        if wrong > len(oracle.text):
            assert branching or all(s.accepted == s.drafted for s in steps)
            assert len(steps) < len(answer) / 2
        answers.append(TokenSequence(model, tokenizer, speculation=speculation).answer(ids, config))
    assert _run_all(Scheduler(model), answers) == plain


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("branching", [False, True])
def test_rows_that_became_no_token_of_an_answer_do_not_degrade_it(
    random_bundle: pathlib.Path, tokenizer: Tokenizer, branching: bool
) -> None:
    experts = LocalExperts(random_bundle, threads=1, wire=WireDtype.FP16)
    experts.lost = frozenset({1})
    model = DistributedModel(load_trunk(random_bundle / "trunk"), experts, TopK(2), degrade=True)
    config = SamplingConfig(max_tokens=24)
    oracle = _Model(wrong=2)
    speculation = Speculation("dense", oracle, branching=branching)
    answers, expected = [], []
    for ids in PROMPTS:
        # Alone and without drafts, a step has no other rows than those of the prompt or the last token.
        plain = list(TokenSequence(model, tokenizer).generate(ids, config))
        expected.append([(event.id, any(step.degraded for step in event.steps)) for event in plain])
        oracle.text = ids + [event.id for event in plain]
        events = list(TokenSequence(model, tokenizer, speculation=speculation).generate(ids, config))
        assert [(event.id, event.degraded) for event in events] == expected[-1]
        answers.append(TokenSequence(model, tokenizer, speculation=speculation).answer(ids, config))
    assert {degraded for answer in expected for _, degraded in answer} == {True, False}
    found: dict[int, list[tuple[int, bool]]] = {id(answer): [] for answer in answers}
    scheduler = Scheduler(model, prefill_tokens=12)
    for answer in answers:
        scheduler.add(answer)
    while not scheduler.idle:
        for progress in scheduler.step():
            found[id(progress.answer)] += [(event.id, event.degraded) for event in progress.events]
    assert list(found.values()) == expected


@pytest.mark.usefixtures("eager")
def test_the_right_token_in_place_of_a_wrong_one_saves_steps(model: DistributedModel, tokenizer: Tokenizer) -> None:
    config = SamplingConfig(max_tokens=30, logprobs=2, min_tokens=20)
    plain = list(TokenSequence(model, tokenizer).generate(PROMPTS[0], config))
    counts = {}
    for branching in (False, True):
        oracle = _Model(wrong=1)
        oracle.text = PROMPTS[0] + [event.id for event in plain]
        sequence = TokenSequence(model, tokenizer, speculation=Speculation("dense", oracle, branching=branching))
        events = list(sequence.generate(PROMPTS[0], config))
        assert [(e.id, e.logprob) for e in events] == [(e.id, e.logprob) for e in plain]
        # What was rejected is not in the cache, and what was accepted is: another answer continues it.
        assert sequence.cached_ids == oracle.text[:-1]
        assert sequence.cache.get_seq_length() == len(sequence.cached_ids)
        counts[branching] = sum(len(event.steps) for event in events)
    assert counts[True] < 0.8 * counts[False]


def test_tokens_that_branch_give_what_each_branch_gives_alone(model: DistributedModel) -> None:
    trunk, begin = model.trunk, [3, 7, 11, 2, 9]
    ids, parents = [5, 6, 8, 13, 14, 15, 16], [-1, 0, 1, 0, 3, 1, 4]
    chains = [[5], [5, 6], [5, 6, 8], [5, 13], [5, 13, 14], [5, 6, 15], [5, 13, 14, 16]]
    cache = trunk.new_cache()
    model.step([SequenceInput(begin, cache)])
    other = trunk.new_cache()
    model.step([SequenceInput(begin[:2], other)])
    tree = SequenceInput(ids, cache, rows=list(range(len(ids))), parents=parents)
    (logits, beside), _ = model.step([tree, SequenceInput([4, 4], other)])
    for row, chain in enumerate(chains):
        alone = trunk.new_cache()
        model.step([SequenceInput(begin, alone)])
        (expected,), _ = model.step([SequenceInput(chain, alone, rows=[-1])])
        assert torch.equal(logits[row], expected[0])
    keep_branch(cache, len(begin), [0, 3, 4, 6])
    (continued,), _ = model.step([SequenceInput([1], cache)])
    (expected,), _ = model.step([SequenceInput([1], alone)])
    assert torch.equal(continued, expected)
    plain = trunk.new_cache()
    model.step([SequenceInput(begin[:2], plain)])
    assert torch.equal(beside, model.step([SequenceInput([4, 4], plain)])[0][0])


_TREES = SamplingConfig(max_tokens=12)


@pytest.fixture(scope="module")
def texts(model: DistributedModel, tokenizer: Tokenizer) -> list[list[int]]:
    """Prompts with their answers by plain decoding."""
    return [ids + [e.id for e in TokenSequence(model, tokenizer).generate(ids, _TREES)] for ids in PROMPTS]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_any_tree_of_guesses_gives_the_same_tokens(
    model: DistributedModel, tokenizer: Tokenizer, texts: list[list[int]], seed: int
) -> None:
    """Right tokens at any place in the tree, wrong ones, branches that end early, and answers beside each other."""
    luck = random.Random(seed)  # noqa: S311 (not a secret)

    class Guesses(_Hindsight):
        def __init__(self, text: Sequence[int]) -> None:
            self._text = text

        def known(self, ids: Sequence[int], path: Path) -> Choices:
            position = len(ids) + len(path)
            found = luck.sample(range(VOCABULARY), luck.randrange(5))
            if position < len(self._text) and luck.random() < 0.7:
                found.insert(luck.randrange(len(found) + 1), self._text[position])
            return tuple(DraftToken(id, "any", luck.random()) for id in dict.fromkeys(found))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bs_coordinator.engine.sequence.DraftLength", _Eager)
        answers = []
        for ids, text in zip(PROMPTS, texts, strict=True):
            sequence = TokenSequence(model, tokenizer, speculation=Speculation("dense", _Model(1)))
            sequence.drafter = Guesses(text)
            answers.append(sequence.answer(ids, _TREES))
        found = _run_all(Scheduler(model), answers)
    assert [ids + answer for ids, answer in zip(PROMPTS, found, strict=True)] == texts


@given(seed=st.integers(0, 2**32), most=st.integers(0, 12), longest=st.integers(1, 6), row=st.floats(0.0, 0.3))
def test_a_draft_has_the_likeliest_tokens_that_are_worth_their_rows(
    seed: int, most: int, longest: int, row: float
) -> None:
    """The reference looks at every token of the whole tree."""

    def choices(path: Path) -> Choices:
        rng = random.Random(f"{seed} {path}")  # noqa: S311 (not a secret)
        return tuple(DraftToken(i, "any", rng.random() / 2) for i in range(rng.randrange(4)))

    rule = StoppingRule(price=1.0, row_s=row, making_s=0.0, most=most, longest=longest)
    draft = grow(Proposals(choices, choices), lambda token: token.prior, rule, branching=True)
    every: dict[Path, float] = {}
    last: dict[Path, float] = {(): 1.0}
    for _ in range(longest):
        last = {(*path, t.id): chance * t.prior for path, chance in last.items() for t in choices(path)}
        every |= last
    worthy = sorted((chance for chance in every.values() if chance > row), reverse=True)
    assert sorted(draft.chances.values(), reverse=True) == worthy[:most]
    assert all(every[path] == chance for path, chance in draft.chances.items())
    # Each follows the token before it, and the first branch has no token of another in between.
    assert all(draft.rows[path[:-1]] < draft.rows[path] for path in draft.chances)
    assert draft.ids == [path[-1] for path in draft.chances]


def test_a_drafter_is_not_asked_where_that_costs_more_than_it_can_bring() -> None:
    asked = []

    def choices(path: Path) -> Choices:
        asked.append(path)
        return (DraftToken(1, "any", 0.6), DraftToken(2, "any", 0.3))

    rule = StoppingRule(price=1.0, row_s=0.2, making_s=0.3, most=15, longest=15)
    slow = grow(Proposals(_unknown, choices), lambda token: token.prior, rule, branching=True)
    assert asked == [(), (1,)]
    assert list(slow.chances) == [(1,), (1, 1), (2,)]
    quick = grow(Proposals(choices, choices), lambda token: token.prior, rule, branching=True)
    assert list(quick.chances) == [(1,), (1, 1), (1, 1, 1), (2,)]
    alone = grow(Proposals(choices, choices), lambda token: token.prior, rule, branching=False)
    assert list(alone.chances) == [(1,), (1, 1), (1, 1, 1)]
    assert alone.parents is None


@pytest.mark.usefixtures("eager")
def test_a_seed_gives_the_same_sampled_tokens_with_drafts(model: DistributedModel, tokenizer: Tokenizer) -> None:
    config = SamplingConfig(max_tokens=16, temperature=0.9, top_p=0.95, seed=7)
    ids = PROMPTS[0]
    plain = [e.id for e in TokenSequence(model, tokenizer).generate(ids, config)]
    oracle = _Model(wrong=3)
    oracle.text = ids + plain
    events = list(TokenSequence(model, tokenizer, speculation=Speculation("dense", oracle)).generate(ids, config))
    assert [e.id for e in events] == plain
    assert sum(step.accepted for event in events for step in event.steps) > 0


def _run_all(scheduler: Scheduler, answers: list[GeneratedAnswer]) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in answers]
    for answer in answers:
        scheduler.add(answer)
    while not scheduler.idle:
        for answer, events, error, _ in scheduler.step():
            assert error is None
            ids[answers.index(answer)] += [event.id for event in events]
    return ids


@given(
    seed=st.integers(0, 2**32),
    acceptance=st.floats(0.0, 1.0),
    prior=st.floats(0.0, 1.0),
    row=st.floats(0.0, 1.0),
    making=st.floats(0.0, 0.2),
    tokens=st.integers(20, 300),
)
@settings(max_examples=100)
def test_an_answer_never_takes_much_longer_than_plain(
    seed: int, acceptance: float, prior: float, row: float, making: float, tokens: int
) -> None:
    """Whatever draft tokens are worth, whatever they cost, and whatever the prior was."""
    step_s = 0.2
    luck = random.Random(seed)  # noqa: S311 (not a secret)
    time_s, draws = _answer_in_virtual_time(
        tokens, lambda _: luck.random() < acceptance, prior, step_s, row * step_s, making * step_s
    )
    # What can be lost: half a step and 2 % that may be owed, and the one draft that is made before it shows.
    assert time_s <= tokens * step_s * 1.03 + step_s * (0.5 + 15 * row + 16 * making)
    if draws and acceptance > 0.95 and prior > 0.5 and row < 0.05 and making < 0.02 and tokens > 100:
        assert time_s < 0.45 * tokens * step_s


def test_a_bad_beginning_does_not_end_all_drafting() -> None:
    """A few draft tokens are rejected and then all are accepted, in twenty answers, one after the other."""
    step_s, tokens, cost, shares = 0.2, 39, StepCost(), Acceptance()
    times_s = [
        _answer_in_virtual_time(tokens, lambda i: i >= 3, 0.8, step_s, 0.07 * step_s, 0.03 * step_s, cost, shares)[0]
        for _ in range(20)
    ]
    assert statistics.median(times_s) < tokens * step_s / 2
    assert max(times_s) < tokens * step_s


def _answer_in_virtual_time(
    tokens: int, right: Callable[[int], bool], prior: float, step_s: float, row_s: float, making_s: float,
    cost: StepCost | None = None, shares: Acceptance | None = None,
) -> tuple[float, int]:  # fmt: skip
    """What an answer takes, and in how many steps it drafted.

    Args:
        right: whether the draft of that token is.
    """
    now = 0.0
    cost, shares = cost or StepCost(), shares or Acceptance()
    length = DraftLength(cost, shares, clock=lambda: now)
    draws = 0

    def choices(path: Path) -> Choices:
        nonlocal now
        now += making_s
        return (DraftToken(len(path), "any", prior),)

    made = 0
    while made < tokens:
        draft = length.draft(Proposals(_unknown, choices), tokens - made - 1)
        drafted = draft.ids
        draws += bool(drafted)
        took_s = step_s + row_s * len(drafted)
        now += took_s
        accepted = 0
        while accepted < len(drafted) and right(made + accepted):
            accepted += 1
        length.observe(draft, [*drafted[:accepted], -1], took_s, rows=1 + len(drafted))
        cost.observe(1 + len(drafted), took_s, tokens=1 + accepted)
        made += 1 + accepted
    return now, draws


def test_the_cost_of_a_row_is_learnt_and_followed() -> None:
    cost = StepCost()
    for fixed_s, row_s in ((0.2, 0.004), (0.4, 0.03)):
        for i in range(120):
            rows = 1 + i % 9
            cost.observe(rows, fixed_s + row_s * (rows - 1) + 0.002 * (-1) ** i)
        assert cost.row_s == pytest.approx(row_s, abs=0.002)
        assert cost.seconds(1) == pytest.approx(fixed_s, rel=0.05)


def test_drafts_get_shorter_where_more_sequences_share_a_step() -> None:
    cost, shares = StepCost(), Acceptance()
    for i in range(40):
        cost.observe(1 + i % 8, 0.2 + 0.01 * (i % 8))
    certain = Proposals(_unknown, lambda path: (DraftToken(1, "any", 0.7),))
    lengths = [
        len(DraftLength(cost, shares, clock=lambda: 0.0).draft(certain, 15, sequences=n).ids) for n in (1, 4, 16)
    ]
    assert lengths[0] > lengths[1] > lengths[2]


def test_a_look_up_finds_what_followed_the_longest_match_last() -> None:
    drafter = NgramDrafter()
    text = [1, 2, 3, 4, 9, 9, 2, 3, 5, 6, 7, 1, 2, 3]
    assert [g.id for g in greedy(drafter, text, 3)] == [4, 9, 9]
    assert [g.id for g in greedy(drafter, [*text[:-3], 2, 3], 2)] == [5, 6]
    assert drafter.known([1, 2, 3], ()) == ()


def test_a_look_up_is_asked_once_per_branch_and_the_draft_model_only_where_it_finds_nothing() -> None:
    asked: list[Path] = []

    class Lookup(NgramDrafter):
        def known(self, ids: Sequence[int], path: Path) -> Choices:
            asked.append(path)
            return super().known(ids, path)

    class Model(_Hindsight):
        def known(self, ids: Sequence[int], path: Path) -> None:
            return None

        def find(self, ids: Sequence[int], path: Path) -> Choices:
            return (DraftToken(100 + len(path), "model", 0.9),)

    text = [1, 2, 3, 4, 5, 9, 1, 2, 3]
    drafter = FirstOf(Lookup(), Model(text, 1), share=lambda token: 1.0)
    proposals = Proposals(lambda path: drafter.known(text, path), lambda path: drafter.find(text, path))
    rule = StoppingRule(price=0.0, row_s=0.0, making_s=0.0, most=4, longest=4)
    draft = grow(proposals, lambda token: token.prior, rule, branching=False)
    # What followed 1 2 3 before.
    assert draft.ids == [4, 5, 9, 1]
    assert asked == [(), (4,), (4, 5), (4, 5, 9)]
    asked.clear()
    text[:] = [1, 2, 3, 4, 5]
    assert grow(proposals, lambda token: token.prior, rule, branching=False).ids == [100, 101, 102, 103]
    assert asked == [(), (100,), (100, 101), (100, 101, 102)]


def test_sampled_tokens_are_distributed_as_without_drafts() -> None:
    """A chi-square test of the first token after a draft's, over fixed logits; the seed is fixed, so is the result."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 0.5, -1.0], [1.0, 0.0, 0.3, 0.7, 0.1]])
    wanted = torch.softmax(logits / 0.8, dim=-1)
    draws = 1000
    for drafted in (2, 4):
        sampler = TokenSampler(SamplingConfig(temperature=0.8, seed=1))
        counts = torch.zeros(5)
        after = torch.zeros(5)
        for _ in range(draws):
            chosen = sampler.verify(logits, {(): 0, (drafted,): 1})
            counts[chosen[0]] += 1
            if len(chosen) > 1:
                after[chosen[1]] += 1
        for seen, expected in ((counts, wanted[0]), (after, wanted[1])):
            if seen.sum() < 500:
                continue
            expected = expected * seen.sum()
            # 18.5 is the 99.9th percentile with four degrees of freedom.
            assert float(((seen - expected) ** 2 / expected).sum()) < 18.5
