"""Tables of what came out of a run: answers, choices, last words, losses; failed attempts and pauses."""

import hashlib
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from testbed.run_directory.columns import BOOL, FLOAT, INT, NAME, TEXT, Column, Table

Event = dict[str, Any]
_UNIX = "time of the event, wall clock of the base station"
_ITEM = "line of the data set, from 0"


class AnswerRow(NamedTuple):
    """One generated answer.

    Attributes:
        answer: its number in the cell; -1 in the warm-up.
        prompt: the prompt's number in the workload.
        ids: generated token ids.
        first_token_ns, wall_ns: time from the prompt to the first and to the last token.
        stop: why the answer ended.
    """

    answer: int
    prompt: int
    prompt_tokens: int
    ids: list[int]
    text: str
    first_token_ns: int
    wall_ns: int
    stop: str | None


class ChoiceRow(NamedTuple):
    """One multiple-choice item with the model's choice."""

    item: int
    chosen: int
    label: int


class LastWordRow(NamedTuple):
    """One text: whether greedy decoding gives its last word, and the word's summed loss."""

    item: int
    right: bool
    loss_nats: float


class LossRow(NamedTuple):
    """One text with its summed loss over `tokens` predicted tokens."""

    item: int
    domain: str
    loss_nats: float
    tokens: int


def token_sha256(ids: list[int]) -> str:
    """SHA-256 of token ids as little-endian int32: equal for equal answers."""
    return hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()


ANSWERS = Table[AnswerRow](
    "answers",
    "one row per generated answer",
    (
        Column("answer", INT, "number of the answer in the cell; −1 in the warm-up"),
        Column("prompt", INT, "number of the prompt in the workload"),
        Column(
            "warm_up", BOOL, "whether the row belongs to the warm-up, which all results leave out",
            lambda a: a.answer < 0,
        ),
        Column("prompt_tokens", INT, "tokens of the prompt"),
        Column("tokens", INT, "generated tokens", lambda a: len(a.ids)),
        Column("first_token_ns", INT, "time to the first token"),
        Column("wall_ns", INT, "time to the last token"),
        Column("stop", NAME, "why the answer ended"),
        Column(
            "token_sha256", TEXT, "SHA-256 of the token ids as little-endian int32: equal for equal answers",
            lambda a: token_sha256(a.ids),
        ),
        Column("text", TEXT, "the answer"),
    ),
)  # fmt: skip

CHOICES = Table[ChoiceRow](
    "choices",
    "one row per multiple-choice item",
    (
        Column("item", INT, _ITEM),
        Column("chosen", INT, "index of the model's choice"),
        Column("label", INT, "index of the right choice"),
        Column("right", BOOL, "whether the two are equal", lambda c: c.chosen == c.label),
    ),
)

LAST_WORDS = Table[LastWordRow](
    "last_words",
    "one row per text whose last word was predicted",
    (
        Column("item", INT, _ITEM),
        Column("right", BOOL, "whether greedy decoding gives exactly the last word"),
        Column("loss_nats", FLOAT, "negative log-likelihood of the last word, summed over its tokens"),
    ),
)

LOSSES = Table[LossRow](
    "losses",
    "one row per text",
    (
        Column("item", INT, _ITEM),
        Column("domain", NAME, "domain of the text"),
        Column("loss_nats", FLOAT, "summed negative log-likelihood"),
        Column("tokens", INT, "predicted tokens"),
    ),
)


def _field(name: str, dtype: pa.DataType, meaning: str) -> Column[Event]:
    """A field of an event; empty where the event doesn't have it."""
    return Column(name, dtype, meaning, lambda event: event.get(name))


FAILURES = Table[Event](
    "failures",
    "one row per failed attempt at a cell",
    (
        _field("unix_ns", INT, _UNIX),
        _field("cell", TEXT, "id of the cell"),
        _field("what", TEXT, "the cell in words"),
        _field("attempt", INT, "number of the attempt, from 1"),
        _field("kind", TEXT, "class of the error"),
        _field("error", TEXT, "message of the error"),
    ),
)

GAPS = Table[Event](
    "gaps",
    "one row per pause of the runner before it was resumed",
    (
        _field("unix_ns", INT, _UNIX),
        _field("gap_s", FLOAT, "time from the last event to the resumption"),
        _field("after", TEXT, "the last event before the pause"),
        _field("lost", INT, "unfinished cells that were removed"),
    ),
)
