"""The demo models and their bundles, made once and kept in the user's cache folder."""

from pathlib import Path

from rich.console import Console

from common.progress import show_progress
from common.user_folders import user_folder, user_path
from exporter.bundle.bundle import export_bundle
from exporter.config import ExportConfig
from exporter.demo_model.assembly import DEFAULT_MODEL, DEMO_MODELS, assemble_demo_model, demo_model_path
from exporter.demo_model.base import exclusive
from exporter.draft.draft import export_draft
from exporter.draft.draft_graph import CHOICES, QUANTISATION
from exporter.draft.expert_mean import ExpertMean
from exporter.expert.presets import DEFAULT_BLOCK
from wire.draft import DRAFT_NAME
from wire.manifest import Quantisation, Scheme


def demo_model(*, model: str = DEFAULT_MODEL, layers: int | None = None, console: Console | None = None) -> Path:
    """Folder of a demo model; made if missing.

    Args:
        model: one of `DEMO_MODELS`.
        layers: keep only this many layers, from the first; None for all.
        console: shows the progress.
    """
    name = DEMO_MODELS[model].name
    folder = demo_model_path(model, layers)
    with user_folder("cache"), show_progress(f"demo model {name}", console or _quiet()) as progress:
        assemble_demo_model(folder, model=model, layers=layers, progress=progress)
    return folder


def demo_bundle(
    scheme: Scheme, *, model: str = DEFAULT_MODEL, block: int = DEFAULT_BLOCK, console: Console | None = None
) -> Path:
    """Folder of a bundle of a whole demo model, one of `DEMO_MODELS`; made if missing."""
    checkpoint = demo_model(model=model, console=console)
    out = demo_bundle_path(scheme, model=model, block=block)
    with user_folder("cache"):
        export_demo_bundle(checkpoint, out, scheme, block=block, console=console)
    return out


def demo_draft(*, model: str = DEFAULT_MODEL, console: Console | None = None) -> Path:
    """Folder of a draft model for a demo model; made if missing.

    Args:
        model: one of `DEMO_MODELS`. For Mixtral it is the mean of its experts, for others their dense base.
        console: shows the progress.
    """
    # Graphs of earlier versions, of other weights or without choices, are in other folders.
    kind = "mean" if model == ExpertMean.kind else "base"
    name = f"{DEMO_MODELS[model].name}-{kind}-{QUANTISATION.scheme}-{CHOICES}"
    folder = user_path("cache") / "drafts" / name
    if not (folder / DRAFT_NAME).is_file():
        base = str(demo_model(model=model, console=console)) if kind == "mean" else None
        with user_folder("cache"), show_progress("draft model", console or _quiet()) as progress:
            export_draft(folder, base=base, progress=progress)
    return folder


def demo_bundle_path(scheme: Scheme, *, model: str = DEFAULT_MODEL, block: int = DEFAULT_BLOCK) -> Path:
    """Folder that `demo_bundle` returns; it need not exist yet."""
    quantisation = demo_quantisation(scheme, block)
    return user_path("cache") / "bundles" / f"{DEMO_MODELS[model].name}-{str(quantisation).replace(' ', '-')}"


def export_demo_bundle(
    model: Path, out: Path, scheme: Scheme, *, block: int = DEFAULT_BLOCK, console: Console | None = None
) -> None:
    """Export the checkpoint `model` to `out`, unless it is there already. Waits while another process does the same."""
    with (
        show_progress(f"{scheme} bundle", console or _quiet()) as show,
        exclusive(out.parent, lambda: show("waiting for another export", 0.0)),
    ):
        export_bundle(
            model,
            out,
            demo_quantisation(scheme, block),
            jobs=ExportConfig().jobs,
            progress=lambda done, all_: show(f"expert {done} of {all_}", done / all_),
        )


def demo_quantisation(scheme: Scheme, block: int = DEFAULT_BLOCK) -> Quantisation:
    """The exporter's defaults for a scheme."""
    return Quantisation(scheme=scheme, block=block if scheme in ("int4", "int8") else 0)


def _quiet() -> Console:
    return Console(quiet=True)
