"""What all demo models share: the tensors taken over from the dense base, and reading of trained differences."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from exporter.checkpoint.safetensors_file import read_header
from exporter.demo_model.base import Base, DenseShape, sha256_of
from exporter.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# Tensor name -> shape, in the order in which they are written.
Shapes = dict[str, tuple[int, ...]]


class Weights(Protocol):
    """A demo model's tensors by their names on disk, each computed on demand."""

    def groups(self) -> list[Shapes]:
        """Names and shapes of all tensors, in groups that stay together in one shard."""
        ...

    def tensor(self, name: str) -> "torch.Tensor":
        """One tensor: sums with trained differences in fp64, all others in the precision of their source."""
        ...

    def config(self) -> dict[str, Any]:
        """Content of config.json, without the ids of special tokens."""
        ...


class Deltas(Protocol):
    """Trained differences of a demo model from its dense base.

    Attributes:
        folder: where they are.
        layers: number of layers that they change.
    """

    folder: Path
    layers: int

    def sha256(self) -> dict[str, str]:
        """SHA-256 of every file that the model is made from, by name; without the base's."""
        ...

    def check_fits(self, base: DenseShape) -> None:
        """Make sure that a base has the dimensions of the base that these differences were trained on.

        Raises:
            CheckpointError: it has other dimensions.
        """
        ...

    def weights(self, base: Base, layers: int) -> Weights:
        """The demo model's first `layers` layers on this base."""
        ...


class DeltaFiles:
    """Tensors spread over safetensors files, read one by one.

    Raises:
        CheckpointError: a file is unreadable.
    """

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self._folder = folder
        self._files = files
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            for name, tensor in read_header(file).tensors.items():
                self._file_of[name] = file
                self._shapes[name] = tensor.shape
        self.layers = sum(name.endswith(".gate") for name in self._file_of)

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Shape of a tensor, which must have this many dimensions.

        Raises:
            CheckpointError: there is no such tensor, or it has another number of dimensions.
        """
        shape = self._shapes.get(name, ())
        if len(shape) != dimensions:
            raise CheckpointError(f"the deltas in {self._folder} lack {name} or it has {len(shape)} dimensions")
        return shape

    def check(self, expected: Shapes) -> None:
        """Check the shapes of tensors.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        for name, shape in expected.items():
            found = self.shape(name, len(shape))
            if found != shape:
                raise CheckpointError(f"{name} in {self._folder} is {list(found)}, expected {list(shape)}")

    def tensor(self, name: str) -> "torch.Tensor":
        """One tensor as it is stored."""
        from safetensors import safe_open

        with safe_open(self._file_of[name], "pt") as weights:
            tensor: torch.Tensor = weights.get_tensor(name)
            return tensor

    def sha256(self) -> dict[str, str]:
        """SHA-256 of every file, by name."""
        return {file.name: sha256_of(file) for file in self._files}


class DenseWeights:
    """A base's weights in fp64; keeps the last one, which the experts of a layer need in sequence."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._last: tuple[str, torch.Tensor] | None = None

    def weight(self, name: str) -> "torch.Tensor":
        """One weight by its Hugging Face Llama name, fp64; it must not be written to."""
        if self._last is None or self._last[0] != name:
            self._last = (name, self._base.tensor(name).double())
        return self._last[1]


class LayeredWeights(ABC):
    """The dense base's embeddings, norm and head around layers that a demo model defines."""

    def __init__(self, base: Base, layers: int) -> None:
        """Nothing is read yet.

        Args:
            base: dense model that the demo model is made from.
            layers: number of its first layers to keep.
        """
        self._base = base
        self._dense = DenseWeights(base)
        self._layers = layers

    def groups(self) -> list[Shapes]:
        """Names and shapes of all tensors, in groups that stay together in one shard."""
        shape = self._base.shape
        vocabulary = (shape.vocab_size, shape.hidden_size)
        tail: Shapes = {"model.norm.weight": (shape.hidden_size,)}
        if not shape.tied_embeddings:
            tail["lm_head.weight"] = vocabulary
        layers = [self._layer_group(f"model.layers.{layer}") for layer in range(self._layers)]
        return [{"model.embed_tokens.weight": vocabulary}, *layers, tail]

    @abstractmethod
    def _layer_group(self, prefix: str) -> Shapes:
        """Names and shapes of a layer's tensors, whose names begin with `prefix`."""


def check_dimensions(base: DenseShape, layers: int, hidden_size: int, intermediate_size: int) -> None:
    """Make sure that a base has the dimensions for which deltas were made.

    Raises:
        CheckpointError: it has others.
    """
    mine, theirs = (layers, hidden_size, intermediate_size), (base.layers, base.hidden_size, base.intermediate_size)
    if mine != theirs:
        raise CheckpointError(
            "base and deltas don't belong together: layers, hidden, intermediate size are "
            f"{theirs} in the base, {mine} in the deltas"
        )


def dense_layer(shape: DenseShape, prefix: str) -> Shapes:
    """The tensors of a layer that every demo model takes from the base: norms and attention."""
    hidden = shape.hidden_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.self_attn.q_proj.weight": (queries, hidden),
        f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
        f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }
