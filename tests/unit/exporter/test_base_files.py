"""Files of a base model that are damaged or made to harm: one line, no memory or time spent on what they claim."""

import json
import struct
from pathlib import Path

import pytest

from exporter.demo_model.base import open_base
from exporter.errors import CheckpointError

U8, U32, F32, STRING, ARRAY = 0, 4, 6, 8, 9
SIZES = {
    "attention.head_count": 2, "embedding_length": 8, "vocab_size": 4, "feed_forward_length": 8, "block_count": 1,
    "attention.head_count_kv": 1, "context_length": 8,
}  # fmt: skip


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _field(name: str, kind: int, value: bytes) -> bytes:
    return _text(name.encode()) + struct.pack("<I", kind) + value


def _fields(**changed: int) -> list[bytes]:
    sizes = {**SIZES, **changed}
    return [
        _field("general.architecture", STRING, _text(b"llama")),
        *(_field(f"llama.{name}", U32, struct.pack("<I", value)) for name, value in sizes.items()),
        _field("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5)),
        _field("llama.rope.freq_base", F32, struct.pack("<f", 1e4)),
    ]


def _gguf(fields: list[bytes], tensors: list[bytes] | None = None, claimed: int | None = None) -> bytes:
    tensors = tensors or []
    head = struct.pack("<IQQ", 3, len(tensors), len(fields) if claimed is None else claimed)
    return b"GGUF" + head + b"".join(fields) + b"".join(tensors)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends inside its header"),
        (b"version https://git-lfs.github.com/spec/v1\n", "does not begin with GGUF"),
        (_gguf(_fields(), claimed=2**60), "0 tensors and 1152921504606846976 fields"),
        (_gguf([_field("x", ARRAY, struct.pack("<IQ", U8, 2**40))]), "an array of 1099511627776 values"),
        (_gguf([_field("x", ARRAY, struct.pack("<IQ", U8, 2**20))]), "1048576 bytes goes past its end"),
        (_gguf([_field("x", ARRAY, struct.pack("<IQ", ARRAY, 1) * 2000)]), "an array of arrays"),
        (_gguf([_field("x", STRING, struct.pack("<Q", 2**62))]), "goes past its end"),
        (_gguf([_field("x", 99, b"1234")]), "unknown type 99"),
        (_gguf([_field("general.architecture", STRING, _text(b"\xff\xfe")), *_fields()[1:]]), "is not text"),
        (_gguf([_field("general.architecture", STRING, _text(b"gpt2")), *_fields()[1:]]), "must be a dense llama"),
        (_gguf(_fields(**{"attention.head_count": 0})), "impossible llama.attention.head_count: 0"),
        (_gguf(_fields(block_count=2**32 - 1)), "impossible llama.block_count"),
        (_gguf([*_fields()[:2], *_fields()[3:]]), "lacks the field llama.embedding_length"),
        (
            _gguf(_fields(), [_text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0)]),
            "cannot reshape",
        ),
    ],
)
def test_what_a_gguf_file_claims_is_checked(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as raised:
        open_base(path)
    assert "\n" not in str(raised.value)


def test_fields_of_all_kinds_are_walked_through(tmp_path: Path) -> None:
    more = [
        _field("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 2) + _text(b"a") + _text(b"")),
        _field("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ2f", F32, 2, 0, 1)),
        _field("flag", 7, b"\x01"),
    ]
    path = tmp_path / "x.gguf"
    path.write_bytes(_gguf([*_fields(), *more]))
    assert open_base(path).shape.head_dim == 4


CONFIG = {
    "model_type": "llama", "vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ({"rms_norm_eps": float("inf")}, "not a finite number"),
        ({"num_attention_heads": 0}, "division"),
        ({"num_attention_heads": "2"}, "another type"),
        ({"rope_parameters": [1]}, "another type"),
        ({"rope_scaling": "linear"}, "another type"),
        ({"rope_theta": "x"}, "another type"),
        ({"hidden_size": 2**70}, "impossible hidden_size"),
        ({"num_hidden_layers": -1}, "impossible layers"),
        ({"vocab_size": True}, "impossible vocab_size"),
    ],
)
def test_what_a_config_claims_is_checked(tmp_path: Path, config: bytes | dict[str, object], reason: str) -> None:
    data = config if isinstance(config, bytes) else json.dumps({**CONFIG, **config}).encode()
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as raised:
        open_base(tmp_path)
    assert "\n" not in str(raised.value)
