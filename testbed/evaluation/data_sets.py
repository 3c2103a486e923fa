"""Items of evaluation data sets, and how each becomes text to score, as in lm-evaluation-harness.

Data sets are JSON Lines files: `question`, `choices` and `label` for multiple choice, `text` for last words, `domain`
and `text` for perplexity.
"""

from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Struct

from common.errors import WdmoeError
from common.jsonl import JsonLinesError, read_json_lines, strict_json
from testbed.plan.schema import Choice, Form

T = TypeVar("T")
_BLANK = "_"


class ChoiceItem(Struct, frozen=True):
    """One question with several answers; `choices[label]` is the right one."""

    question: str
    choices: Annotated[list[str], Meta(min_length=1)]
    label: int

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("the question is empty")
        if not 0 <= self.label < len(self.choices):
            raise ValueError(f"label {self.label} is none of the {len(self.choices)} choices, which count from 0")


class BlankItem(ChoiceItem, frozen=True):
    """A sentence with a blank `_` that one of the choices fills; text follows the blank."""

    def __post_init__(self) -> None:
        ChoiceItem.__post_init__(self)
        if self.question.count(_BLANK) != 1 or not self.question.partition(_BLANK)[2].strip():
            raise ValueError(f"the question needs one blank '{_BLANK}' with text after it: {self.question[:60]!r}")


class LastWordItem(Struct, frozen=True):
    """A text whose last word is to be predicted from what comes before it."""

    text: str

    def __post_init__(self) -> None:
        before, _, word = self.text.rpartition(" ")
        if not before.strip() or not word.strip():
            raise ValueError(f"the text needs a last word after a space, and text before it: {self.text[-60:]!r}")


class DomainText(Struct, frozen=True):
    """Held-out text of one domain."""

    domain: str
    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("the text is empty")


class Alternative(NamedTuple):
    """A text to score: how likely is `continuation` after `context`?"""

    context: str
    continuation: str


def item_kind(workload: Choice) -> type[ChoiceItem]:
    """The class of a workload's items: with stricter checks where their form needs them."""
    return BlankItem if workload.form == "blank" else ChoiceItem


def alternatives(item: ChoiceItem, form: Form) -> list[Alternative]:
    """The text of each choice of an item; the model chooses the likeliest continuation.

    - `question`: `Question: …\\nAnswer:`, then the choice (ARC, PIQA).
    - `continuation`: the question's text, then the choice (HellaSwag, OpenBookQA).
    - `blank`: the sentence up to its blank with the choice in it, then the rest of the sentence, which is the same for
      all choices. This partial evaluation is after Trinh and Le, arXiv 1806.02847 (WinoGrande).
    """
    if form == "blank":
        before, _, after = item.question.partition(_BLANK)
        return [Alternative(before + choice, f" {after.strip()}") for choice in item.choices]
    context = item.question if form == "continuation" else f"Question: {item.question}\nAnswer:"
    return [Alternative(context, f" {choice}") for choice in item.choices]


def last_word(item: LastWordItem) -> Alternative:
    """The last word of a text as the continuation of what comes before (LAMBADA, arXiv 1606.06031)."""
    before, _, word = item.text.rpartition(" ")
    return Alternative(before, f" {word}")


def read_items(path: Path, kind: type[T], count: int | None = None) -> list[T]:
    """The first `count` items of a JSON Lines file.

    Raises:
        WdmoeError: the file is missing, or a line is not an item of this kind.
    """
    try:
        return list(islice(read_json_lines(path, lambda line: msgspec.convert(strict_json(line), kind)), count))
    except FileNotFoundError:
        raise WdmoeError(f"evaluation data {path} is missing: docs/measurement.md describes its format") from None
    except JsonLinesError as error:
        raise WdmoeError(f"not JSON Lines of {kind.__name__}: {error}") from None
