"""The families of mixture-of-experts models that can be cut, by `model_type` in config.json.

A row says only what neither config.json nor transformers' model gives: which layers have experts, their dimensions,
their activation and what belongs to the trunk follow from the model itself (`exporter.checkpoint.survey`).
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from exporter.errors import CheckpointError


class Family(NamedTuple):
    """A family of models.

    Attributes:
        name: as its authors write it.
        example: id of a checkpoint on the Hugging Face hub.
        score: function of the router's logits from which the weights of experts are taken.
        renormalised: whether the weights of a token's experts are divided by their sum; None where config.json says it.
    """

    name: str
    example: str
    score: Literal["softmax", "sigmoid", "unknown"] = "softmax"
    renormalised: bool | None = None


FAMILIES = {
    "afmoe": Family("AFMoE (Trinity)", "arcee-ai/Trinity-Mini", "sigmoid", renormalised=True),
    "deepseek_v2": Family("DeepSeek-V2", "deepseek-ai/DeepSeek-V2-Lite", renormalised=False),
    "deepseek_v3": Family("DeepSeek-V3", "moonshotai/Moonlight-16B-A3B", "sigmoid"),
    "dots1": Family("dots.llm1", "rednote-hilab/dots.llm1.inst", "sigmoid"),
    "ernie4_5_moe": Family("ERNIE 4.5", "baidu/ERNIE-4.5-21B-A3B-PT", renormalised=True),
    "flex_olmo": Family("FlexOlmo", "allenai/FlexOlmo-7x7B-1T"),
    "glm4_moe": Family("GLM-4.5", "zai-org/GLM-4.5-Air", "sigmoid"),
    "glm4_moe_lite": Family("GLM-4.7-Flash", "zai-org/GLM-4.7-Flash", "sigmoid"),
    "gpt_oss": Family("gpt-oss", "openai/gpt-oss-20b", renormalised=True),
    "granitemoe": Family("Granite 3 MoE", "ibm-granite/granite-3.1-1b-a400m-instruct", renormalised=True),
    "granitemoehybrid": Family("Granite 4", "ibm-granite/granite-4.0-h-tiny", renormalised=True),
    "granitemoeshared": Family("Granite MoE shared", "ibm-research/moe-7b-1b-active-shared-experts", renormalised=True),
    "hunyuan_v1_moe": Family("Hunyuan V1", "tencent/Hunyuan-A13B-Instruct", renormalised=True),
    "jamba": Family("Jamba", "ai21labs/AI21-Jamba-Mini-1.7", renormalised=False),
    "lfm2_moe": Family("LFM2 MoE", "LiquidAI/LFM2-8B-A1B", "sigmoid"),
    "minimax_m2": Family("MiniMax-M2", "MiniMaxAI/MiniMax-M2", "sigmoid", renormalised=True),
    "mixtral": Family("Mixtral", "mistralai/Mixtral-8x7B-Instruct-v0.1", renormalised=True),
    "olmoe": Family("OLMoE", "allenai/OLMoE-1B-7B-0924-Instruct"),
    "phimoe": Family("Phi-3.5 MoE", "microsoft/Phi-3.5-MoE-instruct", "unknown", renormalised=False),
    "qwen2_moe": Family("Qwen2 MoE", "Qwen/Qwen1.5-MoE-A2.7B-Chat"),
    "qwen3_moe": Family("Qwen3 MoE", "Qwen/Qwen3-30B-A3B"),
    "qwen3_next": Family("Qwen3-Next", "Qwen/Qwen3-Next-80B-A3B-Instruct"),
    "solar_open": Family("Solar Open", "upstage/Solar-Open-100B", "sigmoid"),
}


def model_family(folder: Path, config: dict[str, Any]) -> str:
    """The `model_type` of a checkpoint, which `FAMILIES` has.

    Args:
        folder: of the checkpoint, for the message.
        config: content of config.json.

    Raises:
        CheckpointError: the model is of none of the families.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        named = config.get("architectures")
        architecture = named[0] if isinstance(named, list) and named else "model"
        raise CheckpointError(
            f"{folder} holds a {str(architecture)[:80]} (model_type {str(kind)[:80]!r}), which can't be cut into "
            f"experts; these can: {', '.join(FAMILIES)}"
        )
    return kind
