"""The suite: answers without faults, the same answers under faults, and a table of outcomes by fault."""

import platform
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, get_args

import msgspec
from rich.console import Console
from rich.table import Table

from common.files import atomic_write
from testbed.errors import ChaosError
from testbed.facts import commit
from testbed.proof.chaos.answers import JudgedAnswer, Outcome, make_answer, session_ids
from testbed.proof.chaos.schedule import Kind, draw
from testbed.proof.chaos.system import EmulatedLinks, Links, TestSystem, write_network
from wire.manifest import load_manifest

PROMPTS = ("The capital of France is", "def add(a, b):", "Water boils at", "Once upon a time", "2 + 2 =")
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
_BAD = ("wrong", "hung", "crashed")


def run_chaos(
    bundle: Path, *, answers: int, seed: int, tokens: int, nodes: int, kinds: Sequence[Kind], emulate: bool,
    out: Path, console: Console,
) -> list[JudgedAnswer]:  # fmt: skip
    """Make answers under faults, and print and write their outcomes.

    Args:
        bundle: fp32 bundle of the model.
        answers: number of answers under faults.
        seed: seeds the faults.
        tokens: maximum length of an answer.
        nodes: number of nodes.
        kinds: kinds of faults to inject.
        emulate: run on an emulated network, which link faults need; root only.
        out: folder for results and logs.
        console: where to print.

    Raises:
        ChaosError: an answer without faults fails, one under faults is wrong, hung or crashed, or a node ended by
            itself.
        PrivilegeError, NetworkError: the emulated network does not come up.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = [f"node{k}" for k in range(nodes)]
    experts = load_manifest(bundle).dims.experts
    results: list[JudgedAnswer] = []
    ended: Counter[str] = Counter()
    with ExitStack() as stack:
        links = stack.enter_context(_emulated(names, out)) if emulate else Links()
        system = TestSystem(bundle, out, names, experts, links)
        stack.enter_context(system.running())
        reference = []
        for i, text in enumerate(PROMPTS):
            answer = make_answer(
                system,
                bundle,
                out,
                number=-1 - i,
                prompt=i,
                text=text,
                tokens=tokens,
                faults=[],
                expected=None,
                seed=seed,
            )
            if answer.outcome != "right":
                raise ChaosError(f"an answer without faults is {answer.outcome}: {answer.detail} (logs in {out})")
            reference.append((session_ids(out, -1 - i), answer.seconds))
        for number in range(answers):
            prompt = number % len(PROMPTS)
            faults = draw(seed, number, names, kinds, tokens=len(reference[prompt][0]))
            answer = make_answer(
                system, bundle, out, number=number, prompt=prompt, text=PROMPTS[prompt], tokens=tokens, faults=faults,
                expected=reference[prompt][0], seed=seed,
            )  # fmt: skip
            killed = {f.node for f in faults if f.kind in ("kill", "clock")}
            ended.update(node for node in system.revive() if node not in killed)
            results.append(answer)
            what = " + ".join(f.kind for f in faults)
            console.print(f"{number + 1}/{answers} {what}: {answer.outcome}, {answer.seconds:.1f} s {answer.detail}")
            _write(out / "chaos.json", results, ended, seed=seed, tokens=tokens, calm_s=median(s for _, s in reference))
    console.print(_table(results))
    bad = [a for a in results if a.outcome in _BAD]
    if bad or ended:
        first = f"answer {bad[0].number} {bad[0].outcome}" if bad else f"node {next(iter(ended))} ended by itself"
        raise ChaosError(f"{len(bad)} of {len(results)} answers are bad, first: {first} (--seed {seed}, logs in {out})")
    return results


@contextmanager
def _emulated(names: Sequence[str], out: Path) -> Iterator[Links]:
    from testbed.network import namespaces
    from testbed.network.daemon import BASE_STATION
    from testbed.network.emulated import emulated

    spec = out / "network.yaml"
    write_network(names, spec)
    with emulated(spec) as network, namespaces.inside(namespaces.namespace(network.spec.name, BASE_STATION)):
        yield EmulatedLinks(network)


def _write(path: Path, results: list[JudgedAnswer], ended: Counter[str], **parameters: Any) -> None:
    document = {
        "commit": commit()[0],
        "machine": platform.platform(),
        "parameters": parameters,
        "nodes_that_ended": dict(ended),
        "answers": results,
    }
    with atomic_write(path) as file:
        file.write(msgspec.json.encode(document))


def _table(results: Sequence[JudgedAnswer]) -> Table:
    """Outcomes by fault; an answer with two faults counts for both."""
    by_kind: dict[str, list[JudgedAnswer]] = defaultdict(list)
    for answer in results:
        for fault in answer.faults:
            by_kind[fault.kind].append(answer)
    table = Table("fault", "answers", *OUTCOMES, "median s", "longest pause s", title="answers under faults")
    for kind, some in [*sorted(by_kind.items()), ("all", list(results))]:
        counts = Counter(answer.outcome for answer in some)
        pause_s = max(answer.longest_pause_s for answer in some)
        table.add_row(
            kind, str(len(some)), *(str(counts[outcome]) for outcome in OUTCOMES),
            f"{median(a.seconds for a in some):.1f}", f"{pause_s:.1f}",
        )  # fmt: skip
    return table
