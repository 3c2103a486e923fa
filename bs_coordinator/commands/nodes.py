"""`wdmoe-bs nodes`."""

import click

from bs_coordinator.commands.station import connect_nodes
from bs_coordinator.commands.tables import compact_table, print_table
from bs_coordinator.config import ClusterConfig
from common.console import printable
from common.json_output import json_option, print_json
from common.options import Command, config_options
from wire.experts import format_selector

_TELEMETRY_S = 1.2
"""Every node sends telemetry once a second."""


@click.command(cls=Command, example="wdmoe-bs nodes --bundle bundle --broker mqtt://192.168.1.10")
@json_option
@config_options(config=ClusterConfig)
def nodes(as_json: bool, config: ClusterConfig) -> None:
    """List the nodes online and the experts that no node holds."""
    from bs_coordinator.nodes.telemetry_inbox import describe

    with connect_nodes(config) as dispatcher:
        registry = dispatcher.registry
        if registry.nodes:
            dispatcher.pump(_TELEMETRY_S)
        latest = dispatcher.telemetry.latest()
    if as_json:
        print_json(
            {
                "nodes": [status for _, status in sorted(registry.nodes.items())],
                "telemetry": {name: sample.telemetry for name, sample in latest.items()},
                "ignored": dict(registry.ignored),
                "missing_experts": format_selector(registry.missing(), registry.dims.slices),
            }
        )
        return
    table = compact_table()
    for column in ("node", "host", "experts", "quantisation", "experts'\nRAM", "free\nRAM", "device", "telemetry"):
        figures = column.endswith("RAM")
        table.add_column(
            column, justify="right" if figures else "left", no_wrap=figures or column == "quantisation", overflow="fold"
        )
    for name, status in sorted(registry.nodes.items()):
        holding, machine = status.holding, status.machine
        if holding and machine:
            ram = f"{holding.resident_bytes / 2**20:.0f} MiB", f"{machine.available_bytes / 2**20:.0f} MiB"
            device = f"{status.device.profile}, {status.device.provider}" if status.device else ""
            now = describe(latest[name].telemetry) if name in latest else ""
            texts = name, machine.host, holding.experts, holding.quantisation, *ram, device, now
            table.add_row(*(printable(" ".join(text.split())) for text in texts))
    print_table(table)
    for name, why in sorted(registry.ignored.items()):
        click.echo(f"ignored {name}: {why}")
    if registry.missing():
        click.echo(registry.describe_missing())
