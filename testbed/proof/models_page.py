"""docs/models.md: the families of models that run, with what is known of an example of each."""

from typing import NamedTuple

from bs_coordinator.trunk.llama import why_not_llama
from exporter.checkpoint.families import FAMILIES
from exporter.expert.graph import plan_layout
from wire.manifest import Dims, ExpertGraph, Quantisation

_INT4 = Quantisation(scheme="int4", block=32)


class Shape(NamedTuple):
    """Dimensions of a family's example, as its authors publish them.

    Attributes:
        layers: that have experts.
        experts: routed experts of a layer.
        top_k: experts per token.
        hidden, inner: size of an expert's input and of its inner layer.
    """

    layers: int
    experts: int
    top_k: int
    hidden: int
    inner: int


SHAPES = {
    "deepseek_v2": Shape(26, 64, 6, 2048, 1408),
    "deepseek_v3": Shape(26, 64, 6, 2048, 1408),
    "dots1": Shape(61, 128, 6, 4096, 1408),
    "ernie4_5_moe": Shape(27, 64, 6, 2560, 1536),
    "flex_olmo": Shape(32, 7, 5, 4096, 11008),
    "glm4_moe": Shape(45, 128, 8, 4096, 1408),
    "glm4_moe_lite": Shape(46, 64, 4, 2048, 1536),
    "gpt_oss": Shape(24, 32, 4, 2880, 2880),
    "granitemoe": Shape(24, 32, 8, 1024, 512),
    "granitemoehybrid": Shape(40, 64, 6, 1536, 512),
    "hunyuan_v1_moe": Shape(32, 64, 8, 4096, 3072),
    "jamba": Shape(16, 16, 2, 4096, 14336),
    "lfm2_moe": Shape(22, 32, 4, 2048, 1792),
    "minimax_m2": Shape(62, 256, 8, 3072, 1536),
    "mixtral": Shape(32, 8, 2, 4096, 14336),
    "olmoe": Shape(16, 64, 8, 2048, 1024),
    "phimoe": Shape(32, 16, 2, 4096, 6400),
    "qwen2_moe": Shape(24, 60, 4, 2048, 1408),
    "qwen3_moe": Shape(48, 128, 8, 2048, 768),
    "qwen3_next": Shape(48, 512, 10, 2048, 512),
    "solar_open": Shape(48, 128, 8, 4096, 1280),
}
"""By family; without those whose example's numbers we could not confirm."""

UNSCORED = frozenset(kind for kind, family in FAMILIES.items() if family.score == "unknown")
"""Families whose routers follow no rule that policies other than topk could use."""
UNTRUNCATED = frozenset({"granitemoehybrid", "jamba", "lfm2_moe", "qwen3_next"})
"""Families whose caches hold a state that can't be taken back."""
THROUGH_A_BROKER = ("deepseek_v3", "gpt_oss", "qwen3_moe")
"""Families that are tested through a broker and node processes too."""
_TRAINED = frozenset({"mixtral", "qwen3_moe"})

_HEAD = """# Models

The base station runs any mixture of experts below: the trunk (embeddings, attention, norms, routers, shared experts,
head) by itself, the routed experts on nodes. `wdmoe-export bundle` accepts a folder or the id of a checkpoint on the
Hugging Face hub. Other architectures are refused with the list of those that work; CONTRIBUTING.md says how to add one.

**Which code runs the trunk.** *Own blocks* are this project's: on a CPU, tokens are independent of what is computed
with them, and on a GPU few tokens run as captured graphs. *transformers* is the model's own code, stopped at each
layer with experts: any attention, convolution or state-space layer that transformers has works. `wdmoe-bs` logs which
one it took and why. A Qwen3-MoE some of whose layers have no experts runs as transformers' model.

**Limits.** Where *drafts* says no, the cache holds a state that can't be taken back: there are no drafts, and a chat's
next turn computes the conversation again. Where *policies* says topk, the router follows no rule that gives every
expert a weight ([Policies](policies.md)), so only the model's own choice is possible.

**Size.** MB per expert are for int4 with blocks of 32. A token waits for one round trip per layer with experts, so
models with few such layers suit slow links best. The dimensions are those that the authors publish; the exporter reads
them from the checkpoint. Only the two demo models ([Results](results.md)) have been run with trained weights: the
examples' own weights have not been downloaded for a test.

"""
_TAIL = """
**How they are tested.** For each family, transformers writes a small random checkpoint. It is exported in fp32 and run
by two nodes and a base station: the logits at 64 positions differ from those of transformers' whole model by at most
1e-4 (relative norm), and 32 greedy tokens are the same. *nodes* means nodes in threads, without a network; *broker*
that it was also done with a broker and node processes; *trained* that a trained model of the family is a demo model.
`pytest tests/process/testbed/test_families.py` runs all of it.

Read straight from the checkpoint, streaming: one tensor per expert, tensors that hold all experts of a layer (in both
orientations, gate and up one after the other or alternating), gpt-oss's MXFP4 blocks, and FP8 with block scales as
DeepSeek publishes it. GPTQ, AWQ, bitsandbytes and GGUF are refused: use the original checkpoint.
"""


def models_markdown() -> str:
    """The page."""
    titles = {
        "family (`model_type`)": "---",
        "example": "---",
        "layers × experts, top-k": "---",
        "d × inner": "---",
        "MB per expert": "---:",
        "round trips per token": "---:",
        "trunk": "---",
        "drafts": "---",
        "policies": "---",
        "tested": "---",
    }
    lines = [f"| {' | '.join(titles)} |", f"|{'|'.join(titles.values())}|", *(_row(kind) for kind in FAMILIES)]
    return _HEAD + "\n".join(lines) + "\n" + _TAIL


def _row(kind: str) -> str:
    family, shape = FAMILIES[kind], SHAPES.get(kind)
    numbers = [""] * 4
    if shape is not None:
        layers, experts, top_k, hidden, inner = shape
        dims = Dims(
            hidden=hidden, intermediate=inner, layers=layers, experts=experts, top_k=top_k, vocab=1, max_positions=1
        )
        graph = ExpertGraph(biases=kind == "gpt_oss")
        megabytes = plan_layout(dims, _INT4, graph).bytes / 1e6
        numbers = [f"{layers} × {experts}, {top_k}", f"{hidden} × {inner}", f"{megabytes:.1f}", str(layers)]
    tests = ["nodes", *(["broker"] if kind in THROUGH_A_BROKER else []), *(["trained"] if kind in _TRAINED else [])]
    cells = [
        f"{family.name} (`{kind}`)",
        f"`{family.example}`",
        *numbers,
        "transformers" if why_not_llama({"model_type": kind}) else "own blocks",
        "no" if kind in UNTRUNCATED else "yes",
        "topk" if kind in UNSCORED else "all",
        ", ".join(tests),
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print(models_markdown(), end="")  # docs/models.md
