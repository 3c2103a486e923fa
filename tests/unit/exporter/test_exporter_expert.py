"""Exported graphs compute what transformers computes."""

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from exporter.bundle.bundle import export_bundle
from exporter.checkpoint.checkpoint import open_checkpoint
from exporter.expert.activations import silu
from exporter.expert.expert import ExpertJob, expert_paths, export_expert, hash_source
from exporter.expert.graph import matrix_shape, plan_layout
from exporter.expert.probe import check_probe, relative_error, run_rows
from tests.checkpoints import EXPERTS, HIDDEN, save_mixtral
from wire.errors import ProbeError
from wire.experts import ExpertId
from wire.manifest import Dims, ExpertEntry, Quantisation, Scheme
from wire.probe import probe_input
from wire.tensors import Array

FP32 = Quantisation(scheme="fp32")


@pytest.mark.parametrize(("dtype", "shards"), [("float32", "1GB"), ("float32", "60KB"), ("bfloat16", "1GB"),
                                               ("float16", "1GB")])  # fmt: skip
def test_fp32_export_equals_transformers(dtype: str, shards: str, tmp_path: Path) -> None:
    import torch

    model = save_mixtral(tmp_path / "model", dtype, shard_size=shards)
    export_bundle(tmp_path / "model", tmp_path / "bundle", FP32, jobs=1)
    x = probe_input(HIDDEN, 5)
    for layer, block in enumerate(model.float().model.layers):
        experts = block.mlp.experts
        for expert in range(EXPERTS):
            with torch.no_grad():
                gate, up = (torch.from_numpy(x) @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
                wanted = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T
            found = run_rows(tmp_path / f"bundle/experts/L{layer:02d}/E{expert}.onnx", x)
            assert relative_error(found, wanted.numpy()) < 1e-6


@pytest.mark.parametrize(
    ("scheme", "block", "symmetric", "limit"),
    [
        ("fp32", 0, False, 1e-6),
        ("fp16", 0, False, 1e-3),
        ("int8", 32, False, 0.02),
        ("int8", 128, True, 0.03),
        ("int8-dynamic", 0, False, 0.05),
        ("int4", 32, False, 0.2),
        ("int4", 32, True, 0.2),
        ("int4", 64, False, 0.22),
        ("int4", 128, False, 0.25),  # hidden 64 and intermediate 96 are both padded
    ],
)
def test_every_scheme(
    scheme: Scheme, block: int, symmetric: bool, limit: float, mixtral: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_checkpoint(mixtral())
    quantisation = Quantisation(scheme=scheme, block=block, symmetric=symmetric)
    id = ExpertId(1, 2)
    entry = export_expert(ExpertJob(id, source.experts[id], source.dims, quantisation, tmp_path))
    assert entry.error < limit
    assert check_probe(tmp_path, entry, HIDDEN, 1e-3) < 1e-3
    for file in entry.files:
        data = (tmp_path / file.path).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
    onnx.checker.check_model(str(tmp_path / entry.files[0].path))
    assert sorted(p.name for p in (tmp_path / "experts/L01").iterdir()) == ["E2.onnx", "E2.weights"]


def test_int8_dynamic_adds_up_without_overflow(mixtral: Callable[..., Path], tmp_path: Path) -> None:
    source = open_checkpoint(mixtral())
    id, quantisation = ExpertId(0, 1), Quantisation(scheme="int8-dynamic")
    export_expert(ExpertJob(id, source.experts[id], source.dims, quantisation, tmp_path))
    graph, weights = (tmp_path / path for path in expert_paths(id))
    x = probe_input(HIDDEN, 8)
    found = run_rows(graph, x)
    wanted = np.stack([_in_integers(row, weights, source.dims, quantisation) for row in x])
    # A rounded activation may fall on the other side of a half. Sums cut off at 16 bits are wrong by 0.05 and more.
    assert relative_error(found, wanted) < 5e-3


def _in_integers(x: Array, weights: Path, dims: Dims, quantisation: Quantisation) -> Array:
    """An int8-dynamic expert's output for one hidden state: ONNX's definition of its operators, in 64-bit integers."""
    layout, stored = plan_layout(dims, quantisation), weights.read_bytes()

    def product(x: Array, matrix: str) -> Array:
        rows, columns = matrix_shape(dims, matrix)
        weight, scales = (placed.offset for placed in layout.parts[matrix])
        codes = np.frombuffer(stored, np.int8, rows * columns, weight).reshape(columns, rows).astype(np.int64)
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        step = (high - low) / 255
        zero = round(-low / step)
        quantised = np.clip(np.rint(x / step) + zero, 0, 255).astype(np.int64)
        y = ((quantised - zero) @ codes) * step * np.frombuffer(stored, "<f4", rows, scales)
        return np.asarray(y, np.float32)

    gate = product(x, "w1")
    return product(silu(gate) * product(x, "w3"), "w2")


def test_error_is_measured_against_the_source(mixtral: Callable[..., Path], tmp_path: Path) -> None:
    source = open_checkpoint(mixtral())
    id = ExpertId(0, 1)
    job = ExpertJob(id, source.experts[id], source.dims, Quantisation(scheme="int4", block=32), tmp_path)
    entry = export_expert(job)
    exact = export_expert(ExpertJob(id, source.experts[id], source.dims, FP32, tmp_path / "fp32"))
    x = probe_input(HIDDEN, 8)
    wanted = run_rows(tmp_path / "fp32" / exact.files[0].path, x)
    found = run_rows(tmp_path / entry.files[0].path, x)
    assert entry.error == pytest.approx(relative_error(found, wanted), rel=1e-3)
    assert entry.source_sha256 == exact.source_sha256 == hash_source(source.experts[id])


def test_same_bytes_on_every_run(mixtral: Callable[..., Path], tmp_path: Path) -> None:
    source = open_checkpoint(mixtral())
    id = ExpertId(0, 0)

    def export(name: str) -> ExpertEntry:
        quantisation = Quantisation(scheme="int4", block=32)
        return export_expert(ExpertJob(id, source.experts[id], source.dims, quantisation, tmp_path / name))

    assert export("a") == export("b")


def test_wrong_probe_output_is_found(mixtral: Callable[..., Path], tmp_path: Path) -> None:
    source = open_checkpoint(mixtral())
    id = ExpertId(0, 0)
    entry = export_expert(ExpertJob(id, source.experts[id], source.dims, FP32, tmp_path))
    other = base64.b64encode(np.ones(HIDDEN, "<f2").tobytes()).decode()
    forged = ExpertEntry(
        layer=0, expert=0, files=entry.files, probe_output=other, error=0.0, source_sha256=entry.source_sha256
    )
    with pytest.raises(ProbeError, match="expert L00:E0 computes something else"):
        check_probe(tmp_path, forged, HIDDEN, 0.06)


def test_trunk_holds_everything_else_unchanged(mixtral: Callable[..., Path], tmp_path: Path) -> None:
    source = mixtral("float32")
    export_bundle(source, tmp_path / "bundle", FP32, layers=[1], experts=[0], jobs=1)
    trunk = load_file(tmp_path / "bundle/trunk/model.safetensors")
    whole = load_file(source / "model.safetensors")
    assert set(trunk) == {name for name in whole if ".experts." not in name}
    for name, tensor in trunk.items():
        np.testing.assert_array_equal(tensor, whole[name])
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "bundle/trunk" / name).read_bytes() == (source / name).read_bytes()


def test_silu_at_the_extremes() -> None:
    x = np.array([-1e30, -100, -1, 0, 1, 100, 1e30], np.float32)
    wanted = x[1:6] / (1 + np.exp(-x[1:6].astype(np.float64)))
    np.testing.assert_allclose(silu(x)[1:6], wanted, rtol=1e-5, atol=1e-6)
    assert silu(x)[-1] == x[-1]
    assert abs(silu(x)[0]) == 0
