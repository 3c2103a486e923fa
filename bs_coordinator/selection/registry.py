"""The policies by name, and how their options are read from text."""

from pathlib import Path
from typing import Any

import msgspec

from bs_coordinator.selection.bottleneck import Bottleneck
from bs_coordinator.selection.capacity import Capacity
from bs_coordinator.selection.differences import DifferenceTable, read_differences
from bs_coordinator.selection.policy import Policy
from bs_coordinator.selection.similar import Similar
from bs_coordinator.selection.subset import Subset
from bs_coordinator.selection.topk import TopK
from bs_coordinator.selection.wdmoe import Wdmoe

_KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "topk": (TopK, {}),
    "top1": (TopK, {"k": 1}),
    "wdmoe": (Wdmoe, {}),
    "bottleneck": (Bottleneck, {}),
    "capacity": (Capacity, {}),
    "subset": (Subset, {}),
    "similar": (Similar, {}),
}
"""For each name the class, and the options that the name implies."""
POLICY_NAMES = tuple(_KINDS)


def parse_policy(text: str, *, top_k: int, model_sha256: str | None = None) -> Policy:
    """The policy that `text` describes, for example `topk` or `topk:k=3`.

    Args:
        text: name and options.
        top_k: the model's experts per token, used as `k` unless `text` sets it.
        model_sha256: `Manifest.model_sha256` of the model, if known.

    Raises:
        ValueError: the name or an option is unknown, a value is out of range, or a table is of another model.
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
        policy: Policy = msgspec.convert(values, kind, strict=False, dec_hook=_from_text)
    except msgspec.ValidationError as error:
        raise ValueError(f"policy '{text}': {error}") from None
    made_for = getattr(policy, "model_sha256", None)
    if model_sha256 is not None and made_for not in (None, model_sha256):
        raise ValueError(
            f"policy '{text}' is for another model (hash {str(made_for)[:12]}…, this is {model_sha256[:12]}…): "
            "measure its table again on this one"
        )
    return policy


def _from_text(kind: type[Any], value: str) -> Any:
    if kind is DifferenceTable:
        return read_differences(Path(value))
    raise NotImplementedError(kind)
