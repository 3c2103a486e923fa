"""The demo model and its bundles, made once and kept in the user's cache folder."""

from pathlib import Path

import platformdirs
from rich.console import Console

from exporter.bundle.bundle import export_bundle
from exporter.config import ExportConfig
from exporter.demo_model.assembly import assemble_demo_model
from exporter.draft.draft import export_draft
from exporter.expert.presets import DEFAULT_BLOCK
from wire.draft import DRAFT_NAME
from wire.manifest import Quantisation, Scheme

MODEL_NAME = "smol-mixtral-8x135m"


def demo_model(*, layers: int | None = None, console: Console | None = None) -> Path:
    """Folder of the demo model, or of a model with only its first `layers` layers; made if missing."""
    folder = _cache() / "models" / (MODEL_NAME if layers is None else f"{MODEL_NAME}-{layers}-layers")
    with (console or Console(quiet=True)).status("demo model") as status:
        assemble_demo_model(
            folder, layers=layers, progress=lambda stage, f: status.update(f"demo model: {stage} ({f:.0%})")
        )
    return folder


def demo_bundle(scheme: Scheme, *, block: int = DEFAULT_BLOCK, console: Console | None = None) -> Path:
    """Folder of a bundle of the whole demo model; made if missing."""
    model = demo_model(console=console)
    out = demo_bundle_path(scheme, block=block)
    export_demo_bundle(model, out, scheme, block=block, console=console)
    return out


def demo_draft(*, console: Console | None = None) -> Path:
    """Folder of the demo model's dense base as a draft model, which suits all its bundles; made if missing."""
    folder = _cache() / "drafts" / MODEL_NAME
    if not (folder / DRAFT_NAME).is_file():
        with (console or Console(quiet=True)).status("draft model") as status:
            export_draft(folder, progress=lambda stage, f: status.update(f"draft model: {stage} ({f:.0%})"))
    return folder


def demo_bundle_path(scheme: Scheme, *, block: int = DEFAULT_BLOCK) -> Path:
    """Folder that `demo_bundle` returns; it need not exist yet."""
    quantisation = demo_quantisation(scheme, block)
    return _cache() / "bundles" / f"{MODEL_NAME}-{str(quantisation).replace(' ', '-')}"


def export_demo_bundle(
    model: Path, out: Path, scheme: Scheme, *, block: int = DEFAULT_BLOCK, console: Console | None = None
) -> None:
    """Export the checkpoint `model` to `out`, unless it is there already."""
    with (console or Console(quiet=True)).status(f"{scheme} bundle") as status:
        export_bundle(
            model,
            out,
            demo_quantisation(scheme, block),
            jobs=ExportConfig().jobs,
            progress=lambda done, all_: status.update(f"{scheme} bundle: expert {done} of {all_}"),
        )


def demo_quantisation(scheme: Scheme, block: int = DEFAULT_BLOCK) -> Quantisation:
    """The exporter's defaults for a scheme."""
    return Quantisation(scheme=scheme, block=block if scheme in ("int4", "int8") else 0)


def _cache() -> Path:
    return Path(platformdirs.user_cache_dir("wdmoe"))
