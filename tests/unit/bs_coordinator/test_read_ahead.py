"""Reading ahead: what is read while nodes are awaited, when that pays, and that it never changes an answer."""

import itertools
import pathlib
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.scheduler import Scheduler
from bs_coordinator.engine.sequence import Sequence as TokenSequence
from bs_coordinator.engine.speculation import Draft, Proposals, Speculation
from bs_coordinator.engine.speculation.continuations import Continuations
from bs_coordinator.engine.speculation.draft_tree import StoppingRule, grow
from bs_coordinator.engine.speculation.drafts import Choices, DraftToken, Path
from bs_coordinator.engine.speculation.model_drafter import Choice, ModelDrafter
from bs_coordinator.engine.speculation.outlook import Outlook
from bs_coordinator.engine.speculation.read_ahead import ReadAhead
from bs_coordinator.engine.speculation.spare_time import SpareTime
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.load import load_trunk
from testbed.evaluation.local_experts import LocalExperts
from tests.checkpoints import VOCABULARY
from tests.drafts import choices_of, greedy
from wire.tensors import WireDtype


def _share(token: DraftToken) -> float:
    return token.prior


def _tokens(rng: random.Random, count: int) -> tuple[DraftToken, ...]:
    """Different tokens that may come next, most probable first, with probabilities whose sum is below 1."""
    cuts = sorted(rng.random() for _ in range(count))
    chances = sorted((b - a for a, b in itertools.pairwise([0.0, *cuts])), reverse=True)
    return tuple(DraftToken(i, "any", chance) for i, chance in enumerate(chances))


def _tree(rng: random.Random, most: int) -> tuple[Draft, Callable[[Path], Choices]]:
    """A draft, and what is likely after any branch."""
    seed = rng.random()

    def choices(path: Path) -> Choices:
        return _tokens(random.Random(f"{seed} {path}"), 3)  # noqa: S311 (not a secret)

    # Some branches of the draft are known to the drafter, and what follows others was not asked.
    rule = StoppingRule(price=1.0, row_s=0.05, making_s=0.3, most=most, longest=6)
    known = Proposals(lambda path: choices(path) if hash((seed, path)) % 2 == 0 else None, choices)
    return grow(known, _share, rule, branching=True), choices


@given(seed=st.integers(0, 2**32), most=st.integers(0, 12), reads=st.integers(0, 12))
def test_texts_to_read_are_the_likeliest_that_may_follow_the_step(seed: int, most: int, reads: int) -> None:
    rng = random.Random(seed)  # noqa: S311 (not a secret)
    draft, choices = _tree(rng, most)
    outlook = Outlook(draft, _share)
    # The reference: every text that may be read next, with its probability.
    texts: dict[Path, float] = {(): 1.0}
    while grown := [path for path in texts if path in draft.choices and (path == () or path in draft.chances)]:
        for path in grown:
            above = texts.pop(path)
            texts |= {(*path, token.id): above * token.prior for token in draft.choices[path]}
    assert sum(texts.values()) <= 1.0 + 1e-9
    done = set()
    for _ in range(reads):
        # With nothing read before, a longer text takes longer: it is chosen only if it is likelier.
        found = outlook.best((), 0.0)
        worthy = {text: chance for text, chance in texts.items() if chance >= 0.02}
        if found is None:
            assert not worthy
            break
        assert found not in done
        assert all(texts[found] >= chance for text, chance in worthy.items() if len(text) <= len(found))
        outlook.read(found, choices(found))
        done.add(found)
        above = texts.pop(found)
        texts |= {(*found, token.id): above * token.prior for token in choices(found)}
    likely = outlook.best((), 0.5)
    assert likely is None or texts[likely] >= 0.5


def _chain(*tokens: tuple[DraftToken, ...]) -> Draft:
    """A draft of the first of each of these."""
    path, chance = Path(), 1.0
    chances, choices = {}, {}
    for best, *others in tokens:
        choices[path] = (best, *others)
        path, chance = (*path, best.id), chance * best.prior
        chances[path] = chance
    return Draft(chances, choices)


