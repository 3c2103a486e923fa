"""One simulation from its inputs to its folder of results."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from bs_coordinator.selection import parse_policy
from testbed.experiment import facts
from testbed.radio.replay import PHASES
from testbed.radio.results import VANILLA, accuracy_table, compare_accuracy, compare_latency, latency_table
from testbed.radio.sensitivity import sweep
from testbed.radio.setting import Cell, Setting
from testbed.radio.traces import RoutingTrace, read_trace
from wire.errors import SimulationError
from wire.files import atomic_write
from wire.manifest import load_manifest


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What to evaluate: see `testbed.radio.accuracy.evaluate`."""

    bundle: Path
    data: Path
    items: int
    batch: int
    threads: int


@dataclass(frozen=True, slots=True)
class Simulation:
    """What to simulate.

    Attributes:
        policies: as `parse_policy` takes them.
        sweep_draws: channel draws of the sweep over θ and γ; None for no sweep.
    """

    trace_path: Path
    setting: Setting
    policies: Sequence[str]
    draws: int
    seed: int
    sweep_draws: int | None = None
    evaluation: Evaluation | None = None

    def run(self, folder: Path, *, say: Callable[[str], None]) -> None:
        """Simulate, and write tables, plots and `simulation.json` into `folder`.

        Args:
            say: told each table as soon as it is there.

        Raises:
            WdmoeError: an input can't be used, or the folder can't be written.
            ValueError: a policy is unknown.
        """
        from testbed.radio import plots

        trace = read_trace(self.trace_path)
        policies = list(dict.fromkeys((VANILLA, *self.policies)))
        cell = self._cell(trace, self.draws)
        document = self._facts(trace)
        tables = []

        def tell(table: str) -> None:
            say(table)
            tables.append(table)

        latencies = compare_latency(trace, cell, policies, seed=self.seed)
        for phase in PHASES:
            tell(f"### {phase.capitalize()}\n\n{latency_table(latencies, phase)}\n")
        document["latency"] = [asdict(row) for row in latencies]
        plots.draw_latency(latencies, folder)
        if self.sweep_draws:
            points = list(sweep(trace, self._cell(trace, self.sweep_draws), seed=self.seed))
            document["sensitivity"] = [asdict(point) for point in points]
            plots.draw_sensitivity(points, folder)
            say(f"{folder / 'sensitivity.png'}: {len(points)} combinations of θ and γ")
        if self.evaluation:
            document["accuracy"], table = self._evaluate(trace, cell, policies)
            tell(f"### Accuracy\n\n{table}\n")
        _write(folder / "simulation.md", "\n".join(tables))
        _write(folder / "simulation.json", json.dumps(document, indent=1))

    def _cell(self, trace: RoutingTrace, draws: int) -> Cell:
        dims = trace.facts
        return Cell(self.setting, hidden=dims.hidden, intermediate=dims.intermediate, draws=draws, seed=self.seed)

    def _evaluate(self, trace: RoutingTrace, cell: Cell, policies: Sequence[str]) -> tuple[list[Any], str]:
        from testbed.radio.accuracy import evaluate

        assert self.evaluation  # noqa: S101 (the caller has looked)
        plan, top_k = self.evaluation, trace.facts.top_k
        sha256 = load_manifest(plan.bundle).model_sha256
        if sha256 != trace.facts.model_sha256:
            raise SimulationError(
                f"{plan.bundle} is of another model than {self.trace_path}: trace its routing, or name its bundle"
            )
        parsed = [parse_policy(text, top_k=top_k, model_sha256=sha256) for text in policies]
        answers = evaluate(
            plan.bundle, plan.data, cell, parsed, items=plan.items, batch=plan.batch, threads=plan.threads
        )
        rows = compare_accuracy(
            {policy: answer.right for policy, answer in zip(policies, answers, strict=True)},
            {policy: answer.asked for policy, answer in zip(policies, answers, strict=True)},
            top_k,
            seed=self.seed,
        )
        return [asdict(row) for row in rows], accuracy_table(rows)

    def _facts(self, trace: RoutingTrace) -> dict[str, Any]:
        commit, changed = facts.commit()
        evaluation = self.evaluation
        return {
            "commit": commit,
            "files_changed": changed,
            "argv": facts.argv(),
            "versions": facts.versions(),
            "seed": self.seed,
            "draws": self.draws,
            "sweep_draws": self.sweep_draws,
            "setting": msgspec.to_builtins(self.setting),
            "trace": {
                "sha256": hashlib.sha256(self.trace_path.read_bytes()).hexdigest(),
                "prompts": len(trace.prompts),
                "tokens": sum(map(len, trace.prompts)),
                **msgspec.to_builtins(trace.facts),
            },
            "evaluation": evaluation and {"items": evaluation.items, "batch": evaluation.batch},
        }


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
