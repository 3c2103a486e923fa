"""The benchmark of hops on an emulated network, with the two-layer model on real nodes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from testbed.bench.rows import Row, Settings
from testbed.bench.sections.hops import trace
from tests.needs import needs
from wire.manifest import Scheme

pytestmark = needs("mosquitto", network=True)


@pytest.mark.slow
def test_the_hops_of_each_layer_add_up_to_its_time(tiny_bundle: Callable[[Scheme], Path], tmp_path: Path) -> None:
    steps, layers = 10, 2
    with (tmp_path / "shown").open("w+") as shown:
        settings = Settings("mosquitto", steps, tmp_path / "bench", Console(file=shown, width=120))
        (row,) = trace(settings, tiny_bundle("int4"), steps=steps)
        shown.seek(0)
        table = shown.read()
    assert isinstance(row, Row)
    assert row.parameters["layers_without_packets"] == 0
    hops_ms = row.parameters["hops_ms"]
    assert {len(some) for some in (row.ours_ms, row.floor_ms, *hops_ms.values())} == {steps * layers}
    for k, layer_ms in enumerate(row.ours_ms):
        assert sum(some[k] for some in hops_ms.values()) == pytest.approx(layer_ms, abs=0.01)
    for hop, some in hops_ms.items():
        assert hop in table
        # The base station reads two clocks to log when it sent, and another process may run between.
        assert hop == "base station: writes" or min(some) > -0.001
