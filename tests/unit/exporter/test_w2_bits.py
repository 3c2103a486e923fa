"""int4 experts whose last matrix keeps 8 bits: its codes are those of int8, the others those of int4."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from exporter.bundle.bundle import export_bundle
from exporter.calibration.text import read_text
from exporter.checkpoint.checkpoint import open_checkpoint
from exporter.expert.activations import silu
from exporter.expert.expert import ExpertJob, expert_paths, export_expert
from exporter.expert.graph import matrix_shape, plan_layout
from exporter.expert.probe import check_probe, relative_error, run_rows
from tests.checkpoints import HIDDEN
from tests.unit.exporter.test_calibration import write_words
from wire.experts import ExpertId
from wire.manifest import Dims, ExpertEntry, Manifest, Quantisation
from wire.probe import probe_input
from wire.tensors import Array

ID = ExpertId(1, 2)


def mixed(block: int = 32, *, symmetric: bool = False) -> Quantisation:
    return Quantisation(scheme="int4", block=block, symmetric=symmetric, w2_bits=8)


def parts_of(folder: Path, dims: Dims, quantisation: Quantisation, matrix: str) -> list[bytes]:
    """The stored tensors of a matrix."""
    stored = (folder / expert_paths(ID)[1]).read_bytes()
    placed = plan_layout(dims, quantisation).parts[matrix]
    return [stored[p.offset : p.offset + p.part.bytes] for p in placed]


def values_of(parts: list[bytes], shape: tuple[int, int], bits: int, block: int) -> Array:
    """(code - zero point) x scale, one weight after the other, after MatMulNBits' documentation."""
    (rows, columns), blocks = shape, -(-shape[1] // block)
    weight, scales = parts[0], np.frombuffer(parts[1], "<f4").reshape(rows, blocks)
    row_bytes, zero_bytes = blocks * block * bits // 8, -(-blocks * bits // 8)

    def code(data: bytes, start: int, place: int) -> int:
        return data[start + place] if bits == 8 else data[start + place // 2] >> 4 * (place % 2) & 15

    values = np.empty(shape, np.float32)
    for row in range(rows):
        for column in range(columns):
            at = column // block
            zero = code(parts[2], row * zero_bytes, at) if len(parts) > 2 else 2 ** (bits - 1)
            values[row, column] = (code(weight, row * row_bytes, column) - zero) * scales[row, at]
    return values


@pytest.mark.parametrize(("block", "symmetric"), [(32, False), (32, True), (128, False)])
def test_codes_are_those_of_both_schemes_and_outputs_those_of_the_codes(
    block: int, symmetric: bool, mixtral: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_checkpoint(mixtral())
    dims, quantisation = source.dims, mixed(block, symmetric=symmetric)
    int4 = msgspec.structs.replace(quantisation, w2_bits=msgspec.UNSET)
    int8 = msgspec.structs.replace(int4, scheme="int8")

    def export(name: str, quantisation: Quantisation) -> ExpertEntry:
        return export_expert(ExpertJob(ID, source.experts[ID], dims, quantisation, tmp_path / name))

    entry, coarse = export("mixed", quantisation), export("int4", int4)
    export("int8", int8)
    for matrix, name, plain in (("w1", "int4", int4), ("w3", "int4", int4), ("w2", "int8", int8)):
        ours = parts_of(tmp_path / "mixed", dims, quantisation, matrix)
        assert ours == parts_of(tmp_path / name, dims, plain, matrix)
    assert entry.error < coarse.error
    assert check_probe(tmp_path / "mixed", entry, HIDDEN, 1e-3) < 1e-3
    graph = tmp_path / "mixed" / entry.files[0].path
    onnx.checker.check_model(str(graph))

    def product(x: Array, matrix: str) -> Array:
        bits = 8 if matrix == "w2" else 4
        parts = parts_of(tmp_path / "mixed", dims, quantisation, matrix)
        return x @ values_of(parts, matrix_shape(dims, matrix), bits, block).T

    x = probe_input(HIDDEN, 4)
    wanted = product(silu(product(x, "w1")) * product(x, "w3"), "w2")
    # Activations are rounded to int8 per block, twice.
    assert relative_error(run_rows(graph, x), wanted) < 0.02


def test_a_calibrated_bundle_in_slices(mixtral: Callable[..., Path], tmp_path: Path) -> None:
    text = read_text(write_words(tmp_path / "text.jsonl", 1500))
    made = export_bundle(mixtral(), tmp_path / "bundle", mixed(), jobs=1, slices=3, calibrate=text).manifest
    assert str(made.quantisation) == "int4 b32 w2-int8 calibrated"
    again = msgspec.json.decode(msgspec.json.encode(made), type=Manifest)
    assert again.quantisation == made.quantisation
    for entry in (made.experts[0], made.experts[-1]):
        assert check_probe(tmp_path / "bundle", entry, HIDDEN, 1e-3) < 1e-3


def test_manifests_without_it_stay_as_they_were() -> None:
    assert b"w2_bits" not in msgspec.json.encode(Quantisation(scheme="int4", block=32))
    with pytest.raises(ValueError, match="w2_bits is for int4, not int8"):
        Quantisation(scheme="int8", block=32, w2_bits=8)
