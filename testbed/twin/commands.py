"""`wdmoe-testbed twin`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import click

from common.cores import usable_cores
from common.options import Command
from testbed.twin.shapes import TwinName

_FORMATS = ("checkpoint", "bundle", "gguf")


def register(group: click.Group) -> None:
    """Add the command to `wdmoe-testbed`."""
    group.add_command(twin)


@click.command(
    cls=Command,
    example="""\
wdmoe-testbed twin qwen3-30b-a3b twin --layers 2
wdmoe-testbed twin mixtral-8x7b twin-int4 --format bundle --slices 4
wdmoe-testbed twin mixtral-8x7b twin-q4_0.gguf --format gguf""",
)
@click.argument("model", type=click.Choice(get_args(TwinName)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format", "format_", type=click.Choice(_FORMATS), default="checkpoint", show_default=True,
    help="A checkpoint in bf16 to export, a bundle with experts in int4, or a file in q4_0 for llama.cpp.",
)  # fmt: skip
@click.option("--layers", type=click.IntRange(1), help="Number of layers.  [default: all]")
@click.option("--slices", type=click.IntRange(1), help="Slices of each expert of a bundle.  [default: 1]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the random weights.")
@click.option(
    "--jobs", type=click.IntRange(1), help="Processes that write a bundle or a GGUF file.  [default: one per core]"
)
def twin(
    model: TwinName, out: Path, format_: str, layers: int | None, slices: int | None, seed: int, jobs: int | None
) -> None:
    """Write a model with MODEL's exact shape and random weights to OUT.

    To try sizes and times without a download: it exports and runs like the real model, but its answers are nonsense.
    The same bundle with another number of slices is cut from the one that is in OUT.
    """
    from common.sizes import readable_bytes
    from testbed.twin.write import write_twin

    if slices and format_ != "bundle":
        raise click.UsageError("--slices is for --format bundle")
    jobs = jobs or usable_cores()
    try:
        with _bar(by_bytes=format_ != "bundle") as progress:
            if format_ == "bundle":
                from testbed.twin.bundle import write_twin_bundle

                manifest = write_twin_bundle(
                    out, model, layers=layers, slices=slices or 1, seed=seed, jobs=jobs, progress=progress
                )
                files = [*manifest.trunk, *(file for entry in manifest.experts for file in entry.files)]
                size = sum(file.bytes for file in files)
            elif format_ == "gguf":
                from testbed.twin.gguf_file import write_twin_gguf

                size = write_twin_gguf(out, model, layers=layers, seed=seed, jobs=jobs, progress=progress)
            else:
                size = write_twin(out, model, layers=layers, seed=seed, progress=progress)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(f"{model}: {readable_bytes(size)} of weights in {out}")


@contextmanager
def _bar(*, by_bytes: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal for the duration of the context; yields what is called with the amount done and the
    whole."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = DownloadColumn() if by_bytes else MofNCompleteColumn()
    console = Console(stderr=True)
    columns = (TextColumn("weights"), BarColumn(), amount, TimeRemainingColumn())
    # Without a terminal a bar that is removed still leaves an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("weights", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
