"""The files that a plan names: bundles, network and data sets. Checked without torch, which is slow to import."""

from pathlib import Path
from typing import NamedTuple

from exporter.demo_model.assembly import DEFAULT_MODEL, DEMO_MODELS
from exporter.expert.presets import DEFAULT_BLOCK
from testbed.demo_assets import demo_bundle_path
from testbed.errors import PlanError
from testbed.experiment.networks import check_network, check_profiles
from testbed.plan.reading import check_plan
from testbed.plan.schema import Items, Perplexity, Plan
from wire.manifest import MANIFEST_NAME, Scheme, load_manifest

SCHEMES: tuple[Scheme, ...] = ("int4", "int8", "int8-dynamic", "fp16", "fp32")


def check_files(plan: Plan) -> None:
    """Check the bundles and the network of a plan; a demo model's bundle need not be exported yet.

    Raises:
        PlanError: a bundle, a profile or a node does not exist, or a policy does not fit a model.
        BundleError: a bundle's folder is missing or damaged.
        NetworkSpecError: the network's description is missing or wrong.
    """
    check_profiles(plan)
    for name in plan.bundles:
        if (folder := existing_bundle(name)) is not None:
            dims = load_manifest(folder).dims
            check_bundle(plan, name, top_k=dims.top_k, experts=dims.experts)


def existing_bundle(name: str) -> Path | None:
    """Folder of the bundle that a plan calls `name`; None for a demo model's that is not exported yet.

    Raises:
        PlanError: the name is neither a folder nor a demo model's bundle.
    """
    if "/" in name:
        return Path(name)
    demo = named_demo_bundle(name)
    folder = demo_bundle_path(demo.scheme, model=demo.model, block=demo.block)
    return folder if (folder / MANIFEST_NAME).exists() else None


def check_bundle(plan: Plan, name: str, *, top_k: int, experts: int) -> None:
    """Check the policies and the network of a plan against the model of a bundle.

    Args:
        name: of the bundle in the plan.
        top_k: experts per token and layer.
        experts: experts per layer.

    Raises:
        PlanError: a policy does not fit the model, or the network has no such node.
    """
    try:
        check_plan(plan, bundle=name, top_k=top_k)
    except ValueError as error:
        raise PlanError(f"{plan.name}: {error}") from None
    check_network(plan, experts)


def data_sets(plan: Plan) -> list[str]:
    """The files of a plan's data sets."""
    return sorted({w.dataset for w in plan.workloads if isinstance(w, Items | Perplexity) and w.dataset is not None})


def check_data_sets(plan: Plan) -> None:
    """Check that the data sets exist.

    Raises:
        PlanError: one is missing.
    """
    if missing := [path for path in data_sets(plan) if not Path(path).is_file()]:
        raise PlanError(f"data set {missing[0]} is missing: name its folder with --data (docs/experiments.md)")


class DemoBundle(NamedTuple):
    """A bundle of a demo model.

    Attributes:
        model: one of `DEMO_MODELS`.
    """

    model: str
    scheme: Scheme
    block: int


def named_demo_bundle(name: str) -> DemoBundle:
    """The bundle of a demo model that a plan calls `name`: `int4-b128`, or with a model in front `qwen3-moe-int4`.

    Raises:
        PlanError: the name is not of that form.
    """
    model = next((model for model in DEMO_MODELS if name.startswith(f"{model}-")), DEFAULT_MODEL)
    quantisation = name.removeprefix(f"{model}-")
    scheme, _, block = quantisation.rpartition("-b") if "-b" in quantisation else (quantisation, "", "")
    for known in SCHEMES:
        if scheme == known and (not block or block.isdigit()):
            return DemoBundle(model, known, int(block) if block else DEFAULT_BLOCK)
    raise PlanError(
        f"bundles: '{name}' is neither a folder (which contains a /) nor one of {', '.join(SCHEMES)}, …-b128, with "
        f"{' or '.join(f'{model}-' for model in DEMO_MODELS)} in front of it for one of the demo models"
    )
