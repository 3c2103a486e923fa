"""GGUF files that name a model's shape and hold no weights."""

from pathlib import Path

import gguf


def write_gguf(path: Path, *, hidden: int, experts: int, top_k: int) -> None:
    """Write a file of this shape."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(hidden)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(top_k)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
