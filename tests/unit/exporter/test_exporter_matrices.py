"""Matrices are read exactly out of every layout, in slabs, and checked before."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from exporter.checkpoint import slabs
from exporter.checkpoint.matrices import ExpertTensors, Half, MatrixRef, matrix_ref
from exporter.checkpoint.safetensors_file import TensorReader, TensorRef, read_header
from exporter.errors import CheckpointError
from wire.tensors import Array

EXPERTS, ROWS, COLUMNS = 3, 37, 96
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def saved(folder: Path, **tensors: torch.Tensor) -> dict[str, TensorRef]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return read_header(folder / "model.safetensors").tensors


def read(matrix: MatrixRef) -> tuple[Array, str]:
    """The matrix, put together from its slabs, and the hash of its raw bytes."""
    hasher = hashlib.sha256()
    with TensorReader() as reader:
        parts = [(first, slab.copy()) for first, slab in slabs.stream_rows(reader, matrix, hasher)]
    assert [first for first, _ in parts] == list(np.cumsum([0, *(len(slab) for _, slab in parts)])[:-1])
    whole = np.concatenate([slab for _, slab in parts])
    assert matrix.columns is not None or whole.shape == matrix.shape
    return whole, hasher.hexdigest()


@pytest.fixture(params=[5 * COLUMNS, 1 << 17], ids=["small slabs", "one slab"])
def slab_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Slabs of 5 rows, transposed ones from bands of 10; or whole matrices."""
    weights: int = request.param
    monkeypatch.setattr(slabs, "SLAB_WEIGHTS", weights)
    monkeypatch.setattr(slabs, "_BAND_BYTES", 4 * 2 * weights)
    return weights


def halves(tensor: torch.Tensor, half: Half) -> torch.Tensor:
    """Rows of [outputs, …]."""
    rows = len(tensor) if half == "all" else len(tensor) // 2
    taken = {"all": tensor, "first": tensor[:rows], "second": tensor[rows:], "even": tensor[::2], "odd": tensor[1::2]}
    return taken[half]


