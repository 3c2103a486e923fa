"""The kernels of the trunk's graphs in Triton's interpreter against eager modules: needs Triton, but no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.bs_coordinator import test_trunk, test_trunk_qwen3_moe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
SIZES = {
    "vocab_size": 64, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "quantisation"), [("mixtral", "none"), ("mixtral", "int8"), ("mixtral", "int4"), ("qwen3_moe", "none")]
)
def test_graphs_of_one_and_several_tokens_are_the_eager_steps(tmp_path: Path, family: str, quantisation: str) -> None:
    """Single tokens, drafts, and tokens of two sequences, repeated up to the rows that a graph takes; in fp32."""
    (test_trunk if family == "mixtral" else test_trunk_qwen3_moe)._checkpoint(tmp_path, **SIZES)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.process.bs_coordinator.interpreted_kernels", str(tmp_path), quantisation],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    apart = json.loads(ran.stdout.splitlines()[-1])
    assert len(apart) == 12
    assert max(apart) < 1e-5