def test_of_equally_likely_texts_the_one_is_read_whose_beginning_is_known() -> None:
    draft = [
        (DraftToken(1, "any", 0.5), DraftToken(2, "any", 0.3)),
        (DraftToken(3, "any", 0.5), DraftToken(4, "any", 0.5)),
        (DraftToken(5, "any", 0.1), DraftToken(6, "any", 0.4)),
    ]
    assert Outlook(_chain(*draft), _share).best((1, 3, 5), 0.0) == (2,)
    assert Outlook(_chain(*draft[1:]), _share).best((3, 5, 7), 0.0) == (4,)
    both = _chain((DraftToken(1, "any", 0.8),), (DraftToken(2, "any", 0.5), DraftToken(3, "any", 0.5)))
    assert Outlook(both, _share).best((1, 3), 0.0) in {(1, 2), (1, 3)}


@given(st.data())
def test_what_was_read_is_found_under_its_text(data: st.DataObject) -> None:
    ids = st.lists(st.integers(0, 1), max_size=5)
    known = Continuations()
    reference: dict[tuple[int, ...], tuple[DraftToken, ...]] = {}
    base: list[int] = []
    for number in range(data.draw(st.integers(1, 12))):
        text = data.draw(ids)
        if data.draw(st.booleans()):
            known.rebase(text)
            # Of two texts, one continues the other, or what follows the first is forgotten.
            common = min(len(base), len(text))
            same = base[:common] == text[:common]
            reference = {t: c for t, c in reference.items() if same and list(t[: len(text)]) == text}
            base = text
        else:
            choices = (DraftToken(number, "any", 0.5),)
            known.put(text, choices)
            if text[: len(base)] == base:
                reference[tuple(text)] = choices
        for length in range(4):
            for path in itertools.product((0, 1), repeat=length):
                assert known.get(path) == reference.get((*base, *path))


@given(
    seed=st.integers(0, 2**32),
    share=st.floats(0.1, 3.0),
    noise=st.floats(0.0, 0.1),
    reads=st.integers(5, 30),
)
@settings(max_examples=30, deadline=None)
def test_reading_that_delays_steps_ends_by_itself(seed: int, share: float, noise: float, reads: int) -> None:
    """A read takes 5 ms; `share` of that is what it delays the step."""
    rng = random.Random(seed)  # noqa: S311 (not a secret)
    spare = SpareTime()
    spare.observe_read(0.005)
    step_s = 0.3
    for phase_share in (share, 0.0, share):
        used = []
        for _ in range(300):
            uses = spare.uses_next()
            count = min(reads, spare.most_reads) if uses else 0
            took_s = step_s * (1 + noise * (rng.random() - 0.5)) + phase_share * count * 0.005
            spare.observe_step(took_s, step_s, count)
            used.append(uses)
        later = sum(used[150:]) / 150
        # Nothing can be said where noise, or rounding, is as large as what reads cost.
        uncertain_s = 1e-9 + 2 * noise * step_s / min(reads, 6)
        if phase_share * 0.005 > 0.005 + uncertain_s and phase_share * reads * 0.005 < 0.25 * step_s:
            assert later < 0.2
        if phase_share * 0.005 < 0.005 - uncertain_s:
            assert later > 0.7


def test_a_read_begins_only_where_the_wait_is_long_enough() -> None:
    spare = SpareTime()
    assert spare.least_chance == 0.0
    for _ in range(40):
        spare.observe_wait(0.006)
        spare.observe_read(0.004)
    assert spare.fits(0.0)
    assert spare.fits(0.0019)
    assert not spare.fits(0.0021)
    for _ in range(40):
        spare.observe_wait(0.001)
    assert not spare.fits(0.0)


class _Reader:
    """A model whose next tokens depend on the last two; counts what it reads in the foreground."""

    max_positions = 1000

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.reads = 0

    def read(self, ids: Sequence[int], past: int) -> list[Choice]:
        assert ids
        assert past <= len(self.seen)
        self.seen = [*self.seen[:past], *ids]
        self.reads += 1
        return _choices(self.seen)


