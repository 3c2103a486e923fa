"""`wdmoe-bs generate`."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bs_coordinator.commands.answers import (
    decode_utf8,
    for_terminal,
    print_answer,
    stats_option,
    system_messages,
    system_option,
)
from bs_coordinator.commands.station import open_station
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from common.options import Command, config_options

if TYPE_CHECKING:
    from bs_coordinator.base_station import BaseStation
    from bs_coordinator.engine.sequence import TokenEvent


@click.command(
    cls=Command,
    example="""\
wdmoe-bs generate --bundle bundle --prompt 'Why are leaves green?'
cat story.txt | wdmoe-bs generate --bundle bundle --raw --prompt -""",
)
@click.option("--prompt", required=True, help="Prompt; '-' reads it from stdin.")
@system_option
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without the model's chat template.")
@click.option(
    "--session",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Save the answer in this file token by token; the same command continues it after a crash.",
)
@stats_option
@config_options(config=BaseStationConfig, sampling=SamplingConfig)
def generate(
    prompt: str, system: str | None, raw: bool, session: Path | None, stats: bool, config: BaseStationConfig,
    sampling: SamplingConfig,
) -> None:  # fmt: skip
    """Answer one prompt; the text streams to stdout."""
    prompt = decode_utf8("--prompt", sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt))
    system = decode_utf8("--system", os.fsencode(system)) if system else None
    if not prompt.strip():
        raise click.UsageError("--prompt is empty")
    if system and raw:
        raise click.UsageError(
            "--system needs the model's chat template: leave out --raw, or put its text into --prompt"
        )
    with open_station(config) as station:
        tokenizer = station.tokenizer
        same_text = raw or not tokenizer.has_chat_template
        if system and same_text:
            raise click.UsageError("--system: this model has no chat template: put its text into --prompt instead")
        if same_text:
            ids = tokenizer.encode(prompt)
        else:
            ids = tokenizer.encode_chat([*system_messages(system), {"role": "user", "content": prompt}])
        if session is None:
            print_answer(station.new_sequence(), ids, sampling, stats=stats, same_text=same_text)
        else:
            _answer_in_session(station, session, ids, sampling, stats=stats, same_text=same_text)


def _answer_in_session(
    station: "BaseStation", path: Path, prompt: list[int], sampling: SamplingConfig, *, stats: bool,
    same_text: bool,
) -> None:  # fmt: skip
    """Print the whole answer, including the part that an earlier process made."""
    from bs_coordinator.engine.session_file import Asked, session_file

    manifest = station.manifest
    quantisation = str(manifest.quantisation)
    asked = Asked.of(prompt, sampling, model_sha256=manifest.model_sha256, quantisation=quantisation)
    with session_file(path, asked) as session:
        stream = station.tokenizer.stream(prompt if same_text else ())
        click.echo(for_terminal("".join(stream.push(id) for id in session.ids)), nl=session.finished)
        if session.finished:
            return

        def text_of(event: "TokenEvent") -> str:
            session.add(event.id, last=event.stop is not None)
            # Not the event's own text: how a token decodes depends on those before it.
            return "" if event.stop == "eos" else stream.push(event.id)

        done = len(session.ids)
        rest = replace(sampling, max_tokens=sampling.max_tokens - done, skip=done)
        print_answer(station.new_sequence(), prompt + session.ids, rest, stats=stats, text_of=text_of)
