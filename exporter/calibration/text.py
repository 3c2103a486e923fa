"""The text that calibrates experts: read from the user's file, and cut into windows of tokens."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from common.console import describe_os_error
from common.errors import WdmoeError
from common.jsonl import JsonLinesError, read_json_lines, strict_json
from exporter.checkpoint.limited_process import RefusedError, Report, reason, run_limited

WINDOW_TOKENS = 512
"""Tokens of a window, which attend to each other only."""
_MOST_BYTES = 64 << 20


class CalibrationText(NamedTuple):
    """A text for calibration.

    Attributes:
        path: its file, for messages.
        texts: its content, as independent texts.
        sha256: of the file.
    """

    path: Path
    texts: list[str]
    sha256: str


def read_text(path: Path) -> CalibrationText:
    """Read a file of UTF-8 text, or of JSON Lines if its name ends in `.jsonl`.

    Of each line, `text` counts, or `question` with the right one of `choices`, as in the evaluation data.

    Raises:
        WdmoeError: the file is missing, too large, empty, or not what its name says.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise WdmoeError(f"{path} is larger than {_MOST_BYTES >> 20} MiB: give a part of it, a megabyte is plenty")
        raw = path.read_bytes()
        texts = list(read_json_lines(path, _line_text)) if path.suffix == ".jsonl" else [raw.decode()]
    except OSError as error:
        raise WdmoeError(f"can't read the calibration text {path}: {describe_os_error(error)}") from None
    except JsonLinesError as error:
        raise WdmoeError(f"the calibration text is not JSON Lines with 'text': {error}") from None
    except UnicodeDecodeError:
        raise WdmoeError(f"{path} is not UTF-8 text: convert it, or give a .jsonl file with 'text' per line") from None
    if not any(text.strip() for text in texts):
        raise WdmoeError(f"{path} holds no text")
    return CalibrationText(path, texts, hashlib.sha256(raw).hexdigest())


def _line_text(line: bytes) -> str:
    """The text of one line of JSON."""
    document: Any = strict_json(line)
    try:
        if "text" in document:
            text = document["text"]
        else:
            text = f"Question: {document['question']}\nAnswer: {document['choices'][document['label']]}"
    except (KeyError, IndexError, TypeError):
        raise ValueError("neither 'text' nor 'question', 'choices' and 'label'") from None
    if not isinstance(text, str):
        raise ValueError("'text' is not a string")
    return text


def cut_windows(folder: Path, text: CalibrationText, *, tokens: int, positions: int) -> list[list[int]]:
    """Windows of `WINDOW_TOKENS` token ids each, evenly spread over the text.

    Args:
        folder: of the checkpoint, with its tokenizer.
        text: what to cut.
        tokens: of all windows together, at most, but at least one window.
        positions: context length of the model; windows are no longer.

    Raises:
        CheckpointError: the tokenizer can't be used.
        WdmoeError: the text is shorter than a window.
    """
    ids, _ = run_limited(_tokenise, folder, text.texts, stage="tokenizer", checkpoint=folder)
    length = min(WINDOW_TOKENS, positions)
    there = len(ids) // length
    if not there:
        raise WdmoeError(f"{text.path} has {len(ids)} tokens, too few to calibrate with: give some 10,000 words")
    count = min(there, max(1, tokens // length))
    starts = [length * (i * there // count) for i in range(count)]
    return [ids[start : start + length] for start in starts]


def _tokenise(_report: Report, folder: Path, texts: list[str]) -> list[int]:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return [id for text in texts for id in tokenizer(text, verbose=False)["input_ids"]]
    except BaseException as error:  # noqa: BLE001 - a panic of tokenizers is no Exception
        raise RefusedError(f"its tokenizer can't be used: {reason(error)}") from None
