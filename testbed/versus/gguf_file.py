"""Whether a GGUF file has the same shape as a bundle's model: times of another model would say nothing."""

from pathlib import Path

from wire.manifest import Dims


def other_shape(path: Path, dims: Dims) -> str:
    """How the model of a GGUF file differs from the bundle's, such as `16 experts instead of 8`; empty if it does not.

    Args:
        path: of a file that `exporter.demo_model.gguf_header.check_fields` accepts.

    Raises:
        ValueError: the file is damaged.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    if "general.architecture" not in fields:
        raise ValueError("it does not say its architecture")
    family = fields["general.architecture"].contents()
    wanted = {
        "embedding_length": ("values per hidden state", dims.hidden),
        "expert_count": ("experts per layer", dims.experts),
        "expert_used_count": ("experts per token", dims.top_k),
    }
    for key, (what, value) in wanted.items():
        field = fields.get(f"{family}.{key}")
        found = field.contents() if field else 0
        if found != value:
            return f"{found} {what} instead of {value}"
    return ""
