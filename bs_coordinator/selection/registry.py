"""The policies by name, and how their options are read from text."""

from pathlib import Path
from typing import Any

import msgspec

from bs_coordinator.config import BaseStationConfig
from bs_coordinator.selection.bottleneck import Bottleneck
from bs_coordinator.selection.capacity import Capacity
from bs_coordinator.selection.differences import DifferenceTable, read_differences
from bs_coordinator.selection.policy import Policy
from bs_coordinator.selection.similar import Similar
from bs_coordinator.selection.subset import Subset
from bs_coordinator.selection.topk import TopK
from bs_coordinator.selection.wdmoe import Wdmoe
from common.config import ConfigError
from wire.manifest import Manifest

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


def parse_policy(text: str, *, top_k: int, model_sha256: str | None = None, files: bool = True) -> Policy:
    """The policy that `text` describes, for example `topk` or `topk:k=3`.

    Args:
        text: name and options.
        top_k: the model's experts per token, used as `k` unless `text` sets it.
        model_sha256: `Manifest.model_sha256` of the model, if known.
        files: whether options may name files of this machine; not if `text` comes from another one.

    Raises:
        ValueError: the name or an option is unknown, a value is out of range, or a table is of another model or may not
            be read.
    """
    name, _, options = text.partition(":")
    if "renormalise=" in options:
        raise ValueError(
            f"policy '{text}': renormalise=true is now survivors=total (the default), and renormalise=false is "
            "survivors=none"
        )
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
        policy: Policy = msgspec.convert(values, kind, strict=False, dec_hook=_from_text if files else _no_files)
    except msgspec.ValidationError as error:
        raise ValueError(f"policy '{text}': {error}") from None
    table: DifferenceTable | None = getattr(policy, "table", None) or getattr(policy, "keep", None)
    made_for = table.model_sha256 if table else None
    if model_sha256 is not None and made_for not in (None, model_sha256):
        raise ValueError(
            f"policy '{text}' is for another model (hash {str(made_for)[:12]}…, this is {model_sha256[:12]}…): "
            "measure its table again on this one"
        )
    return policy


def configured_policy(config: BaseStationConfig, manifest: Manifest) -> Policy:
    """The policy that a base station's config names, for the model of a manifest.

    Raises:
        ConfigError: as `policy_for_model`.
    """
    try:
        return policy_for_model(config.policy, manifest)
    except ValueError as error:
        raise ConfigError(f"--policy: {error}") from None


def policy_for_model(text: str, manifest: Manifest) -> Policy:
    """The policy that `text` describes, for the model of a manifest.

    Raises:
        ValueError: as `parse_policy`, or the policy needs scores, and models of this family are known to have none.
    """
    policy = parse_policy(text, top_k=manifest.dims.top_k, model_sha256=manifest.model_sha256)
    if manifest.architecture.routing.score == "unknown":
        check_scores(text, policy, top_k=manifest.dims.top_k)
    return policy


def check_scores(text: str, policy: Policy, *, top_k: int) -> None:
    """Check that a policy can work without scores of all experts, as a model has whose router's rule is not known.

    Args:
        text: of which `parse_policy` made the policy.
        top_k: the model's experts per token.

    Raises:
        ValueError: the policy chooses experts that the model did not.
    """
    if not isinstance(policy, TopK) or policy.k > top_k:
        raise ValueError(
            f"policy '{text}' compares all experts by score, but how this model scores them is not known: "
            f"use topk, or topk:k=… up to {top_k}"
        )


def _no_files(kind: type[Any], value: str) -> Any:
    raise ValueError("a table is a file, which only --policy may name")


def _from_text(kind: type[Any], value: str) -> Any:
    if kind is DifferenceTable:
        return read_differences(Path(value))
    raise NotImplementedError(kind)
