"""From a policy's name and options to the policy."""

from typing import Any

import msgspec

from bs_coordinator.selection.policy import Policy
from bs_coordinator.selection.topk import TopK

_KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {"topk": (TopK, {}), "top1": (TopK, {"k": 1})}
"""By name: the class, and what the name alone sets."""
POLICY_NAMES = tuple(_KINDS)


def parse_policy(text: str, *, top_k: int) -> Policy:
    """The policy that `text` describes, for example `topk` or `topk:k=3`.

    Args:
        top_k: experts per token of the model, where the policy has that option and `text` does not set it.

    Raises:
        ValueError: unknown name or option, or a value that is out of range.
    """
    name, _, options = text.partition(":")
    if name not in _KINDS:
        raise ValueError(f"policy '{name}' is unknown: choose from {', '.join(POLICY_NAMES)}")
    kind, preset = _KINDS[name]
    fields = {field.name for field in msgspec.structs.fields(kind)}
    values: dict[str, Any] = ({"k": top_k} if "k" in fields else {}) | preset
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if key not in fields or not equals:
            raise ValueError(f"policy '{name}' has no option '{option}': it knows {', '.join(sorted(fields))}=…")
        values[key] = value
    try:
        policy: Policy = msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"policy '{text}': {error}") from None
    return policy
