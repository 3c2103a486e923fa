"""What transformers' model of a checkpoint says: layers with experts, dimensions, activation, tensors of the trunk.

The model is built without weights (on torch's meta device), from the checkpoint's own config.json, in a process with
limits.
"""

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from exporter.checkpoint.families import FAMILIES
from exporter.checkpoint.limited_process import RefusedError, Report, reason, run_limited
from exporter.checkpoint.safetensors_file import TensorRef
from wire.manifest import Architecture, Dims, ExpertGraph, RoutingFacts, mixtral_architecture

_SCALING_KEYS = ("routed_scaling_factor", "route_scale")


class Survey(NamedTuple):
    """What a model needs and has.

    Attributes:
        dims: dimensions of the model.
        architecture: of the model.
        alternating: gate and up rows alternate where one tensor holds both.
        unknown: those of the tensors that the model does not have.
    """

    dims: Dims
    architecture: Architecture
    alternating: bool
    unknown: frozenset[str]


def survey(folder: Path, kind: str, trunk: Iterable[TensorRef] | None) -> Survey:
    """Build the model of a checkpoint without weights, and compare the trunk's tensors with those that it needs.

    Args:
        folder: of the checkpoint.
        kind: `model_type` of its config.json.
        trunk: all tensors that belong to no routed expert; None where they are not there yet, and can't be compared.

    Raises:
        CheckpointError: transformers can't use config.json, its experts compute something that no exported expert can,
            or a tensor is missing or has another shape.
    """
    shapes = None if trunk is None else {ref.name: ref.shape for ref in trunk}
    found, _ = run_limited(_survey, folder, kind, shapes, stage="config.json", checkpoint=folder)
    return found


def _survey(_report: Report, folder: Path, kind: str, shapes: dict[str, tuple[int, ...]] | None) -> Survey:
    if importlib.util.find_spec("transformers.core_model_loading") is None:
        return _declared(folder, kind)
    try:
        config, model = _build(folder, kind)
    except RefusedError:
        raise
    except Exception as error:  # noqa: BLE001 - transformers raises anything for a config that it can't use
        raise RefusedError(f"transformers can't use its config.json: {reason(error)}") from None
    # `use_experts_implementation`, which marks all modules of routed experts, adds this method.
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "_apply_gate")}
    if not modules:
        raise RefusedError("its config.json describes a model without experts")
    dims, expert = _dims(config, list(modules.values())), _expert_graph(next(iter(modules.values())))
    layers = tuple(int(found[1]) for name in modules if (found := re.match(r"model\.layers\.(\d+)\.", name)))
    architecture = Architecture(family=kind, layers=layers, expert=expert, routing=_routing(config, kind))
    unknown = _unknown(model, tuple(f"{name}." for name in modules), shapes) if shapes is not None else frozenset()
    alternating = not next(iter(modules.values())).is_concatenated
    return Survey(dims, architecture, alternating, unknown)


def _declared(folder: Path, kind: str) -> Survey:
    """What config.json alone says about a Mixtral, where transformers is older than 5, as optimum wants it."""
    if kind != "mixtral":
        raise RefusedError(f"model_type {kind!r} needs transformers 5: export it without --via optimum")
    from transformers import MixtralConfig

    config: Any = MixtralConfig.from_pretrained(folder)
    dims = Dims(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
    )
    return Survey(dims, mixtral_architecture(dims.layers), alternating=False, unknown=frozenset())


