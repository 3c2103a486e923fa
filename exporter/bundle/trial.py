"""Tries a trunk's config, tokenizer and chat template as a base station will use them, before a bundle is published.

A chat template is a program and a tokenizer may hold any expression: they run in a process that can be ended, with
limits on time and memory.
"""

import importlib.util
import multiprocessing
import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from exporter.errors import CheckpointError

PROBE = 'Why does ice float?\n\tOne "half" costs 3.50 €, naïve 世界 🙂.'
"""Text with blanks, digits, quotation marks and characters of one to four bytes."""
_USER = {"role": "user", "content": PROBE}
_ANSWER = {"role": "assistant", "content": "It is lighter than water."}
_SYSTEM = {"role": "system", "content": "Answer in one sentence."}

TEMPLATE_S = 20.0
"""Deadline for rendering one conversation, which takes milliseconds."""
_LOAD_S = 300.0
"""Deadline for importing transformers and loading the tokenizer, which takes minutes on a slow card."""
_CPU_S = 400
_MEMORY_BYTES = 4 << 30
_MAX_RENDERED = 1 << 20
_MAX_REASON = 300
# What takes seconds to import is imported once, by the process from which the others are forked.
_IMPORTED_ONCE = ["transformers.models.mixtral.modeling_mixtral", "transformers.models.auto.tokenization_auto"]


def try_trunk(folder: Path, vocab: int, checkpoint: Path) -> list[str]:
    """Load config and tokenizer, encode and decode a text, and render the chat template.

    Args:
        folder: `trunk/` of the bundle.
        vocab: number of embeddings.
        checkpoint: named in messages.

    Returns:
        One line for each thing that the chat template refuses and a base station can do without.

    Raises:
        CheckpointError: a base station would refuse the trunk, or fail while it answers.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, folder, vocab), daemon=True)
    process.start()
    theirs.close()
    stage, deadline_s, notes = "tokenizer", _LOAD_S, []
    try:
        while True:
            if not pipe.poll(deadline_s):
                raise CheckpointError(
                    f"{checkpoint}: its {stage} does not end within {deadline_s:.0f} s: mend or remove it"
                )
            kind, text = pipe.recv()
            if kind == "stage":
                stage, deadline_s = text, TEMPLATE_S
            elif kind == "note":
                notes.append(f"{checkpoint}: {text}")
            elif kind == "failed":
                raise CheckpointError(f"{checkpoint}: {text}")
            else:
                return notes
    except EOFError:
        process.join(_LOAD_S)
        raise CheckpointError(
            f"{checkpoint}: its {stage} ended the process that tried it (exit code {process.exitcode}): it is damaged, "
            "or needs too much memory"
        ) from None
    finally:
        process.kill()
        process.join()
        pipe.close()


class _RefusedError(Exception):
    """The message says what is wrong with a trunk."""


def _serve(pipe: Connection, folder: Path, vocab: int) -> None:
    """Try a trunk in this process; sends stages, notes, and at last `failed` or `done`."""
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    # Libraries print warnings; what matters here is sent.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    try:
        _try_config(folder)
        tokenizer = _try_tokenizer(folder, vocab)
        if tokenizer.chat_template:
            _try_template(tokenizer, vocab, pipe)
    except _RefusedError as error:
        pipe.send(("failed", str(error)))
    else:
        pipe.send(("done", ""))


def _try_config(folder: Path) -> None:
    try:
        import torch
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding
    except ImportError as error:
        raise _RefusedError(f"can't be tried without transformers: pip install -e .[exporter] ({error})") from None
    try:
        config: Any = MixtralConfig.from_pretrained(folder)
        ends = torch.tensor([[0, config.max_position_embeddings - 1]])
        finite = all(bool(part.isfinite().all()) for part in MixtralRotaryEmbedding(config)(torch.zeros(1), ends))
    except Exception as error:  # noqa: BLE001 - transformers raises anything for a config that it can't use
        raise _RefusedError(f"transformers can't use its config.json: {_reason(error)}") from None
    if not finite:
        raise _RefusedError(
            "its config.json makes rotary embeddings that are not finite: see rope_theta and rope_parameters"
        )


def _try_tokenizer(folder: Path, vocab: int) -> Any:
    """The tokenizer, loaded as `bs_coordinator.engine.tokenizer` loads it."""
    from tokenizers.decoders import DecodeStream
    from transformers import AutoTokenizer

    only_model = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if only_model and importlib.util.find_spec("sentencepiece") is None:
        raise _RefusedError(
            "its tokenizer.model needs a library here and on the base station: pip install sentencepiece, or add the "
            "checkpoint's tokenizer.json"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        backend = tokenizer.backend_tokenizer
        largest = max(tokenizer.get_vocab().values())
        ids = tokenizer(PROBE)["input_ids"]
    except BaseException as error:  # noqa: BLE001 - a panic of tokenizers is no Exception
        raise _RefusedError(f"its tokenizer can't be used: {_reason(error)}") from None
    if largest >= vocab:
        raise _RefusedError(
            f"its tokenizer has ids up to {largest}, but vocab_size is {vocab}: they are of different models, or "
            "tokens were added without resizing the embeddings"
        )
    _check_ids(ids, vocab, "a text")
    try:
        stream = DecodeStream(skip_special_tokens=True)
        for id in (*ids, vocab - 1):
            stream.step(backend, id)
        tokenizer.decode(ids)
    except BaseException as error:  # noqa: BLE001 - as above
        raise _RefusedError(f"its tokenizer can't decode what it encodes: {_reason(error)}") from None
    return tokenizer


def _check_ids(ids: list[int], vocab: int, of: str) -> None:
    if not ids:
        raise _RefusedError(f"its tokenizer makes no tokens of {of}")
    if max(ids) >= vocab:
        raise _RefusedError(f"its tokenizer makes token {max(ids)} of {of}, but vocab_size is {vocab}")


def _try_template(tokenizer: Any, vocab: int, pipe: Connection) -> None:
    try:
        text = _render(tokenizer, [_USER], pipe)
        _check_ids(tokenizer(text, add_special_tokens=False)["input_ids"], vocab, "what its chat template writes")
    except _RefusedError:
        raise
    except Exception as error:  # noqa: BLE001 - a template is a program, which raises anything
        raise _RefusedError(
            f"its chat template fails for a user's message: {_reason(error)}: mend chat_template.jinja or the "
            "chat_template in tokenizer_config.json, or remove it"
        ) from None
    for messages, what in (([_SYSTEM, _USER], "a system message"), ([_USER, _ANSWER, _USER], "a second turn")):
        try:
            _render(tokenizer, messages, pipe)
        except _RefusedError:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            pipe.send(("note", f"its chat template refuses {what}: {_reason(error)}"))


def _render(tokenizer: Any, messages: list[dict[str, str]], pipe: Connection) -> str:
    """A conversation rendered as `bs_coordinator.engine.tokenizer` does it."""
    pipe.send(("stage", "chat template"))
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not isinstance(text, str) or not text:
        raise _RefusedError("its chat template writes nothing for a user's message")
    if len(text) > _MAX_RENDERED:
        raise _RefusedError(f"its chat template writes {len(text)} characters for a message of one line")
    return text


def _reason(error: BaseException) -> str:
    """The first line of an error's message, with its type where the message alone says little."""
    first = next(iter(str(error).strip().splitlines()), "")
    text = first if isinstance(error, ValueError | OSError) and first else f"{type(error).__name__}: {first}"
    return text.rstrip(": ")[:_MAX_REASON]
