"""`wdmoe-bs serve`."""

import click

from bs_coordinator.commands.station import open_station
from bs_coordinator.config import BaseStationConfig, ServeConfig
from common.options import Command, config_options


@click.command(
    cls=Command,
    example="""\
wdmoe-bs serve --bundle bundle --broker mqtt://127.0.0.1 --port 8080
wdmoe-bs serve --bundle bundle --host 0.0.0.0 --api-key-file api.key""",
)
@config_options(http=ServeConfig, config=BaseStationConfig)
def serve(http: ServeConfig, config: BaseStationConfig) -> None:
    """Answer HTTP requests of OpenAI clients (docs/http.md)."""
    from bs_coordinator.http.access import listening_sockets, read_keys

    keys = read_keys(http)
    with listening_sockets(http.host, http.port) as sockets, open_station(config) as station:
        from bs_coordinator.http.server import serve_station
        from bs_coordinator.metrics import StationMetrics
        from bs_coordinator.tracing import answer_traces

        model = station.manifest.source.name
        with answer_traces(asked_for=http.trace, model=model) as traces:
            serve_station(
                station, http, sockets, keys=keys, layer_timeout_s=config.layer_timeout_s, policy=station.config.policy,
                metrics=StationMetrics(station.dispatcher, model=model, preset=station.levers), observers=traces,
            )  # fmt: skip
