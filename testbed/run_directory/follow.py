"""`status --follow`: shows a run on the terminal while it goes on, from the files in its folder."""

import time

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from testbed.run_directory.directory import RunDir
from testbed.run_directory.live import Live, LiveNode, read_live
from testbed.run_directory.status import Status, lines, status_of

_EVERY_S = 1.0
_LAST_EVENTS = 6
_HIDDEN = frozenset({"cell_started", "site_ready"})
"""Events that other parts of the screen show."""


def follow(run: RunDir, console: Console) -> Status:
    """Show a run until it stops; prints one line per change if the output is not a terminal."""
    status = status_of(run)
    if not console.is_terminal:
        return _follow_plainly(run, console, status)
    with Screen(screen(run, status, read_live(run)), console=console, auto_refresh=False) as shown:
        while status.running:
            time.sleep(_EVERY_S)
            status = status_of(run)
            shown.update(screen(run, status, read_live(run)), refresh=True)
    return status


def screen(run: RunDir, status: Status, live: Live | None) -> RenderableType:
    """The screen at one moment."""
    progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), auto_refresh=False)
    progress.add_task(escape(run.manifest.name), total=status.cells, completed=status.complete)
    parts: list[RenderableType] = [progress, *(escape(line) for line in lines(status))]
    if live is not None and status.running:
        memory, disk = _mib(live.rss_bytes), _mib(live.disk_free_bytes)
        parts += [_nodes(live), f"{live.steps} steps in this session, {memory} MiB of memory, {disk} MiB of disk free"]
    return Group(*parts, _events(run))


def _follow_plainly(run: RunDir, console: Console, status: Status) -> Status:
    printed = ""
    while True:
        line = lines(status)[0]
        if line != printed:
            console.print(escape(line), soft_wrap=True)
            printed = line
        if not status.running:
            return status
        time.sleep(_EVERY_S)
        status = status_of(run)


def _nodes(live: Live) -> Table:
    table = Table("node", "", "last heard, s ago", "°C", "signal, dBm", "free RAM, MiB", box=box.SIMPLE)
    for node in live.nodes:
        table.add_row(
            escape(node.node),
            "online" if node.online else f"[red]{escape(node.reason or 'offline')}[/red]",
            *_numbers(node),
        )
    return table


def _numbers(node: LiveNode) -> list[str]:
    values = (node.silent_s, node.celsius, node.signal_dbm)
    free = "" if node.available_bytes is None else str(_mib(node.available_bytes))
    return [*("" if value is None else f"{value:.0f}" for value in values), free]


def _events(run: RunDir) -> Table:
    table = Table(box=None, show_header=False)
    for event in [event for event in run.events() if event["event"] not in _HIDDEN][-_LAST_EVENTS:]:
        about = ("kind", "subject", "node", "text", "what", "detail", "error")
        details = ", ".join(str(event[key]) for key in about if event.get(key))
        clock = time.strftime("%H:%M:%S", time.localtime(event["unix_ns"] / 1e9))
        table.add_row(clock, escape(event["event"]), escape(details))
    return table


def _mib(count: int) -> int:
    return count >> 20
