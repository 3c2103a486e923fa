"""`wdmoe-testbed export`. Heavy imports wait until the command needs them."""

from pathlib import Path

import click

from common.options import Command
from testbed.run_directory.commands import RUN


@click.command(cls=Command, example="wdmoe-testbed export runs/mine -o mine.tar.zst")
@RUN
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Must end in .tar.zst or .tar.gz.")
@click.option("--plain", is_flag=True, help="Keep names of networks, addresses, hosts and users.")
@click.option("--key", type=click.Path(path_type=Path), help="Key of the pseudonyms, mode 600.  [default: your own]")
@click.option("--photos/--no-photos", default=True, show_default=True, help="Include the photos of notes.")
@click.option("--report/--no-report", "with_report", default=True, show_default=True, help="Include a report.")
def export(folder: Path, out: Path, plain: bool, key: Path | None, photos: bool, with_report: bool) -> None:
    """Pack a run into one archive with checksums and a data dictionary, ready to publish."""
    from testbed.archive.export import export_run
    from testbed.run_directory.directory import RunDir

    made = export_run(RunDir(folder), out, anonymous=not plain, key_file=key, photos=photos, report=with_report)
    click.echo(f"{made.path}: {made.files} files, {made.bytes / 2**20:.1f} MiB, SHA-256 {made.sha256}")
    if not plain:
        counts = ", ".join(f"{count} {kind}" for kind, count in made.replaced.items())
        click.echo(f"replaced by pseudonyms: {counts}; read notes and logs before you publish them")
    if made.photos:
        click.echo(f"{made.photos} photos included: look at them before you publish them")
    for line in made.left_out:
        click.echo(f"left out: {line}")


def register(group: click.Group) -> None:
    """Add the command to `wdmoe-testbed`."""
    group.add_command(export)
