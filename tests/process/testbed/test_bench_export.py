"""The benchmark of exports, with a small checkpoint."""

from pathlib import Path

import pytest
from rich.console import Console
from safetensors import safe_open

from exporter.bundle.bundle import export_bundle
from testbed.bench.rows import Row, Settings
from testbed.bench.sections import export
from testbed.twin.shapes import CONFIGS
from testbed.twin.write import write_checkpoint
from wire.manifest import Quantisation

SMALL = {
    **CONFIGS["mixtral-8x7b"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.slow
def test_an_export_is_compared_with_its_parts(tmp_path: Path) -> None:
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "bench"
    write_checkpoint(checkpoint, SMALL, seed=0, progress=lambda _done, _all: None)
    settings = Settings("embedded", 10, folder, Console(quiet=True), checkpoint=checkpoint)
    whole, copied = export.measure(settings)
    assert isinstance(whole, Row)
    assert isinstance(copied, Row)
    for row in (whole, copied):
        assert len(row.ours_ms) == len(row.floor_ms) == 2
        assert min(row.floor_ms) > 0
        assert all(ms > 0 for ms in row.parts.values())
    # Trunk and experts are a part of the same exports.
    assert all(part < all_ for part, all_ in zip(copied.ours_ms, whole.ours_ms, strict=True))
    assert whole.parameters["memory_bytes"] > 0
    # As many bytes are read and written as in an export, except its documents.
    (weights,) = checkpoint.glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        read = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - not iterable
    bundle = tmp_path / "bundle"
    export_bundle(checkpoint, bundle, Quantisation(scheme="int4", block=32), jobs=1)
    written = sum(path.stat().st_size for path in bundle.glob("*/**/*") if path.is_file())
    assert whole.parameters["read_bytes"] == read
    assert whole.parameters["written_bytes"] == pytest.approx(written, rel=0.01)
    assert not list(folder.iterdir())