def _choices(text: Sequence[int]) -> list[Choice]:
    rng = random.Random(str(list(text[-2:])))  # noqa: S311 (not a secret)
    ids = rng.sample(range(VOCABULARY), 3)
    return [Choice(id, p) for id, p in zip(ids, (0.6, 0.3, 0.05), strict=True)]


@given(ends=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_proposals_are_the_same_and_need_no_more_reading(ends: list[tuple[int, int]]) -> None:
    """Steps that accept some tokens, and add the drafter's next choice or another token."""
    with ThreadPoolExecutor(1) as background:
        reader = _Reader()
        drafter = ModelDrafter(reader, background=background)
        spare = SpareTime()
        for count in (1, 0) * 4:
            spare.observe_step(0.3, 0.3, count)
        spare.observe_wait(1e9)
        text = [1, 2, 3]
        for accepted, rank in ends:
            draft = greedy(drafter, text, 4)
            assert draft == greedy(ModelDrafter(_Reader()), text, 4)
            tried = _chain(*(choices_of(drafter, text, tuple(t.id for t in draft[:i])) for i in range(4)))
            assert tried.ids == [token.id for token in draft]
            ahead = drafter.read_ahead(text, tried, _share, spare)
            assert ahead is not None
            ahead.wait_begins()
            background.submit(lambda: None).result()  # the only thread is done with everything worth reading
            ahead.wait_ends()
            ahead.step_ends()
            spare.observe_wait(1e9)
            text = [*text, *(token.id for token in draft[: min(accepted, 4)])]
            choices = [choice.id for choice in _choices(text)]
            text.append(choices[rank] if rank < 3 else (sum(choices) + 1) % VOCABULARY)
            before = reader.reads
            (first,) = greedy(drafter, text, 1)
            if rank == 0 or (rank == 1 and accepted < 2):
                assert reader.reads == before
            assert first.id == _choices(text)[0].id


@pytest.mark.parametrize("spare_cores", [True, False])
def test_only_with_cores_to_spare_texts_are_read_beside_the_trunk(spare_cores: bool) -> None:
    spare = SpareTime()
    for count in (1, 0) * 4:
        spare.observe_step(0.3, 0.3, count)
    reads: list[int] = []
    over = threading.Event()

    def read() -> bool:
        reads.append(len(reads))
        return len(reads) < 10

    threads: list[threading.Thread] = []

    def start(run: Callable[[], None]) -> None:
        def wait_and_run() -> None:
            over.wait(60)
            run()

        threads.append(threading.Thread(target=wait_and_run))
        threads[-1].start()

    ahead = ReadAhead(read, start, spare, spare_cores=spare_cores)
    ahead.wait_begins()
    ahead.wait_ends()  # before the thread has read anything: the trunk computes again
    over.set()
    if spare_cores:
        threads[0].join()
        assert ahead.reads == 9  # the tenth text is the last one
    ahead.step_ends()
    threads[0].join()
    assert ahead.reads == (9 if spare_cores else 0)


def test_reading_that_does_not_pay_is_tried_now_and_then() -> None:
    spare = SpareTime()
    counts: list[int] = []
    with ThreadPoolExecutor(1) as background:
        drafter = ModelDrafter(_Reader(), background=background)
        for number in range(80):
            text, reads = [number, number + 1], 0
            if spare.uses_next():
                draft = _chain(choices_of(drafter, text, ()))
                ahead = drafter.read_ahead(text, draft, _share, spare)
                assert ahead is not None
                spare.observe_wait(1e9)
                ahead.wait_begins()
                background.submit(lambda: None).result()
                ahead.wait_ends()
                ahead.step_ends()
                reads = ahead.reads
            counts.append(reads)
            # Each read delays the step by 10 s, far more than it takes on any machine.
            spare.observe_step(300.0 + 10.0 * reads, 300.0, reads)
    # At first with reading and without in turns, then with it in one step of 16.
    assert counts[:8] == [6, 0] * 4
    assert [count for count in counts[8:] if count] == [6] * 4


def test_a_proposal_does_not_wait_for_the_prompt_of_another_sequence() -> None:
    with ThreadPoolExecutor(1) as background:
        over = threading.Event()
        other = background.submit(over.wait, 60)
        drafter = ModelDrafter(_Reader(), background=background)
        drafter.prepare([1, 2, 3])
        assert greedy(drafter, [1, 2, 3], 1)[0].id == _choices([1, 2, 3])[0].id
        assert not other.done()
        over.set()


def test_a_long_text_may_be_followed_by_a_short_one() -> None:
    drafter = ModelDrafter(_Reader())
    for text in (list(range(900)), [3, 4, 5], list(range(300))):
        assert greedy(drafter, text, 1)[0].id == _choices(text)[0].id


class _Model:
    """A draft model for `_Reader`s that read ahead."""

    def __init__(self, background: ThreadPoolExecutor) -> None:
        self._background = background
        self.readers: list[_Reader] = []

    def drafter(self) -> ModelDrafter:
        self.readers.append(_HalfRight(self.text))
        return ModelDrafter(self.readers[-1], background=self._background)

    text: list[int] = []  # noqa: RUF012


class _HalfRight(_Reader):
    """Knows the text. Of three tokens, it names one first, one second, and one not at all."""

    def __init__(self, text: list[int]) -> None:
        super().__init__()
        self._text = text

    def read(self, ids: Sequence[int], past: int) -> list[Choice]:
        wrong, *others = super().read(ids, past)
        position = len(self.seen)
        if self.seen != self._text[:position] or position >= len(self._text) or position % 3 == 2:
            return [wrong, *others]
        right = Choice(self._text[position], wrong.probability)
        if position % 3:
            return [right, *others]
        return [wrong, right._replace(probability=0.3)]


class _Waits:
    def __init__(self) -> None:
        self.told: list[str] = []

    def wait_begins(self) -> None:
        self.told.append("begins")

    def wait_ends(self) -> None:
        self.told.append("ends")

    def step_ends(self) -> None:
        self.told.append("step ends")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_answers_are_the_same_with_texts_read_ahead(random_bundle: pathlib.Path, temperature: float) -> None:
    experts = LocalExperts(random_bundle, threads=1, wire=WireDtype.FP16)
    model = DistributedModel(load_trunk(random_bundle / "trunk"), experts, TopK(2))
    tokenizer = Tokenizer(random_bundle / "trunk")
    config = SamplingConfig(max_tokens=40, temperature=temperature, seed=3, ignore_eos=True)
    prompt = [1, 5, 9, 13]
    waits = _Waits()
    model.step([TokenSequence(model, tokenizer).answer(prompt, config).next_input()], waits=waits)
    assert waits.told == ["begins", "ends"] * model.trunk.layers + ["step ends"]
    plain = [event.id for event in TokenSequence(model, tokenizer).generate(prompt, config)]
    with ThreadPoolExecutor(1) as background:
        drafts = _Model(background)
        drafts.text = prompt + plain
        speculation = Speculation("dense", drafts)
        assert speculation.spare is not None
        for _ in range(4):
            speculation.spare.observe_wait(1e9)  # experts in this process answer at once: no read would be begun
            events = list(TokenSequence(model, tokenizer, speculation=speculation).generate(prompt, config))
            assert [event.id for event in events] == plain
        scheduler = Scheduler(model)
        answers = [TokenSequence(model, tokenizer, speculation=speculation).answer(prompt, config) for _ in range(2)]
        ids: dict[int, list[int]] = {id(answer): [] for answer in answers}
        for answer in answers:
            scheduler.add(answer)
            for _ in range(5):  # alone, then both together
                for progress in scheduler.step():
                    ids[id(progress.answer)] += [event.id for event in progress.events]
        while not scheduler.idle:
            for progress in scheduler.step():
                ids[id(progress.answer)] += [event.id for event in progress.events]
        assert list(ids.values()) == [plain, plain]
