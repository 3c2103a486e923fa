"""`wdmoe-node tune`."""

from pathlib import Path
from typing import Literal

import click

from common.sizes import parse_bytes
from wire.device_profiles import PROFILES, DeviceName, Provider


@click.command()
@click.option(
    "--bundle", "bundles", type=click.Path(path_type=Path), required=True, multiple=True,
    help="Folder made by wdmoe-export; repeatable, one per quantisation.",
)  # fmt: skip
@click.option("--experts", "selector", required=True, help="What this device will hold, as for serve.")
@click.option("--tuned", type=click.Path(path_type=Path), required=True, help="File that keeps the choice.")
@click.option(
    "--profile", type=click.Choice(["auto", *PROFILES]), default="auto", show_default=True, help="As for serve."
)
@click.option(
    "--provider", type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]), default="auto", show_default=True,
    help="As for serve.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1, 256), multiple=True, help="Repeatable.  [default: 1, 2, 4 … the profile's]"
)
@click.option("--memory-budget", help="As for serve.")
@click.option("--residency", type=click.Choice(["all", "lru"]), default="all", show_default=True, help="As for serve.")
@click.option(
    "--prefer", type=click.Choice(["token", "batch"]), default="token", show_default=True,
    help="Whose time counts: one token's, or that of a batch, as drafts and several callers bring it.",
)  # fmt: skip
@click.option("--max-error", type=click.FloatRange(0), default=0.25, show_default=True, help="Of outputs, to fp32.")
@click.option("--exact", is_flag=True, help="Only what gives a token the same output in any batch.")
@click.option("--bundle-key", type=click.Path(path_type=Path), help="Take only bundles signed by this public key.")
def tune(
    bundles: tuple[Path, ...], selector: str, tuned: Path, profile: Literal["auto"] | DeviceName,
    provider: Literal["auto"] | Provider, threads: tuple[int, ...], memory_budget: str | None,
    residency: Literal["all", "lru"], prefer: Literal["token", "batch"], max_error: float, exact: bool,
    bundle_key: Path | None,
) -> None:  # fmt: skip
    """Measure which of several bundles, and how many threads, suit this device, and keep the choice."""
    from edge_node import devices
    from edge_node.tuning.tune import Variants
    from edge_node.tuning.tuning_file import Rule, table

    device = devices.detect() if profile == "auto" else devices.named(profile)
    try:
        variants = Variants(
            bundles, selector, key=bundle_key, budget=parse_bytes(memory_budget) if memory_budget else None,
            all_resident=residency == "all", most_threads=devices.threads_for(device), threads=threads,
            providers=device.profile.providers if provider == "auto" else (provider,),
        )  # fmt: skip
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    tuning = variants.tune(tuned, Rule(prefer=prefer, max_error=max_error, exact=exact))
    click.echo(table(tuning))
    click.echo(f"\n{tuning.why}\nkept in {tuned}")
