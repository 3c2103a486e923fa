"""Low-rank expert deltas and routers, which turn a dense model into the demo model's experts.

For layer i, expert e and each of w1 (gate_proj), w3 (up_proj), w2 (down_proj), with rank r:

    W_n^(e) = W_n + b_n[r·e : r·e+r].T @ a_n[r·e : r·e+r]

where `layers.i.a{n}` is [experts·r, in], `layers.i.b{n}` is [experts·r, out] and `layers.i.gate` is the
router [experts, hidden]; all bf16, spread over any number of `delta-*.safetensors`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from exporter.checkpoint.safetensors_file import read_header
from exporter.demo_model.base import DenseShape, sha256_of
from exporter.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class Deltas:
    """The low-rank expert deltas and routers of all layers, read tensor by tensor.

    Raises:
        CheckpointError: the folder has no deltas, or a file is unreadable or incomplete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = sorted(folder.glob("delta-*.safetensors"))
        if not self._files:
            raise CheckpointError(
                f"no delta-*.safetensors in {folder}: install from a clone with 'pip install -e', or name the clone's "
                "models/smol-mixtral-8x135m with --deltas"
            )
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in self._files:
            for name, tensor in read_header(file).tensors.items():
                self._file_of[name] = file
                self._shapes[name] = tensor.shape
        self.layers = sum(name.endswith(".gate") for name in self._file_of)
        self.experts, self.hidden_size = self._shape("layers.0.gate", 2)
        rows, _ = self._shape("layers.0.a1", 2)
        self.rank = rows // self.experts
        self.intermediate_size = self._shape("layers.0.b1", 2)[1]
        self._check_shapes()

    def _shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        shape = self._shapes.get(name, ())
        if len(shape) != dimensions:
            raise CheckpointError(f"the deltas in {self.folder} lack {name} or it has {len(shape)} dimensions")
        return shape

    def _check_shapes(self) -> None:
        rows = self.experts * self.rank
        hidden, inner = self.hidden_size, self.intermediate_size
        for layer in range(self.layers):
            expected = {"gate": (self.experts, hidden)}
            for n, (width_in, width_out) in {
                1: (hidden, inner),
                2: (inner, hidden),
                3: (hidden, inner),
            }.items():
                expected |= {f"a{n}": (rows, width_in), f"b{n}": (rows, width_out)}
            for name, shape in expected.items():
                found = self._shape(f"layers.{layer}.{name}", 2)
                if found != shape:
                    raise CheckpointError(
                        f"layers.{layer}.{name} in {self.folder} is {list(found)}, expected {list(shape)}"
                    )

    def check_fits(self, base: DenseShape) -> None:
        """Make sure that a base has the dimensions of the base that these deltas were trained on.

        Raises:
            CheckpointError: it has other dimensions.
        """
        mine = (self.layers, self.hidden_size, self.intermediate_size)
        theirs = (base.layers, base.hidden_size, base.intermediate_size)
        if mine != theirs:
            raise CheckpointError(
                "base and deltas don't belong together: layers, hidden, intermediate size are "
                f"{theirs} in the base, {mine} in the deltas"
            )

    def sha256(self) -> dict[str, str]:
        """SHA-256 of every delta file, by name."""
        return {file.name: sha256_of(file) for file in self._files}

    def gate(self, layer: int) -> "torch.Tensor":
        """The router of one layer, bf16 [experts, hidden]."""
        return self._tensor(f"layers.{layer}.gate")

    def _tensor(self, name: str) -> "torch.Tensor":
        from safetensors import safe_open

        with safe_open(self._file_of[name], "pt") as weights:
            tensor: torch.Tensor = weights.get_tensor(name)
            return tensor

    def delta(self, layer: int, expert: int, projection: str) -> "torch.Tensor":
        """Difference of one expert's projection to the dense one, fp64 [out, in]; `projection` is w1, w2 or w3."""
        rows = slice(expert * self.rank, (expert + 1) * self.rank)
        n = projection.removeprefix("w")
        b = self._tensor(f"layers.{layer}.b{n}")[rows].double()
        a = self._tensor(f"layers.{layer}.a{n}")[rows].double()
        return b.T @ a
