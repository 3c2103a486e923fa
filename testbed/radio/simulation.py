"""Runs a simulation and writes its folder of results."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from bs_coordinator.selection import parse_policy
from common.files import atomic_write
from testbed import facts
from testbed.errors import SimulationError
from testbed.evaluation.quality import TASKS
from testbed.radio.replay import PHASES
from testbed.radio.results import VANILLA, Accuracy, accuracy_table, compare_accuracy, compare_latency, latency_table
from testbed.radio.sensitivity import sweep
from testbed.radio.setting import Cell, Setting
from testbed.radio.traces import RoutingTrace, read_trace
from wire.manifest import load_manifest, sha256_file


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Arguments of `testbed.radio.accuracy.evaluate`.

    Attributes:
        bundle: bundle of the model.
        data: folder with the files of the tasks.
        items: items per task.
        batch: items per forward step.
        threads: threads per expert.
    """

    bundle: Path
    data: Path
    items: int
    batch: int
    threads: int

    def facts(self) -> dict[str, Any]:
        """Parameters and hashes of the inputs, for `simulation.json`."""
        return {
            "quantisation": str(load_manifest(self.bundle).quantisation),
            "data_sha256": {file: sha256_file(self.data / file) for file in TASKS.values()},
            "items": self.items,
            "batch": self.batch,
        }


@dataclass(frozen=True, slots=True)
class Simulation:
    """Parameters of a simulation.

    Attributes:
        trace_path: routing trace.
        setting: radio setting.
        policies: policies, as `parse_policy` reads them.
        draws: number of channel draws.
        seed: seeds channel draws, choice of tokens and intervals.
        sweep_draws: channel draws of the sweep over θ and γ; None for no sweep.
        evaluation: evaluation of accuracy; None for none.
    """

    trace_path: Path
    setting: Setting
    policies: Sequence[str]
    draws: int
    seed: int
    sweep_draws: int | None = None
    evaluation: Evaluation | None = None

    def run(self, folder: Path, *, on_progress: Callable[[str], None]) -> None:
        """Simulate, and write tables, plots and `simulation.json` into `folder`, part by part.

        Args:
            on_progress: called with each table as soon as it is complete.

        Raises:
            WdmoeError: an input is not valid, or the folder can't be written.
            ValueError: a policy is unknown.
        """
        from testbed.radio import plots

        trace = read_trace(self.trace_path)
        policies = list(dict.fromkeys((VANILLA, *self.policies)))
        cell = self._cell(trace, self.draws)
        document = self._facts(trace)
        tables: list[str] = []

        def keep(part: str, rows: Sequence[Any], *texts: str) -> None:
            document[part] = [asdict(row) for row in rows]
            for text in texts:
                on_progress(text)
            tables.extend(texts)
            _write(folder / "simulation.md", "\n".join(tables))
            _write(folder / "simulation.json", json.dumps(document, indent=1))

        latencies = compare_latency(trace, cell, policies, seed=self.seed)
        plots.draw_latency(latencies, folder)
        keep("latency", latencies, *(f"### {p.capitalize()}\n\n{latency_table(latencies, p)}\n" for p in PHASES))
        if self.sweep_draws:
            points = list(sweep(trace, self._cell(trace, self.sweep_draws), seed=self.seed))
            plots.draw_sensitivity(points, folder)
            keep("sensitivity", points)
            on_progress(f"{folder / 'sensitivity.png'}: {len(points)} combinations of θ and γ")
        if self.evaluation:
            accuracies = self._evaluate(trace, cell, policies, self.evaluation)
            keep("accuracy", accuracies, f"### Accuracy\n\n{accuracy_table(accuracies)}\n")

    def _cell(self, trace: RoutingTrace, draws: int) -> Cell:
        dims = trace.facts
        return Cell(self.setting, hidden=dims.hidden, intermediate=dims.intermediate, draws=draws, seed=self.seed)

    def _evaluate(self, trace: RoutingTrace, cell: Cell, policies: Sequence[str], plan: Evaluation) -> list[Accuracy]:
        from testbed.radio.accuracy import evaluate

        top_k = trace.facts.top_k
        sha256 = load_manifest(plan.bundle).model_sha256
        if sha256 != trace.facts.model_sha256:
            raise SimulationError(
                f"{plan.bundle} is of another model than {self.trace_path}: trace its routing, or give its --bundle"
            )
        parsed = [parse_policy(text, top_k=top_k, model_sha256=sha256) for text in policies]
        answers = evaluate(
            plan.bundle, plan.data, cell, parsed, items=plan.items, batch=plan.batch, threads=plan.threads
        )
        return compare_accuracy(
            {policy: answer.right for policy, answer in zip(policies, answers, strict=True)},
            {policy: answer.asked for policy, answer in zip(policies, answers, strict=True)},
            top_k,
            seed=self.seed,
        )

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
                "sha256": sha256_file(self.trace_path),
                "prompts": len(trace.prompts),
                "tokens": trace.tokens,
                **msgspec.to_builtins(trace.facts),
            },
            "evaluation": evaluation and evaluation.facts(),
        }


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
