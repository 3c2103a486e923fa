"""Tries a trunk's tokenizer and chat template as a base station will use them, before a bundle is published."""

import importlib.util
import time
from pathlib import Path
from typing import Any

from exporter.checkpoint.limited_process import RefusedError, Report, reason, run_limited

PROBE = 'Why does ice float?\n\tOne "half" costs 3.50 €, naïve 世界 🙂.'
"""Text with blanks, digits, quotation marks and characters of one to four bytes."""
_USER = {"role": "user", "content": PROBE}
_ANSWER = {"role": "assistant", "content": "It is lighter than water."}
_SYSTEM = {"role": "system", "content": "Answer in one sentence."}

TEMPLATE_S = 20.0
"""Deadline for rendering three conversations, which takes milliseconds."""
# What base stations allow (`bs_coordinator.engine.template_process`) beside a few times the length of the messages.
_MAX_RENDERED = 1 << 16
_CPU_S = 1.0


def try_trunk(folder: Path, vocab: int, checkpoint: Path) -> list[str]:
    """Load the tokenizer, encode and decode a text, and render the chat template.

    Args:
        folder: `trunk/` of the bundle.
        vocab: number of embeddings.
        checkpoint: named in messages.

    Returns:
        One line for each thing that the chat template refuses and a base station can do without.

    Raises:
        CheckpointError: a base station would refuse the trunk, or fail while it answers.
    """
    _, notes = run_limited(_try, folder, vocab, TEMPLATE_S, stage="tokenizer", checkpoint=checkpoint)
    return notes


def _try(report: Report, folder: Path, vocab: int, template_s: float) -> None:
    tokenizer = _try_tokenizer(folder, vocab)
    if tokenizer.chat_template:
        report.stage("chat template", template_s)
        _try_template(tokenizer, vocab, report)


def _try_tokenizer(folder: Path, vocab: int) -> Any:
    """The tokenizer, loaded as `bs_coordinator.engine.tokenizer` loads it."""
    from tokenizers.decoders import DecodeStream
    from transformers import AutoTokenizer

    only_model = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if only_model and importlib.util.find_spec("sentencepiece") is None:
        raise RefusedError(
            "its tokenizer.model needs a library here and on the base station: pip install sentencepiece, or add the "
            "checkpoint's tokenizer.json"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
        vocabulary = tokenizer.get_vocab()
        largest = max(vocabulary.values())
        ids = tokenizer(PROBE)["input_ids"]
    except BaseException as error:  # noqa: BLE001 - a panic of tokenizers is no Exception
        raise RefusedError(f"its tokenizer can't be used: {reason(error)}") from None
    if largest >= vocab:
        raise RefusedError(
            f"its tokenizer has ids up to {largest}, but vocab_size is {vocab}: they are of different models, or "
            "tokens were added without resizing the embeddings"
        )
    _check_unique(vocabulary)
    _check_ids(ids, vocab, "a text")
    try:
        stream = DecodeStream(skip_special_tokens=True)
        for id in (*ids, vocab - 1):
            stream.step(backend, id)
        tokenizer.decode(ids)
    except BaseException as error:  # noqa: BLE001 - as above
        raise RefusedError(f"its tokenizer can't decode what it encodes: {reason(error)}") from None
    return tokenizer


def _check_unique(vocabulary: dict[str, int]) -> None:
    """Refuse two tokens of one id: only one of them could be decoded."""
    if len(set(vocabulary.values())) == len(vocabulary):
        return
    names: dict[int, str] = {}
    for name, id in vocabulary.items():
        if names.setdefault(id, name) != name:
            raise RefusedError(f"its tokenizer has the id {id} for two tokens, {names[id][:40]!r} and {name[:40]!r}")


def _check_ids(ids: list[int], vocab: int, of: str) -> None:
    if not ids:
        raise RefusedError(f"its tokenizer makes no tokens of {of}")
    if max(ids) >= vocab:
        raise RefusedError(f"its tokenizer makes token {max(ids)} of {of}, but vocab_size is {vocab}")


def _try_template(tokenizer: Any, vocab: int, report: Report) -> None:
    try:
        text = _render(tokenizer, [_USER])
        _check_ids(tokenizer(text, add_special_tokens=False)["input_ids"], vocab, "what its chat template writes")
    except RefusedError:
        raise
    except Exception as error:  # noqa: BLE001 - a template is a program, which raises anything
        raise RefusedError(
            f"its chat template fails for a user's message: {reason(error)}: repair chat_template.jinja or the "
            "chat_template in tokenizer_config.json, or remove it"
        ) from None
    for messages, what in (([_SYSTEM, _USER], "a system message"), ([_USER, _ANSWER, _USER], "a second turn")):
        try:
            _render(tokenizer, messages)
        except RefusedError:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            report.note(f"its chat template refuses {what}: {reason(error)}")


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """A conversation rendered as `bs_coordinator.engine.tokenizer` does it."""
    # The first time, libraries are imported and the template is compiled.
    tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    began = time.process_time()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if (spent := time.process_time() - began) > _CPU_S:
        raise RefusedError(
            f"its chat template takes {spent:.1f} s of processor time for a message of one line, a base station allows "
            f"{_CPU_S:.0f} s"
        )
    if not isinstance(text, str) or not text:
        raise RefusedError("its chat template writes nothing for a user's message")
    if len(text) > _MAX_RENDERED:
        raise RefusedError(f"its chat template writes {len(text)} characters for a message of one line")
    return text
