"""Expert graphs of every activation, with and without biases, compute what transformers' own modules compute."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from transformers import GptOssConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from exporter.checkpoint.matrices import ExpertTensors, matrix_ref
from exporter.checkpoint.safetensors_file import read_header
from exporter.expert.expert import ExpertJob, export_expert, slice_bounds, slice_of
from exporter.expert.graph import build_graph, plan_layout
from exporter.expert.probe import check_probe, relative_error, run_rows
from wire.experts import ExpertId
from wire.manifest import Dims, ExpertGraph, Quantisation, Scheme
from wire.probe import probe_input

DIMS = Dims(hidden=96, intermediate=160, layers=1, experts=2, top_k=1, vocab=1, max_positions=1)
GPT_OSS = ExpertGraph(activation="clamped", biases=True, alpha=1.702, limit=1.5)  # a limit that many values exceed
FP32 = Quantisation(scheme="fp32")
# Quantisation's own error is that of SwiGLU with SiLU (test_exporter_expert.py).
SCHEMES = [("fp32", 0, False, 2e-6), ("fp16", 0, False, 1e-3), ("int8", 32, False, 0.02),
           ("int8-dynamic", 0, False, 0.05), ("int4", 32, False, 0.2), ("int4", 128, True, 0.25)]  # fmt: skip


def gpt_oss(folder: Path) -> tuple[GptOssExperts, ExpertTensors]:
    """Random experts of gpt-oss, and the place of expert 1 in a checkpoint."""
    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=DIMS.hidden, intermediate_size=DIMS.intermediate, num_local_experts=DIMS.experts, swiglu_limit=1.5
    )
    experts = GptOssExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.detach() for name, tensor in experts.named_parameters()}, folder / "model.safetensors")
    refs = read_header(folder / "model.safetensors").tensors
    wide, tall = (DIMS.intermediate, DIMS.hidden), (DIMS.hidden, DIMS.intermediate)
    gate_up, bias = refs["gate_up_proj"], refs["gate_up_proj_bias"]
    return experts, ExpertTensors(
        w1=matrix_ref(gate_up, wide, expert=1, half="even", transposed=True),
        w3=matrix_ref(gate_up, wide, expert=1, half="odd", transposed=True),
        w2=matrix_ref(refs["down_proj"], tall, expert=1, transposed=True),
        b1=matrix_ref(bias, (DIMS.intermediate, 1), expert=1, half="even"),
        b3=matrix_ref(bias, (DIMS.intermediate, 1), expert=1, half="odd"),
        b2=matrix_ref(refs["down_proj_bias"], (DIMS.hidden, 1), expert=1),
    )


@pytest.mark.parametrize(("scheme", "block", "symmetric", "limit"), SCHEMES)
def test_gpt_oss_experts(scheme: Scheme, block: int, symmetric: bool, limit: float, tmp_path: Path) -> None:
    experts, tensors = gpt_oss(tmp_path / "checkpoint")
    quantisation = Quantisation(scheme=scheme, block=block, symmetric=symmetric)
    entry = export_expert(ExpertJob(ExpertId(0, 1), tensors, DIMS, quantisation, tmp_path, graph=GPT_OSS))
    x = 3 * probe_input(DIMS.hidden, 6)
    with torch.no_grad():
        ones = torch.ones(len(x), 1)
        wanted = experts(torch.from_numpy(x), torch.ones(len(x), 1, dtype=torch.long), ones).numpy()
    assert relative_error(run_rows(tmp_path / entry.files[0].path, x), wanted) < limit
    assert entry.error < limit
    assert check_probe(tmp_path, entry, DIMS.hidden, 1e-3) < 1e-3
    model = onnx.load(str(tmp_path / entry.files[0].path), load_external_data=False)
    onnx.checker.check_model(str(tmp_path / entry.files[0].path))
    assert [o.version for o in model.opset_import if not o.domain] == [17]


@pytest.mark.parametrize(
    ("quantisation", "slices"),
    [
        (FP32, 4), (Quantisation(scheme="fp16"), 3), (Quantisation(scheme="int4", block=32), 2),
        (Quantisation(scheme="int4", block=32), 5), (Quantisation(scheme="int8", block=64), 2),
        (Quantisation(scheme="int4", block=32, w2_bits=8), 4),
    ],
)  # fmt: skip
def test_slices_add_up_to_the_expert(quantisation: Quantisation, slices: int, tmp_path: Path) -> None:
    """The bias of w2 counts once, and no block is cut: quantised weights are those of the whole expert."""
    _, tensors = gpt_oss(tmp_path / "checkpoint")
    job = ExpertJob(ExpertId(0, 1), tensors, DIMS, quantisation, tmp_path, graph=GPT_OSS)
    x = 3 * probe_input(DIMS.hidden, 6)
    whole = run_rows(tmp_path / export_expert(job).files[0].path, x)
    entries = [export_expert(slice_of(job, k, slices)) for k in range(slices)]
    parts = np.stack([run_rows(tmp_path / e.files[0].path, x) for e in entries])
    assert relative_error(parts.sum(axis=0), whole) < 2e-6
    assert [e.name for e in entries] == [f"L00:E1/{k}" for k in range(slices)]
    assert len({file.path for e in entries for file in e.files}) == 2 * slices
    for entry in entries:
        check_probe(tmp_path, entry, DIMS.hidden, 1e-3)


def test_slices_are_cut_between_blocks() -> None:
    assert slice_bounds(160, Quantisation(scheme="int4", block=32), 2) == [(0, 64), (64, 160)]
    assert slice_bounds(70, Quantisation(scheme="int4", block=32), 3) == [(0, 32), (32, 64), (64, 70)]
    assert slice_bounds(160, FP32, 3) == [(0, 53), (53, 106), (106, 160)]
    with pytest.raises(ValueError, match="160 inner neurons in blocks of 64 can't be cut into 4 slices: at most 3"):
        slice_bounds(160, Quantisation(scheme="int8", block=64), 4)


@pytest.mark.parametrize(("scheme", "block", "symmetric", "limit"), SCHEMES)
@pytest.mark.parametrize(("activation", "name"), [("gelu", "gelu"), ("gelu-tanh", "gelu_pytorch_tanh")])
def test_gelu_experts(
    activation: str, name: str, scheme: Scheme, block: int, symmetric: bool, limit: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    shapes = {"w1": (DIMS.intermediate, DIMS.hidden), "w3": (DIMS.intermediate, DIMS.hidden),
              "w2": (DIMS.hidden, DIMS.intermediate)}  # fmt: skip
    stored = {matrix: 0.15 * torch.randn(shape) for matrix, shape in shapes.items()}
    save_file(stored, tmp_path / "model.safetensors")
    refs = read_header(tmp_path / "model.safetensors").tensors
    tensors = ExpertTensors(*(matrix_ref(refs[matrix], shape) for matrix, shape in shapes.items()))
    quantisation = Quantisation(scheme=scheme, block=block, symmetric=symmetric)
    graph = ExpertGraph(activation=activation)  # type: ignore[arg-type]
    entry = export_expert(ExpertJob(ExpertId(0, 0), tensors, DIMS, quantisation, tmp_path, graph=graph))
    x = 3 * probe_input(DIMS.hidden, 6)
    rows = torch.from_numpy(x)
    wanted = (ACT2FN[name](rows @ stored["w1"].T) * (rows @ stored["w3"].T)) @ stored["w2"].T
    assert relative_error(run_rows(tmp_path / entry.files[0].path, x), wanted.numpy()) < limit
    assert entry.error < limit


@pytest.mark.parametrize("columns", [31, 33, 159, 161])
@pytest.mark.parametrize(("scheme", "limit"), [("int4", 0.25), ("int8", 0.03)])
def test_the_last_block_may_be_part_of_one(scheme: Scheme, limit: float, columns: int, tmp_path: Path) -> None:
    dims = Dims(hidden=columns, intermediate=columns, layers=1, experts=1, top_k=1, vocab=1, max_positions=1)
    torch.manual_seed(0)
    stored = {name: torch.randn(columns, columns) * columns**-0.5 for name in ("w1", "w3", "w2")}
    save_file(stored, tmp_path / "model.safetensors")
    refs = read_header(tmp_path / "model.safetensors").tensors
    tensors = ExpertTensors(*(matrix_ref(refs[name], (columns, columns)) for name in stored))
    for block in (32, 64, 128):
        quantisation = Quantisation(scheme=scheme, block=block)
        entry = export_expert(ExpertJob(ExpertId(0, 0), tensors, dims, quantisation, tmp_path / str(block)))
        assert entry.error < limit


@pytest.mark.parametrize(
    ("quantisation", "digest"),
    [
        (Quantisation(scheme="fp32"), "e482f03ccef6e92f"),
        (Quantisation(scheme="fp16"), "b901a555870f80b4"),
        (Quantisation(scheme="int8", block=32), "7b1dbc5c610a9ae2"),
        (Quantisation(scheme="int8", block=128, symmetric=True), "28906da5484625a3"),
        (Quantisation(scheme="int8-dynamic"), "6ad0de82fddbf9c2"),
        (Quantisation(scheme="int4", block=32), "226b18812bca8040"),
        (Quantisation(scheme="int4", block=128, symmetric=True), "9d89ef20e5ab70be"),
    ],
    ids=str,
)
def test_mixtral_graphs_keep_their_bytes(quantisation: Quantisation, digest: str) -> None:
    """Bundles that were made before, and signed, stay what an export makes."""
    dims = Dims(hidden=64, intermediate=96, layers=1, experts=1, top_k=1, vocab=1, max_positions=1)
    made = build_graph(dims, quantisation, plan_layout(dims, quantisation), "E0.weights")
    assert hashlib.sha256(made).hexdigest()[:16] == digest
