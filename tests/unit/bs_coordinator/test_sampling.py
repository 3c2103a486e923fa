"""From logits to text: sampling temperatures that underflow, and bytes that form no character."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.sampling import TokenSampler
from bs_coordinator.engine.tokenizer import TextStream


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-9, 1e-3])
def test_temperatures_that_underflow_take_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([[-300.0, 200.0, 300.0, 299.0]])
    sampler = TokenSampler(SamplingConfig(temperature=temperature, top_p=0.9, seed=1))
    assert [sampler.choose(logits) for _ in range(20)] == [2] * 20


_BYTES = {f"<0x{value:02X}>": i for i, value in enumerate((0xC3, 0xA9, 0xE2, 0x82, 0xAC))}
_IDS = {**_BYTES, "x": 5, "▁y": 6}


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("<0xC3> <0xA9> x ▁y", "éx y"),
        ("x <0xE2> <0x82> <0xAC> ▁y", "x€ y"),
        ("<0xC3> <0xA9> <0xC3> x ▁y", "é�x y"),
        ("<0xC3> <0xA9> <0xC3> ▁y <0xC3> <0xA9>", "é� yé"),
        ("x <0xC3> <0xC3> <0xA9> x <0xE2> <0x82> ▁y x", "x"),
    ],
)
def test_incomplete_characters_are_replaced(tokens: str, text: str) -> None:
    """Mixtral's tokenizer falls back to bytes; a sampled answer may hold any sequence of them."""
    tokenizer = Tokenizer(models.WordLevel(_IDS, unk_token="x"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    stream = TextStream(tokenizer)
    found = "".join(stream.push(_IDS[token]) for token in tokens.split())
    assert found.startswith(text)
    assert found.endswith(("y", "x", "é"))
