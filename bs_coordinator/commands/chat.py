"""`wdmoe-bs chat`."""

import os
import queue
import threading
from collections.abc import Callable

import click

from bs_coordinator.commands.answers import decode_utf8, print_answer, stats_option, system_messages, system_option
from bs_coordinator.commands.station import open_station
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from common.options import Command, config_options

_PUMP_S = 0.1


@click.command(cls=Command)
@system_option
@stats_option
@config_options(config=BaseStationConfig, sampling=SamplingConfig)
def chat(system: str | None, stats: bool, config: BaseStationConfig, sampling: SamplingConfig) -> None:
    """Talk with the model; an empty line or Ctrl-D ends."""
    system = decode_utf8("--system", os.fsencode(system)) if system else None
    with open_station(config) as station:
        if not station.tokenizer.has_chat_template:
            raise click.UsageError("this model has no chat template: use 'wdmoe-bs generate --raw'")
        sequence, messages = station.new_sequence(), system_messages(system)
        while typed := _read_line("> ", while_waiting=lambda: station.dispatcher.pump(_PUMP_S)):
            line = decode_utf8("this line", typed)
            messages.append({"role": "user", "content": line})
            ids = station.tokenizer.encode_chat(messages)
            text = print_answer(sequence, ids, sampling, stats=stats)
            messages.append({"role": "assistant", "content": text})


def _read_line(prompt: str, *, while_waiting: Callable[[], None]) -> bytes:
    """A line from stdin, stripped; empty at its end.

    Args:
        while_waiting: called in this thread again and again until there is a line; keeps the connection alive.
    """
    lines: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        try:
            lines.put(os.fsencode(input(prompt)))
        except EOFError:
            lines.put(b"")
        except UnicodeDecodeError as error:  # from a terminal, which is stricter than a pipe
            lines.put(error.object)

    threading.Thread(target=read, daemon=True).start()
    while True:
        while_waiting()
        try:
            return lines.get_nowait().strip()
        except queue.Empty:
            continue
