"""Plans of `wdmoe-bs place` as text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from bs_coordinator.commands.tables import compact_table, print_table

if TYPE_CHECKING:
    from bs_coordinator.placement.fleet_plan import FleetPlan, OneMore, SliceOption

_WORTH_MS = 0.05


def print_plan(plan: "FleetPlan", assumed: Sequence[str]) -> None:
    """Print the choice with its reasons, the predictions and the options of each node; assumptions go to stderr."""
    unit = "whole experts" if plan.slices == 1 else f"{plan.slices} slices per expert"
    copies = "one copy" if plan.replicas == 1 else f"{plan.replicas} copies"
    click.echo(f"{plan.model}: {plan.quantisation} on all boards, {unit}, {copies}")
    click.echo(f"  token    {plan.ms_per_token:.0f} ms ({1e3 / plan.ms_per_token:.1f} tokens/s)")
    if plan.draft_ms_per_token is not None:
        click.echo(
            f"  drafts   {plan.draft_ms_per_token:.0f} ms per token ({1e3 / plan.draft_ms_per_token:.1f} tokens/s)"
        )
    tokens = plan.prompt_tokens
    click.echo(f"  prompt   {tokens} tokens in {plan.prompt_s:.1f} s ({tokens / plan.prompt_s:.0f} tokens/s)")
    if plan.resident:
        click.echo(f"  kept on the base station: {plan.resident}, {1e-9 * plan.resident_bytes:.1f} GB")
    click.echo(f"  why      {why(plan)}")
    if plan.missing_for_next_copy:
        click.echo(f"  one more copy needs {plan.missing_for_next_copy}")
    for more in plan.more:
        click.echo(f"  one more {more.kind}: {_gain(plan, more)}")
    table = compact_table()
    for column in ("board", "kind", "holds", "fit", "GB", "of GB", "traffic"):
        left = column in ("board", "kind")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for board in plan.boards:
        table.add_row(
            board.name, board.kind, str(board.units), str(board.fits), f"{1e-9 * board.ram_bytes:.1f}",
            f"{1e-9 * board.ram_limit_bytes:.1f}", f"{board.traffic:.0%}",
        )  # fmt: skip
    print_table(table)
    for board in plan.boards:
        if board.experts:
            click.echo(f"wdmoe-node --id {board.name} --experts '{board.experts}' …")
    for line in assumed:
        click.echo(f"assumed: {line}", err=True)


def why(plan: "FleetPlan") -> str:
    """Why this number of slices: the chosen one against the best other one, and against whole experts.

    With drafts, all times and numbers are those with drafts.
    """
    chosen = next(option for option in plan.options if option.slices == plan.slices)
    others = [option for option in plan.options if option is not chosen]
    if not others:
        return f"{_reading(chosen)}; no other number of slices was asked for, or is possible"
    rivals = {min(others, key=_decisive_ms).slices, 1} - {plan.slices}
    parts = [f"{_reading(chosen)}"]
    for option in others:
        if option.slices in rivals:
            slower = _decisive_ms(option) - _decisive_ms(chosen)
            verdict = f"{slower:.0f} ms slower" if slower > 0 else "no gain that counts"
            parts.append(f"{_reading(option)}: {verdict}")
    return "; ".join(parts)


def _reading(option: "SliceOption") -> str:
    slices = "1 slice" if option.slices == 1 else f"{option.slices} slices"
    return (
        f"{slices}: a layer asks {option.boards_asked:.1f} boards, which read up to {option.read_mb:.0f} MB and use "
        f"{option.air_ms:.1f} ms of air, {_decisive_ms(option):.0f} ms per token"
        f"{'' if option.draft_ms_per_token is None else ' with drafts'}"
    )


def _decisive_ms(predicted: "FleetPlan | SliceOption | OneMore") -> float:
    from bs_coordinator.placement.fleet_plan import decisive_ms

    return decisive_ms(predicted.ms_per_token, predicted.draft_ms_per_token)


def _gain(plan: "FleetPlan", more: "OneMore") -> str:
    more_ms = _decisive_ms(more)
    saved_ms = _decisive_ms(plan) - more_ms
    copies = f", room for {more.replicas} copies" if more.replicas > plan.replicas else ""
    if saved_ms < _WORTH_MS:
        return f"no faster{copies}"
    cut = "" if more.slices == plan.slices else f" in {more.slices} slices"
    drafts = "" if more.draft_ms_per_token is None else " with drafts"
    return f"{more_ms:.0f} ms per token{drafts}{cut}, {saved_ms:.0f} less{copies}"
