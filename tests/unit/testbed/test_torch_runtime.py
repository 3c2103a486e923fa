"""Experts in torch compute what onnxruntime computes with activations in float32, whatever the graph and the scheme."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from common.errors import WdmoeError
from edge_node.experts import ExpertRuntime
from exporter.bundle.bundle import export_bundle
from testbed.evaluation.local_experts import LocalExperts
from testbed.evaluation.torch_runtime import TorchRuntime
from tests.checkpoints import tiny_moe
from tests.in_process import run_in_process
from wire.manifest import ExpertEntry, Quantisation, load_manifest
from wire.probe import probe_input
from wire.tensors import Array

_FP32_ACTIVATIONS = 1
"""MatMulNBits' accuracy level without rounding of activations."""


def bundle(folder: Path, family: str, monkeypatch: pytest.MonkeyPatch, quantisation: Quantisation, slices: int) -> Path:
    monkeypatch.setattr("exporter.bundle.bundle.try_trunk", lambda *_: [])  # it starts a process
    tiny_moe(folder / "checkpoint", family)
    export_bundle(folder / "checkpoint", folder / "bundle", quantisation, jobs=1, slices=slices)
    return folder / "bundle"


def unrounded(bundle: Path, entry: ExpertEntry, x: Array) -> Array:
    """Onnxruntime's output for the same graph, with activations in float32."""
    model = onnx.load(str(bundle / entry.files[0].path), load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("accuracy_level", _FP32_ACTIVATIONS)])
    path = bundle / entry.files[0].path.replace(".onnx", ".unrounded.onnx")
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    output: Array = session.run(["y"], {"x": x})[0]
    return output


@pytest.mark.parametrize(
    ("family", "quantisation", "slices"),
    [
        ("qwen3_moe", Quantisation(scheme="int4", block=32), 1),
        ("qwen3_moe", Quantisation(scheme="int4", block=16, symmetric=True), 2),
        ("qwen3_moe", Quantisation(scheme="int4", block=16, w2_bits=8), 2),
        ("gpt_oss", Quantisation(scheme="int4", block=32, symmetric=True, w2_bits=8), 1),
        ("gpt_oss", Quantisation(scheme="int8", block=32), 1),
        ("gpt_oss", Quantisation(scheme="int4", block=128), 1),  # a block larger than a row: padded
        ("gpt_oss", Quantisation(scheme="fp16"), 1),
        ("mixtral", Quantisation(scheme="fp32"), 3),
    ],
    ids=str,
)
def test_same_outputs(
    family: str, quantisation: Quantisation, slices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundle(tmp_path, family, monkeypatch, quantisation, slices)
    manifest = load_manifest(folder)
    runtime = TorchRuntime(folder, manifest, "cpu")
    x = 2 * probe_input(manifest.dims.hidden, 5)
    for entry in (manifest.experts[0], manifest.experts[-1]):
        wanted = unrounded(folder, entry, x)
        np.testing.assert_allclose(runtime.run(entry.id, x), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_only_the_rounding_of_activations_differs_from_nodes(random_bundle: Path) -> None:
    manifest = load_manifest(random_bundle)
    ids = [entry.id for entry in manifest.experts]
    nodes, torch_ = ExpertRuntime(random_bundle, manifest, ids), TorchRuntime(random_bundle, manifest, "cpu")
    x = probe_input(manifest.dims.hidden, 16)
    ours, theirs = torch_.run(ids[0], x), nodes.run(ids[0], x)
    # Two roundings to int8 per block, each of at most 1/254 of the block's largest value.
    assert 0 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.02


def test_all_experts_of_a_layer(random_bundle: Path) -> None:
    dims = load_manifest(random_bundle).dims
    gate = np.zeros((3, dims.experts), np.float32)
    gate[[0, 0, 1, 2], [0, 1, 1, 3]] = 0.25, 0.75, 1.0, 0.5
    x = probe_input(dims.hidden, 3)
    outputs = [
        LocalExperts(random_bundle, threads=1, device=device).begin(1, x, gate).result().output
        for device in (None, "cpu")
    ]
    assert np.linalg.norm(outputs[0] - outputs[1]) / np.linalg.norm(outputs[0]) < 0.02


def test_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_bundle: Path) -> None:
    folder = bundle(tmp_path, "mixtral", monkeypatch, Quantisation(scheme="int8-dynamic"), 1)
    with pytest.raises(WdmoeError, match="experts in int8-dynamic can't be computed by torch"):
        TorchRuntime(folder, load_manifest(folder), "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(WdmoeError, match="--gpu: torch finds no CUDA device here"):
        TorchRuntime(random_bundle, load_manifest(random_bundle), "cuda")


@pytest.mark.parametrize("command", ["run", "quality"])
def test_without_a_gpu_the_command_ends_before_it_starts(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = ["testbed/experiment/plans/robustness.yaml"] if command == "run" else []
    result = run_in_process("testbed", command, *plan, "--data", tmp_path, "--gpu", "--out", tmp_path / "out")
    assert result.stderr.startswith("wdmoe-testbed: error: --gpu: torch finds no CUDA device here")
    assert not (tmp_path / "out").exists()
