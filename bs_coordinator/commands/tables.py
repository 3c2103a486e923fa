"""Tables on stdout."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from bs_coordinator.links import NodeEstimate

_NARROWEST = 80
_UNLIMITED = 10_000


def compact_table(title: str | None = None) -> "Table":
    """A table without outer border and padding, so that it fits into 80 columns."""
    from rich.table import Table

    return Table(title=title, pad_edge=False, show_edge=False, padding=0)


def print_table(table: "Table") -> None:
    """Print a table: text folds at the terminal's edge but not below 80 columns; piped output is never folded."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)  # texts come from nodes
    console.width = max(console.width, _NARROWEST) if console.is_terminal else _UNLIMITED
    console.print(table)


def print_links(estimates: "list[NodeEstimate]") -> None:
    """Print what is known of each node's link."""
    table = compact_table("links: estimate ± one standard deviation")
    for column in (
        "node", "RTT\nms", "down\nMbit/s", "up\nMbit/s", "jitter\nms", "samples", "ms per\nrequest", "ms per\nexpert",
    ):  # fmt: skip
        text = column == "node"
        table.add_column(column, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for node in estimates:
        link = node.link
        known = node.requests > 0
        table.add_row(
            node.node + (" (stale)" if node.stale else ""),
            f"{1e3 * link.rtt_s:.2f}±{1e3 * link.rtt_std_s:.2f}",
            _rate(link.down_mbps, link.down_std_mbps),
            _rate(link.up_mbps, link.up_std_mbps),
            f"{1e3 * link.noise_s:.2f}",
            str(link.samples),
            f"{1e3 * node.fixed_s:.2f}" if known else "–",
            f"{1e3 * (node.expert_s + node.row_s):.2f}" if known else "–",
        )
    print_table(table)


def _rate(mbps: float, std_mbps: float) -> str:
    from bs_coordinator.links.estimator import rate_known

    if rate_known(mbps, std_mbps):
        return f"{mbps:.1f}±{std_mbps:.1f}"
    return f"> {mbps / (1 + 2 * std_mbps / mbps):.0f}"
