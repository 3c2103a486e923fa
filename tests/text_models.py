"""Tokenizers of two kinds, and models whose greedy answer is written down beforehand.

Byte-level (GPT-2, SmolLM): pieces keep their space as `Ġ`, nothing is added to a text. SentencePiece (Llama,
Mixtral): a text gets BOS and a leading `▁`, characters without a piece fall back to bytes, and decoding drops the
first space.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

Kind = Literal["byte-level", "sentencepiece"]
KINDS: tuple[Kind, ...] = ("byte-level", "sentencepiece")
SPECIAL = ("<unk>", "<s>", "</s>", "<|turn|>", "<|done|>")
WORDS = ("The", "capital", "city", "is", "Rome", "Oslo", "user", "assistant")
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|done|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path, kind: Kind, *, words: Sequence[str] = WORDS, **config: object) -> dict[str, int]:
    """Save a small tokenizer with a chat template, as transformers reads it.

    Args:
        folder: is made if missing.
        kind: of the tokenizer.
        words: become one piece each when a space precedes them.
        config: changes `tokenizer_config.json`.

    Returns:
        Ids by token.
    """
    space = "Ġ" if kind == "byte-level" else "▁"
    vocabulary = {name: id for id, name in enumerate(SPECIAL)}
    letters = (
        sorted(pre_tokenizers.ByteLevel.alphabet())
        if kind == "byte-level"
        else [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127))]
    )
    for letter in letters:
        vocabulary.setdefault(letter, len(vocabulary))
    merges = []
    for word in words:
        piece = space
        for letter in word:
            if piece + letter not in vocabulary:
                vocabulary[piece + letter] = len(vocabulary)
                merges.append((piece, letter))
            piece += letter
    byte_fallback = kind == "sentencepiece"
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=byte_fallback))
    if kind == "byte-level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", vocabulary["<s>"])])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return vocabulary


def save_scripted_model(folder: Path, kind: Kind, *scripts: Sequence[str], **config: object) -> dict[str, int]:
    """Save a Mixtral checkpoint whose next token depends on the last one only, and its tokenizer.

    Args:
        folder: is made if missing.
        kind: of the tokenizer.
        scripts: tokens, each of which is followed by the next of its script.
        config: changes the model's configuration.

    Returns:
        Ids by token.
    """
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    ids = save_tokenizer(folder, kind)
    size = len(ids)
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": size + size % 2, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4,
        "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": size,
        "max_position_embeddings": 128, "head_dim": 8, "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"],
    }  # fmt: skip
    model = MixtralForCausalLM(MixtralConfig(**settings | config))
    with torch.no_grad():
        # The hidden state stays the token's own: attention and experts add nothing to it that matters.
        model.model.embed_tokens.weight.copy_(torch.eye(size, size + size % 2))
        model.lm_head.weight.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        for script in scripts:
            for last, following in itertools.pairwise(script):
                model.lm_head.weight[ids[following], ids[last]] = 1.0
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return ids
