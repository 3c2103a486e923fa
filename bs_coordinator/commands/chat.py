"""`wdmoe-bs chat`."""

import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from bs_coordinator.commands.answers import decode_utf8, print_answer, stats_option, system_messages, system_option
from bs_coordinator.commands.station import open_station
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from bs_coordinator.errors import ChatTemplateError
from common.errors import WdmoeError
from common.options import Command, config_options
from wire.errors import BrokerError

if TYPE_CHECKING:
    from bs_coordinator.dispatch.dispatcher import Dispatcher

log = logging.getLogger("wdmoe-bs")

_PUMP_S = 0.1
_RECONNECT_S = 1.0


@click.command(
    cls=Command,
    example="""\
wdmoe-bs chat --bundle bundle --broker mqtt://127.0.0.1
wdmoe-bs chat --bundle bundle --resident 4G        # without nodes""",
)
@system_option
@stats_option
@config_options(config=BaseStationConfig, sampling=SamplingConfig)
def chat(system: str | None, stats: bool, config: BaseStationConfig, sampling: SamplingConfig) -> None:
    """Talk with the model; an empty line or Ctrl-D ends.

    Ctrl-C ends the answer in progress, or else the chat. An answer that fails is reported, and the conversation goes on
    without it.
    """
    system = decode_utf8("--system", os.fsencode(system)) if system else None
    with open_station(config) as station:
        if not station.tokenizer.has_chat_template:
            raise click.UsageError("this model has no chat template: use 'wdmoe-bs generate --raw'")
        sequence, messages = station.new_sequence(), system_messages(system)
        failed: WdmoeError | None = None
        while typed := _read_line("> ", while_waiting=lambda: _keep_connected(station.dispatcher)):
            line = decode_utf8("this line", typed)
            messages.append({"role": "user", "content": line})
            try:
                ids = station.tokenizer.encode_chat(messages)
                with _first_interrupt(station.dispatcher) as interrupted:
                    text = print_answer(sequence, ids, sampling, stats=stats, stopped=interrupted.is_set)
            except WdmoeError as error:
                if isinstance(error, ChatTemplateError) and all(m["role"] != "assistant" for m in messages):
                    raise  # there is no conversation yet to be kept
                failed = error
                log.error("%s", error)
                log.warning("this question has no answer and is not part of the conversation: ask it again")
                messages.pop()
                continue
            failed = None
            messages.append({"role": "assistant", "content": text})
    if failed is not None:
        raise SystemExit(failed.exit_code)


@contextmanager
def _first_interrupt(dispatcher: "Dispatcher") -> Iterator[threading.Event]:
    """Meanwhile the first SIGINT sets this event instead of raising KeyboardInterrupt in the middle of a layer.

    While the broker is away there is no layer to finish, and it may stay away for long: SIGINT then ends the command.
    """
    interrupted = threading.Event()

    def on_interrupt(number: int, frame: Any) -> None:
        if dispatcher.reconnecting:
            raise KeyboardInterrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupted.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _keep_connected(dispatcher: "Dispatcher") -> None:
    """Receive messages for a moment, or connect again."""
    try:
        dispatcher.pump(_PUMP_S)
    except BrokerError as lost:
        try:
            dispatcher.recover(lost)
        except BrokerError as error:
            log.warning("%s", error)
            dispatcher.clock.sleep_s(_RECONNECT_S)


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
