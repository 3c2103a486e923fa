"""Options of other servers that requests may send although they are not implemented, as long as they ask for nothing.
Pure."""

from collections.abc import Mapping
from typing import Any

WITHOUT_EFFECT = frozenset(
    {
        "cache_prompt",
        "include_reasoning",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Options that never change an answer."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "audio": ({},),
    "bad_words": ([],),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "extra_body": ({},),
    "frequency_penalty": (0,),
    "grammar": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": ({},),
    "guided_regex": ("",),
    "id_slot": (-1,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "n_probs": (0,),
    "presence_penalty": (0,),
    "priority": (0,),
    "reasoning": ({}, {"effort": "none"}),
    "reasoning_effort": ("none",),
    "repeat_penalty": (1,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "stop_sequences": ([],),
    "suffix": ("",),
    "tfs_z": (1,),
    "thinking": ({"type": "disabled"},),
    "top_a": (0,),
    "top_k": (0, -1),
    "typ_p": (1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "xtc_probability": (0,),
}
"""Options of OpenAI, vLLM and llama.cpp that are not implemented, with the values that ask for nothing."""

NO_TOOLS: dict[str, tuple[object, ...]] = {
    "function_call": ("none", "auto"), "functions": ([],), "tool_choice": ("none", "auto"), "tools": ([],),
}  # fmt: skip
"""Options of chats about tools, which completions don't have, with the values that ask for nothing."""


def asks_for_no_bias(bias: object) -> bool:
    """Whether a request's `logit_bias` changes no logit."""
    return isinstance(bias, dict) and all(value == 0 for value in bias.values())


def drop_neutral(fields: dict[str, Any], neutral: Mapping[str, tuple[object, ...]]) -> None:
    """Remove the options of a request that are not implemented.

    Args:
        neutral: these, with the values that ask for nothing.

    Raises:
        ValueError: one of them asks for something.
    """
    for name in neutral.keys() & fields.keys():
        if not _is_one_of(fields.pop(name), neutral[name]):
            raise ValueError(f"`{name}` is not implemented: leave it out")


def _is_one_of(value: object, neutral: tuple[object, ...]) -> bool:
    # To Python 0 is False, but `logprobs: 0` asks for something.
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)
