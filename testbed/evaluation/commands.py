"""`wdmoe-testbed quality` and `differences`."""

import itertools
from pathlib import Path
from typing import get_args

import click

from bs_coordinator.selection.survivors import Survivors
from common.cores import usable_cores
from common.options import Command
from exporter.demo_model.assembly import DEFAULT_MODEL, DEMO_MODELS
from testbed.evaluation.variants import VARIANTS
from wire.tensors import WireDtype

_PATH = click.Path(path_type=Path)


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    group.add_command(quality)
    group.add_command(differences)


@click.command(
    cls=Command, example="wdmoe-testbed quality --data data --variant int4-b32 --policy topk --policy subset"
)
@click.option("--data", type=_PATH, required=True, help="Folder of the evaluation data (docs/measurement.md).")
@click.option("--items", type=click.IntRange(1), default=300, show_default=True, help="Questions per task.")
@click.option("--texts", type=click.IntRange(1), default=3, show_default=True, help="Texts per domain.")
@click.option("--tokens", type=click.IntRange(2), default=384, show_default=True, help="Tokens per text, at most.")
@click.option(
    "--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)),
    help="Quantisation to evaluate; repeatable.  [default: all]",
)  # fmt: skip
@click.option(
    "--bundle", "bundles", multiple=True, type=_PATH,
    help="Folder of a bundle to evaluate instead of the demo model's, or beside --variant; repeatable.",
)  # fmt: skip
@click.option("--model", type=click.Choice(list(DEMO_MODELS)), default=DEFAULT_MODEL, show_default=True,
              help="Demo model to evaluate.")  # fmt: skip
@click.option(
    "--policy", "policies", multiple=True, default=["topk"], show_default=True,
    help="Policy to evaluate, which sees links of unequal speed; repeatable.",
)  # fmt: skip
@click.option(
    "--survivors", "rules", multiple=True, type=click.Choice(get_args(Survivors)),
    help="Evaluate each policy with this rule for the weights of the experts it keeps; repeatable.",
)  # fmt: skip
@click.option(
    "--task", "tasks", multiple=True, type=click.Choice(["ARC-Easy", "PIQA", "HellaSwag"]),
    default=["ARC-Easy", "PIQA"],
    help="Questions to ask; repeatable.  [default: ARC-Easy and PIQA]",
)  # fmt: skip
@click.option(
    "--lost", type=click.IntRange(0), multiple=True,
    help="Leave out this expert of every layer, as if its only node were lost; repeatable.",
)  # fmt: skip
@click.option(
    "--separately",
    is_flag=True,
    help="Compute each choice with its question in a step of its own, as a server does for lm-eval; slower.",
)
@click.option(
    "--wire", type=click.Choice([dtype.name.lower() for dtype in WireDtype]), default="fp32", show_default=True,
    help="Round hidden states as if they were sent to nodes and back in this format.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1), default=usable_cores(), show_default="all cores",
    help="Threads per expert.",
)  # fmt: skip
@click.option("--gpu", "device", flag_value="cuda", help="Compute the experts on the GPU, with activations in float32.")
@click.option("--out", type=_PATH, default=Path("runs/quality.json"), show_default=True, help="File for the results.")
def quality(
    data: Path, items: int, texts: int, tokens: int, variants: tuple[str, ...], bundles: tuple[Path, ...], model: str,
    policies: tuple[str, ...], rules: tuple[str, ...], tasks: tuple[str, ...], lost: tuple[int, ...],
    separately: bool, wire: str, threads: int, device: str | None, out: Path,
) -> None:  # fmt: skip
    """Measure perplexity and accuracy of each quantisation and policy."""
    from rich.console import Console

    from testbed.demo_assets import demo_bundle
    from testbed.evaluation.quality import measure_quality, print_quality, with_rules, write_quality
    from testbed.evaluation.torch_runtime import check_device

    check_device(device)
    console = Console()
    rows = []
    names = variants or (() if bundles else tuple(VARIANTS))
    made = (demo_bundle(VARIANTS[name][0], model=model, block=VARIANTS[name][1], console=console) for name in names)
    for bundle in itertools.chain(bundles, made):
        found = measure_quality(
            bundle, data, items=items, texts_per_domain=texts, tokens=tokens, tasks=tasks, threads=threads,
            policies=with_rules(policies, rules), lost=lost, separately=separately, device=device,
            wire=WireDtype.named(wire),
        )  # fmt: skip
        try:
            for row in found:
                rows.append(row)
                write_quality(
                    rows, out,
                    {
                        "items": items, "texts_per_domain": texts, "tokens": tokens, "separately": separately,
                        "wire": wire,
                    },
                )  # fmt: skip
                print_quality(rows[-1:], console)
        except ValueError as error:
            raise click.UsageError(f"--policy: {error}") from None
    print_quality(rows, console)


@click.command(cls=Command, example="wdmoe-testbed differences bundle text.txt")
@click.argument("bundle", type=_PATH)
@click.argument("text", type=_PATH)
@click.option("--tokens", type=click.IntRange(64), default=2048, show_default=True, help="Tokens of TEXT to use.")
@click.option("--chunk", type=click.IntRange(2), default=256, show_default=True, help="Tokens per context.")
@click.option("--out", type=_PATH, default=Path("differences.json"), show_default=True, help="File for the table.")
def differences(bundle: Path, text: Path, tokens: int, chunk: int, out: Path) -> None:
    """Measure how much the experts of BUNDLE differ on TEXT, and find those that must never be dropped.

    The policy 'similar' needs the resulting table; others keep the experts that it names with keep=FILE.
    """
    from bs_coordinator.selection.differences import write_differences
    from testbed.evaluation.differences import measure_differences
    from wire.experts import ExpertId

    document = measure_differences(
        bundle, text, tokens=tokens, chunk=chunk, threads=usable_cores(),
        progress=lambda done: click.echo(f"{done} of {tokens} tokens", err=True),
    )  # fmt: skip
    write_differences(document, out)
    named = ", ".join(str(ExpertId(*found)) for found in document.super_experts) or "none"
    click.echo(f"experts that must never be dropped: {named}")
    click.echo(f"table of expert differences in {out}: --policy similar:table={out}")