def _build(folder: Path, kind: str) -> tuple[Any, Any]:
    """The configuration, and the model with all parameters on the meta device."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise RefusedError(f"can't be tried without transformers: pip install -e .[exporter] ({error})") from None
    # Not AutoConfig, which would ask for a checkpoint's own code.
    config: Any = CONFIG_MAPPING[kind].from_pretrained(folder)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            rotary = type(module)(config)
            for name, value in rotary.named_buffers():
                if value.is_floating_point() and not (value * config.max_position_embeddings).isfinite().all():
                    raise RefusedError(
                        f"its config.json makes rotary embeddings that are not finite ({name}): see rope_theta and "
                        "rope_parameters"
                    )
    return config, model


def _dims(config: Any, modules: list[Any]) -> Dims:
    first = modules[0]
    tall = tuple(first.down_proj.shape)
    if any(tuple(module.down_proj.shape) != tall for module in modules):
        raise RefusedError("its layers have experts of different number or size, which can't be exported")
    experts, hidden, inner = (tall[0], tall[2], tall[1]) if first.is_transposed else tall
    top_k = config.num_experts_per_tok
    if isinstance(top_k, list):
        if len(set(top_k)) != 1:
            raise RefusedError("its layers choose different numbers of experts, which can't be exported")
        top_k = top_k[0]
    if hidden != config.hidden_size:
        raise RefusedError(f"its experts are {hidden} wide, the model {config.hidden_size}: they can't be exported")
    if isinstance(top_k, int) and top_k > experts:
        raise RefusedError(f"config.json: top-{top_k} of {experts} experts")
    values = {
        "hidden": hidden,
        "intermediate": inner,
        "layers": len(modules),
        "experts": experts,
        "top_k": top_k,
        "vocab": config.vocab_size,
        "max_positions": config.max_position_embeddings,
    }
    try:
        return msgspec.convert(values, Dims)
    except ValueError as error:
        raise RefusedError(f"config.json: {error}") from None


def _expert_graph(module: Any) -> ExpertGraph:
    """The graph that computes what a module of experts does."""
    if not module.has_gate or module.has_post_expert_norm:
        raise RefusedError(
            f"its experts ({type(module).__name__}) are not gated linear units, and only those can be exported"
        )
    candidates = [ExpertGraph(activation=name, biases=module.has_bias) for name in ("silu", "gelu", "gelu-tanh")]
    if getattr(module, "alpha", None) and getattr(module, "limit", None):
        constants = {"alpha": float(module.alpha), "limit": float(module.limit)}
        candidates.append(ExpertGraph(activation="clamped", biases=module.has_bias, **constants))
    for graph in candidates:
        if _computes(module, graph):
            return graph
    raise RefusedError(f"its experts ({type(module).__name__}) compute an activation that can't be exported")


def _computes(module: Any, graph: ExpertGraph) -> bool:
    """Whether a module's activation is that of the graph, tried on numbers from -20 to 20."""
    import torch

    gate = torch.linspace(-20.0, 20.0, 401)
    up = gate.flip(0) + 0.5
    pair = torch.cat([gate, up]) if module.is_concatenated else torch.stack([gate, up], dim=1).reshape(-1)
    match graph.activation:
        case "silu":
            expected = torch.nn.functional.silu(gate) * up
        case "gelu":
            expected = torch.nn.functional.gelu(gate) * up
        case "gelu-tanh":
            expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
        case "clamped":
            low = gate.clamp(max=module.limit)
            expected = low * torch.sigmoid(module.alpha * low) * (up.clamp(-module.limit, module.limit) + 1)
    found = module._apply_gate(pair[None])[0]
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-4)


def _routing(config: Any, kind: str) -> RoutingFacts:
    family = FAMILIES[kind]
    renormalised = family.renormalised
    if renormalised is None:
        renormalised = getattr(config, "norm_topk_prob", None)
    factor = next((float(value) for key in _SCALING_KEYS if (value := getattr(config, key, None)) is not None), 1.0)
    return RoutingFacts(score=family.score, renormalised=renormalised, factor=factor)


def _unknown(model: Any, experts: tuple[str, ...], shapes: dict[str, tuple[int, ...]]) -> frozenset[str]:
    """Names of tensors that the model does not have, after a check that it gets all that it needs.

    Args:
        experts: beginnings of the names of routed experts' parameters.
        shapes: of the trunk's tensors, by name in the checkpoint.
    """
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        convert_and_load_state_dict_in_model,
        rename_source_key,
        revert_weight_conversion,
    )
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils.logging import disable_progress_bar

    # A bar makes semaphores, which would be reported as leaked when the process is ended.
    disable_progress_bar()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    needed = {name for name in state if not name.startswith(experts) and name not in model.all_tied_weights_keys}

    def target(name: str) -> str:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        return renamed if renamed in state else name

    unknown = frozenset(name for name in shapes if target(name) not in needed)
    loaded, _ = convert_and_load_state_dict_in_model(
        model,
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if name not in unknown},
        LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=mapping),
        None,
    )
    if missing := sorted(loaded.missing_keys & needed):
        [name] = revert_weight_conversion(model, {missing[0]: state[missing[0]]}) or [missing[0]]
        raise RefusedError(f"lacks tensor '{name}': its files don't fit its config.json")
    for name, found, wanted in sorted(loaded.mismatched_keys):
        source = next((n for n in shapes if target(n) == name), name)
        raise RefusedError(f"tensor '{source}' has shape {list(found)}, config.json asks for {list(wanted)}")
    if loaded.conversion_errors:
        raise RefusedError(f"tensors of '{min(loaded.conversion_errors)}' don't fit its config.json")
    return unknown