@pytest.mark.usefixtures("slab_size")
@pytest.mark.parametrize("half", ["all", "first", "second", "even", "odd"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_part_of_a_fused_tensor(dtype: str, transposed: bool, half: Half, tmp_path: Path) -> None:
    outputs = ROWS if half == "all" else 2 * ROWS
    stored = torch.randn(EXPERTS, outputs, COLUMNS).to(DTYPES[dtype])
    bias = torch.randn(EXPERTS, outputs).to(DTYPES[dtype])
    refs = saved(tmp_path, fused=stored.transpose(1, 2) if transposed else stored, bias=bias)
    for expert in range(EXPERTS):
        matrix = matrix_ref(refs["fused"], (ROWS, COLUMNS), expert=expert, half=half, transposed=transposed)
        found, digest = read(matrix)
        wanted = halves(stored[expert], half).contiguous()
        np.testing.assert_array_equal(found, wanted.float().numpy())
        assert digest == hashlib.sha256(wanted.view(torch.uint8).numpy().tobytes()).hexdigest()
        found, _ = read(matrix_ref(refs["bias"], (ROWS, 1), expert=expert, half=half))
        np.testing.assert_array_equal(found[:, 0], halves(bias[expert], half).float().numpy())


@pytest.mark.usefixtures("slab_size")
def test_mxfp4_is_dequantised_as_in_transformers(tmp_path: Path) -> None:
    blocks = torch.randint(0, 256, (EXPERTS, 2 * ROWS, COLUMNS // 32, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (EXPERTS, 2 * ROWS, COLUMNS // 32), dtype=torch.uint8)
    whole = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    refs = saved(tmp_path, blocks=blocks, scales=scales)
    for expert in range(EXPERTS):
        for half in ("even", "odd", "first"):
            matrix = matrix_ref(refs["blocks"], (ROWS, COLUMNS), expert=expert, half=half, scales=refs["scales"])
            found, digest = read(matrix)
            np.testing.assert_array_equal(found, halves(whole[expert], half).numpy())
            raw = [halves(t[expert], half).contiguous().numpy().tobytes() for t in (scales, blocks)]
            assert digest == hashlib.sha256(b"".join(raw)).hexdigest()
    assert (matrix.dtype, matrix.bytes) == ("MXFP4", ROWS * (COLUMNS // 2 + COLUMNS // 32))


@pytest.mark.usefixtures("slab_size")
def test_mxfp4_reaches_from_the_least_exponent_to_nan(tmp_path: Path) -> None:
    refs = saved(
        tmp_path,
        blocks=torch.full((1, 3, 1, 16), 0x31, dtype=torch.uint8),
        scales=torch.tensor([[[0], [254], [255]]], dtype=torch.uint8),
    )
    found, _ = read(matrix_ref(refs["blocks"], (3, 32), expert=0, scales=refs["scales"]))
    assert (found[0, :2] == [2.0**-128, 1.5 * 2.0**-127]).all()
    assert (found[1, :2] == [2.0**126, 1.5 * 2.0**127]).all()
    assert not np.isfinite(found[2]).any()


@pytest.mark.usefixtures("slab_size")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 96), (16, 32)])
def test_fp8_with_block_scales(shape: tuple[int, int], dtype: str, tmp_path: Path) -> None:
    rows, columns = shape
    codes = torch.arange(rows * columns, dtype=torch.int32).to(torch.uint8).reshape(shape)
    codes[codes & 127 == 127] = 0
    scales = torch.rand(-(-rows // 8), -(-columns // 16)).to(DTYPES[dtype])
    refs = saved(tmp_path, weight=codes.view(torch.float8_e4m3fn), weight_scale_inv=scales)
    matrix = matrix_ref(refs["weight"], shape, scales=refs["weight_scale_inv"], scale_block=(8, 16))
    wide = scales.float().repeat_interleave(8, 0).repeat_interleave(16, 1)[:rows, :columns]
    np.testing.assert_array_equal(read(matrix)[0], (codes.view(torch.float8_e4m3fn).float() * wide).numpy())
    assert matrix.dtype == "F8_E4M3"


@pytest.mark.usefixtures("slab_size")
@pytest.mark.parametrize("kind", ["plain", "transposed", "MXFP4", "FP8"])
def test_a_slice_has_its_rows_and_columns(kind: str, tmp_path: Path) -> None:
    inner, hidden = 96, 64
    shapes = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    refs: dict[str, MatrixRef] = {}
    for name, (rows, columns) in shapes.items():
        (folder := tmp_path / name).mkdir()
        if kind == "MXFP4":
            blocks = torch.randint(0, 256, (1, 2 * rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 130, (1, 2 * rows, columns // 32), dtype=torch.uint8)
            found = saved(folder, blocks=blocks, scales=scales)
            refs[name] = matrix_ref(
                found["blocks"], (rows, columns), expert=0, half="odd" if name == "w1" else "second",
                scales=found["scales"],
            )  # fmt: skip
        elif kind == "FP8":
            codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
            found = saved(folder, weight=codes, scales=torch.rand(-(-rows // 20), -(-columns // 24)))
            refs[name] = matrix_ref(found["weight"], (rows, columns), scales=found["scales"], scale_block=(20, 24))
        else:
            stored = torch.randn(2, rows, columns)
            found = saved(folder, fused=stored.transpose(1, 2) if kind == "transposed" else stored)
            refs[name] = matrix_ref(found["fused"], (rows, columns), expert=1, transposed=kind == "transposed")
    expert = ExpertTensors(**refs)
    whole = {name: read(matrix)[0] for name, matrix in refs.items()}
    for first, stop in ((0, 32), (32, 96), (43, 61)):
        part = expert.inner(first, stop)
        np.testing.assert_array_equal(read(part.w1)[0], whole["w1"][first:stop])
        np.testing.assert_array_equal(read(part.w3)[0], whole["w3"][first:stop])
        np.testing.assert_array_equal(read(part.w2)[0], whole["w2"][:, first:stop])


def test_what_can_not_be_read_is_refused(tmp_path: Path) -> None:
    refs = saved(
        tmp_path,
        fused=torch.zeros(2, 8, 32),
        whole=torch.zeros(8, 32),
        codes=torch.zeros(2, 8, 1, 16, dtype=torch.uint8),
        scales=torch.zeros(2, 8, 1, dtype=torch.uint8),
        fp8=torch.zeros(8, 32).to(torch.float8_e4m3fn),
    )

    def refused(name: str, message: str, shape: tuple[int, int] = (8, 32), **options: object) -> None:
        with pytest.raises(CheckpointError, match=re.escape(message)):
            matrix_ref(refs[name], shape, **options)  # type: ignore[arg-type]

    refused("whole", "tensor 'whole' has shape [8, 32], config.json asks for [8, 33]", shape=(8, 33))
    refused("fused", "tensor 'fused' has shape [2, 8, 32], config.json asks for [experts, 8, 32]", expert=2)
    refused("fused", "config.json asks for [experts, 16, 32]", expert=0, half="even")
    refused("fused", "config.json asks for [experts, 32, 8]", expert=0, transposed=True)
    refused("codes", "tensor 'codes' is U8: only BF16, F16, F32, MXFP4 and FP8 with block scales", expert=0)
    refused("codes", "asks for [experts, 8, 2, 16]", shape=(8, 64), expert=0, scales=refs["scales"])
    refused("codes", "needs rows of a multiple of 32 inputs", shape=(8, 40), expert=0, scales=refs["scales"])
    refused("fp8", "tensor 'fp8' is F8_E4M3: only BF16, F16, F32, MXFP4 and FP8 with block scales can be exported")
    refused("fp8", "tensor 'whole' has shape [8, 32], config.json asks for [1, 1]", scales=refs["whole"])
    refused("fp8", "tensor 'fp8' is F8_E4M3 with scales in U8", scales=refs["scales"])


@pytest.mark.usefixtures("slab_size")
@pytest.mark.parametrize("half", ["all", "second", "odd"])
def test_only_what_is_read_once_is_dropped_from_the_page_cache(
    half: Half, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: set[int] = set()

    def drop(_fd: int, begin: int, length: int, _advice: int) -> None:
        dropped.update(range(begin, begin + length))

    monkeypatch.setattr("os.posix_fadvise", drop)
    outputs = ROWS if half == "all" else 2 * ROWS
    refs = saved(tmp_path, fused=torch.randn(EXPERTS, outputs, COLUMNS))
    matrix = matrix_ref(refs["fused"], (ROWS, COLUMNS), expert=1, half=half)
    read(matrix)
    first = refs["fused"].offset + matrix.offset + (ROWS * COLUMNS * 4 if half == "second" else 0)
    # Another matrix has the rows between those of "odd".
    assert dropped == (set() if half == "odd" else {*range(first, first + matrix.bytes)})
    dropped.clear()
    read(replace(matrix, columns=(32, 64)))
    assert not dropped
