"""What `generate` and `chat` share: texts from the command line, answers to stdout."""

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from bs_coordinator.config import SamplingConfig
from common.console import printable

if TYPE_CHECKING:
    from bs_coordinator.engine.sequence import Sequence, TokenEvent

log = logging.getLogger("wdmoe-bs")

system_option = click.option("--system", help="System prompt of a chat model.")
stats_option = click.option(
    "--stats/--no-stats", default=True, show_default=True, help="Print times and bytes below each answer, on stderr."
)


def decode_utf8(what: str, raw: bytes) -> str:
    """Text that a user gave.

    Raises:
        click.UsageError: it is not UTF-8.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{what} is not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}") from None


def system_messages(system: str | None) -> list[dict[str, str]]:
    """The beginning of a conversation: the system prompt, if there is one."""
    return [{"role": "system", "content": system}] if system else []


def for_terminal(text: str) -> str:
    """A model's text for stdout; on a terminal without control characters, which could change or command it."""
    return printable(text) if sys.stdout.isatty() else text


def print_answer(
    sequence: "Sequence", ids: list[int], config: SamplingConfig, *, stats: bool, same_text: bool = False,
    text_of: "Callable[[TokenEvent], str]" = lambda event: event.text,
    stopped: Callable[[], bool] = lambda: False,
) -> str:  # fmt: skip
    """Stream an answer to stdout, its statistics to stderr.

    Args:
        same_text: the answer continues the prompt's text (`Sequence.answer`).
        text_of: called with each token; returns what to print.
        stopped: asked after each token whether the answer ends here.

    Returns:
        The answer's text.
    """
    from bs_coordinator.engine.answer_stats import one_line, summarise

    events: list[TokenEvent] = []
    try:
        for event in sequence.generate(ids, config, same_text=same_text):
            events.append(event)
            click.echo(for_terminal(text_of(event)), nl=False)
            sys.stdout.flush()
            if stopped():
                break
    finally:
        click.echo()
        if events and stats:
            click.echo(one_line(summarise(events)), err=True)
        degraded = sum(event.degraded for event in events)
        if degraded:
            log.warning("degraded: %d of %d tokens were computed without some expert", degraded, len(events))
    return "".join(event.text for event in events)
