"""The model of a plan of `wdmoe-bs place`, and what is wanted of the plan, from the command's options."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bs_coordinator.commands.place.files import read_shape

if TYPE_CHECKING:
    from bs_coordinator.placement.fleet_plan import Wanted
    from bs_coordinator.placement.shapes import ModelShape, Variant
    from wire.manifest import Quantisation


def model_shape(bundle: Path | None, model: str | None) -> "tuple[ModelShape, Variant | None]":
    """The model's shape, and how the bundle stores its experts; None for a model without a bundle.

    Args:
        bundle: its folder; None for `model`.
        model: name of a model, or its config.json.
    """
    from bs_coordinator.placement.shapes import Variant, shape_of_manifest
    from wire.manifest import load_manifest

    if bundle is None:
        assert model is not None  # noqa: S101 - checked above
        return read_shape(model), None
    manifest = load_manifest(bundle)
    largest = max(entry.bytes for entry in manifest.experts)
    return shape_of_manifest(manifest), Variant(manifest.quantisation, manifest.dims.slices, largest)


def wanted_plan(
    shape: "ModelShape", exported: "Variant | None", quantisations: "tuple[Quantisation, ...]", slices: tuple[int, ...],
    replicas: int, resident: int, trunk_ms: float | None, draft: tuple[int, float] | None, prompt: int, *,
    shared_air: bool,
) -> "Wanted":  # fmt: skip
    """What is wanted of the plan; what was not stated follows from the bundle, or is assumed.

    Raises:
        click.UsageError: experts can't be cut into so many slices.
    """
    from bs_coordinator.placement.fleet_plan import Wanted
    from bs_coordinator.placement.predict import TRUNK_BYTES_PER_S, TRUNK_ROW_SHARE, Station
    from bs_coordinator.placement.row_curve import RowCurve
    from wire.manifest import Quantisation

    if not quantisations:
        ours = Quantisation(scheme="int4", block=32), Quantisation(scheme="int4", block=128)
        quantisations = (exported.quantisation,) if exported else ours
    if not slices and exported is not None:
        slices = (exported.slices,)
    for quantisation in quantisations:
        blocks = -(-shape.intermediate // (quantisation.block or 1))
        if max(slices, default=1) > blocks:
            raise click.UsageError(f"an expert at {quantisation} can be cut into at most {blocks} --slices")
    trunk_s = shape.trunk_bytes / TRUNK_BYTES_PER_S if trunk_ms is None else 1e-3 * trunk_ms
    return Wanted(
        quantisations=quantisations, station=Station(RowCurve.line(trunk_s, TRUNK_ROW_SHARE * trunk_s)), slices=slices,
        replicas=replicas, shared_air=shared_air, prompt_tokens=prompt, draft=draft, resident_bytes=resident,
        exported=exported,
    )  # fmt: skip
