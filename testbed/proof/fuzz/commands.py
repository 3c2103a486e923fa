"""`wdmoe-testbed fuzz`."""

import tempfile
from pathlib import Path

import click

from testbed.errors import FuzzError

_FRAMES = ("frames", "sealed")
_DOCUMENTS = ("status", "manifest", "expert", "plan", "network", "url")


def register(cli: click.Group) -> None:
    """Add the command."""
    cli.add_command(fuzz)


@click.command()
@click.option("--frames", type=click.IntRange(1), default=1_000_000, show_default=True, help="Inputs that are frames.")
@click.option("--documents", type=click.IntRange(1), default=10_000, show_default=True, help="Of each other kind.")
@click.option("--target", "wanted", multiple=True, type=click.Choice([*_FRAMES, *_DOCUMENTS]), help="Else all.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same inputs.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/fuzz.json"), show_default=True)
def fuzz(frames: int, documents: int, wanted: tuple[str, ...], seed: int, out: Path) -> None:
    """SequenceInput broken frames, documents and configurations to what reads them."""
    import msgspec
    from rich.console import Console
    from rich.table import Table

    from common.files import atomic_write
    from testbed.demo_assets import demo_model, export_demo_bundle
    from testbed.experiment.facts import commit
    from testbed.proof.fuzz import targets
    from testbed.proof.fuzz.run import Report, example_files
    from testbed.proof.fuzz.run import fuzz as run_target
    from wire.frame_auth import FrameAuthenticator
    from wire.manifest import load_manifest
    from wire.status import SCHEMA, Holding, NodeStatus, SocketFacts, encode_status

    console = Console(highlight=False)
    names = wanted or (*_FRAMES, *_DOCUMENTS)
    reports: list[Report] = []
    with tempfile.TemporaryDirectory(prefix="wdmoe-fuzz-") as temporary:
        folder, bundle = Path(temporary), Path(temporary) / "bundle"
        if {"manifest", "expert", "status"} & set(names):
            export_demo_bundle(demo_model(layers=2, console=console), bundle, "int4", console=console)
        plan, network = example_files()

        def target(name: str) -> targets.Target:
            match name:
                case "frames":
                    return targets.frame_target()
                case "sealed":
                    key = bytes(32)
                    return targets.frame_target(
                        FrameAuthenticator(key, at_node=True), other_end=FrameAuthenticator(key, at_node=False)
                    )
                case "status":
                    manifest = load_manifest(bundle)
                    holding = Holding(
                        experts="L*:E3", model_sha256=manifest.model_sha256, dims=manifest.dims, quantisation="int4",
                        resident_bytes=1 << 20,
                    )  # fmt: skip
                    uplink = SocketFacts(
                        endpoint="10.0.0.2:4711", min_rtt_us=2100, delivery_bytes_per_s=5_000_000, app_limited=True
                    )
                    good = NodeStatus(
                        schema=SCHEMA, node="a", state="online", boot_id="b", since_unix_ms=1, holding=holding,
                        uplink=uplink,
                    )  # fmt: skip
                    return targets.status_target(encode_status(good))
                case "manifest":
                    return targets.manifest_target(bundle, folder / "manifest")
                case "expert":
                    return targets.expert_target(bundle, folder / "expert")
                case "plan":
                    return targets.plan_target(plan, folder)
                case "network":
                    return targets.network_target(network, folder)
                case _:
                    return targets.url_target()

        for name in names:
            with console.status(name):
                report = run_target(name, target(name), inputs=frames if name in _FRAMES else documents, seed=seed)
            reports.append(report)
            with atomic_write(out) as file:
                file.write(msgspec.json.encode({"commit": commit()[0], "reports": reports}))
    table = Table("target", "inputs", "understood", "refused", "findings", "slowest ms", "memory grown", "s")
    for r in reports:
        counts = (r.inputs, r.understood, sum(r.refused.values()), len(r.findings))
        table.add_row(
            r.target, *(f"{n:,}" for n in counts), f"{r.slowest_ms:.0f}", f"{r.grown_bytes / 2**20:.1f} MiB",
            f"{r.seconds:.0f}",
        )  # fmt: skip
    console.print(table)
    findings = [(r.target, f) for r in reports for f in r.findings]
    if findings:
        name, first = findings[0]
        raise FuzzError(
            f"{len(findings)} inputs broke a reader; first: {name} {first.number}: {first.error} (all: {out})"
        )
