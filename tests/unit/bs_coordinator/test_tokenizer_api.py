"""The tokenizer over HTTP, asked as lm-evaluation-harness asks it, against transformers' own."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.http.access import ApiKey
from bs_coordinator.http.openai_api import http_app
from tests.http_site import Caller, HttpSite
from tests.text_models import save_tokenizer

KEY = "open sesame"
TEXTS = ("a simple test", " with a space before", "twö\nlines  and\ttabs", "<s>named</s>", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, "sentencepiece", model_max_length=16)
    return folder


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[HttpSite]:
    unused: Any = None  # these paths need no answers
    app = http_app(unused, Tokenizer(folder), model="tiny", stall_s=8, max_positions=64, keys=[ApiKey("ada", KEY, 1)])
    site = HttpSite(app, KEY)
    yield site
    site.close()


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_its_tokens_and_texts_are_those_of_transformers(site: HttpSite, reference: Any) -> None:
    for text in TEXTS:
        for special in (True, False):
            expected = reference(text, add_special_tokens=special)["input_ids"]
            asked = {"prompt": text, "add_special_tokens": special}
            status, _, answer = site.ask("POST", "/tokenize", asked)
            assert (status, answer["tokens"], answer["count"]) == (200, expected, len(expected))
            assert answer["max_model_len"] == 64
            told = site.ask("POST", "/detokenize", {"tokens": expected})[2]
            assert told == {"prompt": reference.decode(expected)}


def test_it_names_the_special_tokens(site: HttpSite, reference: Any) -> None:
    info = site.ask("GET", "/tokenizer_info")[2]
    assert {name: info[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")} == {
        "bos_token": reference.bos_token, "eos_token": reference.eos_token, "pad_token": reference.pad_token,
        "unk_token": reference.unk_token,
    }  # fmt: skip
    assert info["chat_template"] == reference.chat_template
    # The id of the end token, as lm-evaluation-harness finds it.
    asked = {"prompt": info["eos_token"], "add_special_tokens": False}
    assert site.ask("POST", "/tokenize", asked)[2]["tokens"] == [reference.eos_token_id]


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": [1]}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "surprise": 1}, 400, "surprise"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "other"),
        ("/tokenize", {"prompt": "word " * 9000}, 400, "characters"),
        ("/tokenize", b"\xff", 400, "UTF-8"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1_000_000]}, 400, "1000000"),
    ],
)
def test_bad_requests_get_the_reason(site: HttpSite, path: str, body: Any, status: int, word: str) -> None:
    answer = site.ask("POST", path, body)
    assert answer[0] == status
    assert word in answer[2]["error"]["message"]


def test_it_needs_the_key(site: HttpSite) -> None:
    stranger = Caller(site.port, "guess")
    assert stranger.ask("GET", "/tokenizer_info")[0] == 401
    assert stranger.ask("POST", "/tokenize", {"prompt": "x"})[0] == 401
    assert stranger.ask("POST", "/detokenize", {"tokens": []})[0] == 401


def test_a_prompt_beyond_the_context_prints_no_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer(folder)
    library = logging.getLogger("transformers.tokenization_utils_base")  # does not propagate
    library.addHandler(caplog.handler)
    try:
        assert len(tokenizer.encode("a simple test " * 9)) > 16
        assert len(tokenizer.encode_chat([{"role": "user", "content": "a simple test " * 9}])) > 16
    finally:
        library.removeHandler(caplog.handler)
    assert caplog.records == []
