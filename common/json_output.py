"""Tables as JSON, for programs: the option `--json` and what it prints."""

from typing import Any

import click
import msgspec

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
"""Option of commands that print a table; they are called with `as_json`."""


def print_json(document: Any) -> None:
    """Print dataclasses, structs and plain values as one line of JSON; infinite and undefined numbers are null."""
    click.echo(msgspec.json.encode(document))
