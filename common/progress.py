"""Progress of what takes longer than a moment: a bar or a spinner on a terminal, lines elsewhere.

rich is imported when it is needed: a node does not have it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, float], None]
"""Called with a stage in words, and the share that is done."""


@contextmanager
def show_progress(what: str, console: "Console | None" = None, *, keep: bool = False) -> Iterator[Progress]:
    """A bar with the time left on a terminal; elsewhere a line per tenth.

    Args:
        console: where to show it; stderr if None.
        keep: leave the full bar on the terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = console or Console(stderr=True)
    if console.is_terminal and not console.quiet:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Bar(*columns, console=console, transient=not keep) as bar:
            task = bar.add_task(what, total=1.0)
            yield lambda stage, fraction: bar.update(task, description=stage, completed=fraction)
        return
    shown = -1
    began_s: float | None = None
    began_at = 0.0

    def show(stage: str, fraction: float) -> None:
        nonlocal shown, began_s, began_at
        # What an interrupted run had finished took no time now.
        if began_s is None:
            began_s, began_at = time.monotonic(), fraction
        if int(fraction * 10) > shown:
            shown = int(fraction * 10)
            spent_s, gained = time.monotonic() - began_s, fraction - began_at
            left = f", about {spent_s * (1 - fraction) / gained / 60:.1f} min left" if gained and fraction < 1 else ""
            console.print(f"{what}: {stage} ({fraction:.0%}{left})", highlight=False, markup=False, soft_wrap=True)

    yield show


@contextmanager
def show_stages(what: str, console: "Console | None" = None) -> Iterator[Callable[[str], None]]:
    """A spinner with the present stage on a terminal; elsewhere a line per stage.

    Args:
        console: where to show it; stderr if None.
    """
    from rich.console import Console

    console = console or Console(stderr=True)
    if console.is_terminal:
        with console.status(what) as status:
            yield lambda stage: status.update(f"{what}: {stage}")
        return
    yield lambda stage: console.print(f"{what}: {stage}", highlight=False, markup=False, soft_wrap=True)
