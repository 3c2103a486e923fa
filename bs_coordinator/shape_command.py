"""`wdmoe-bs shape`: see `bs_coordinator.shaping`."""

import click


def _per_node(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """Each `ADDRESS=NUMBER`, the number above 0."""
    found = {}
    for value in values:
        address, _, number = value.rpartition("=")
        try:
            found[address] = float(number)
        except ValueError:
            found[address] = 0
        if not address or not 0 < found[address] < float("inf"):
            raise click.BadParameter(f"'{value}' is not ADDRESS=NUMBER with a number above 0")
    return found


@click.command()
@click.argument("interface")
@click.option("--link", "links", multiple=True, callback=_per_node, help="ADDRESS=MBPS of a node's link; repeatable.")
@click.option(
    "--rows", multiple=True, callback=_per_node, help="ADDRESS=ROWS that a layer sends there; else all alike."
)
@click.option("--off", is_flag=True, help="Stop shaping.")
def shape(interface: str, links: dict[str, float], rows: dict[str, float], off: bool) -> None:
    """Share an interface's air time among nodes so that all have their hidden states at the same time (root)."""
    from bs_coordinator import shaping

    if off == bool(links):
        raise click.UsageError("give a --link for each node, or --off")
    if off:
        shaping.clear(interface)
        return
    if unknown := rows.keys() - links:
        raise click.UsageError(f"--rows names {', '.join(sorted(unknown))}, but no --link does")
    nodes = [shaping.NodeLink(address, mbps, rows.get(address, 1.0)) for address, mbps in links.items()]
    shaping.shape(interface, nodes)
    for node, share in zip(nodes, shaping.time_shares(nodes), strict=True):
        click.echo(f"{node.address}: {share:.1%} of the time, {share * node.mbps:.2f} of {node.mbps:g} Mbit/s")
