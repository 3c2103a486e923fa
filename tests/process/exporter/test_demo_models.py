"""The second demo model as a whole: its checksum, and what it predicts."""

import hashlib
import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from testbed.demo_assets import demo_model

CHECKSUM = "dcf089399d1fd80d0f6290eea395e0f4b886d42bd5ea13da425328fae848a58f"
TEXT = [504, 3575, 282, 4649, 314]  # The capital of France is
# ids and logits of the five likeliest tokens, computed in float32 from the bf16 weights
AFTER_TEXT = [(7042, 14.297), (260, 13.681), (216, 12.521), (1217, 12.267), (3807, 12.25)]
AFTER_CHAT = [(504, 29.871), (38634, 27.825), (7026, 27.524), (60, 27.393), (15319, 27.214)]


@pytest.mark.slow
def test_the_whole_qwen3_moe_has_its_checksum_and_logits() -> None:
    folder = demo_model(model="qwen3-moe")
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files: dict[str, Any] = {file: safe_open(folder / file, "pt") for file in set(names.values())}
    digest = hashlib.sha256()
    for name, file in sorted(names.items()):
        data = files[file].get_tensor(name).view(torch.int16).numpy()
        digest.update(name.encode() + b"\0" + data.tobytes())
    assert digest.hexdigest() == CHECKSUM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("The capital of France is").input_ids == TEXT
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    for ids, expected in ((TEXT, AFTER_TEXT), (chat, AFTER_CHAT)):
        with torch.inference_mode():
            top = model(torch.tensor([ids])).logits[0, -1].topk(5)
        assert top.indices.tolist() == [id for id, _ in expected]
        torch.testing.assert_close(top.values, torch.tensor([x for _, x in expected]), atol=2e-3, rtol=0)
