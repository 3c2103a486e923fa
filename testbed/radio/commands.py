"""`wdmoe-testbed trace-routing` and `simulate`. Modules that are slow to import are imported inside the commands."""

from pathlib import Path

import click

from common.options import Command
from testbed.errors import SimulationError

_PATH = click.Path(path_type=Path)
_DATA_HELP = "Folder of evaluation data (docs/measurement.md)."
_BUNDLE = click.option("--bundle", type=_PATH, help="Bundle of the model.  [default: the demo's, int8]")
_THREADS = click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads per expert.")


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    group.add_command(trace_routing)
    group.add_command(simulate)


@click.command("trace-routing", cls=Command, example="wdmoe-testbed trace-routing --data data --out trace")
@click.option("--data", type=_PATH, required=True, help=_DATA_HELP)
@_BUNDLE
@click.option("--items", type=click.IntRange(0), default=40, show_default=True, help="Questions of each task.")
@click.option("--texts", type=click.IntRange(0), default=20, show_default=True, help="Texts of the domains' file.")
@click.option("--tokens", type=click.IntRange(1), default=128, show_default=True, help="Limit per prompt.")
@_THREADS
@click.option("--out", type=_PATH, default=Path("runs/routing.npz"), show_default=True, help="Trace file.")
def trace_routing(
    data: Path, bundle: Path | None, items: int, texts: int, tokens: int, threads: int, out: Path
) -> None:
    """Record how a model's routers score experts on real prompts."""
    from testbed.facts import commit
    from testbed.radio.traces import record_trace, write_trace

    if items + texts == 0:
        raise click.UsageError("--items and --texts are both 0: there is nothing to trace")
    trace = record_trace(
        bundle or _demo_bundle(), data, items=items, texts=texts, tokens=tokens, threads=threads, commit=commit()[0]
    )
    write_trace(trace, out)
    click.echo(
        f"{out}: {len(trace.prompts)} prompts, {trace.tokens} tokens, {trace.layers} layers of {trace.experts} experts"
    )


@click.command(cls=Command, example="wdmoe-testbed simulate trace --out runs/simulation")
@click.argument("trace_path", metavar="TRACE", type=_PATH)
@click.option("--setting", "setting_path", type=_PATH, help="Radio setting, a YAML file (docs/simulation.md).")
@click.option(
    "--policy", "policies", multiple=True, default=("topk", "wdmoe"), show_default=True,
    help="Policy to compare; repeatable.",
)  # fmt: skip
@click.option("--draws", type=click.IntRange(1), default=1000, show_default=True, help="Channel draws.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seeds channel draws.")
@click.option("--sensitivity", is_flag=True, help="Also sweep θ and γ of wdmoe.")
@click.option(
    "--sweep-draws", type=click.IntRange(1), default=200, show_default=True, help="Channel draws of the sweep."
)
@click.option("--evaluate", "data", type=_PATH, help=_DATA_HELP)
@_BUNDLE
@click.option("--items", type=click.IntRange(1), default=200, show_default=True, help="Items per task to evaluate.")
@click.option(
    "--batch", type=click.IntRange(1), default=4, show_default=True, help="Items evaluated on one channel draw."
)
@_THREADS
@click.option("--out", type=_PATH, default=Path("runs/simulation"), show_default=True, help="Folder for results.")
def simulate(
    trace_path: Path,
    setting_path: Path | None,
    policies: tuple[str, ...],
    draws: int,
    seed: int,
    sensitivity: bool,
    sweep_draws: int,
    data: Path | None,
    bundle: Path | None,
    items: int,
    batch: int,
    threads: int,
    out: Path,
) -> None:
    """Replay a routing trace over simulated radio links: policies × bandwidth allocations."""
    from testbed.radio.setting import Setting, read_setting
    from testbed.radio.simulation import Evaluation, Simulation

    evaluation = None
    if data:
        evaluation = Evaluation(bundle or _demo_bundle(), data, items=items, batch=batch, threads=threads)
    try:
        Simulation(
            trace_path,
            read_setting(setting_path) if setting_path else Setting(),
            policies=policies,
            draws=draws,
            seed=seed,
            sweep_draws=sweep_draws if sensitivity else None,
            evaluation=evaluation,
        ).run(out, on_progress=click.echo)
    except ValueError as error:
        raise SimulationError(str(error)) from None


def _demo_bundle() -> Path:
    from rich.console import Console

    from testbed.demo_assets import demo_bundle

    return demo_bundle("int8", console=Console(stderr=True))
