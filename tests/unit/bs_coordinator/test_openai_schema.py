"""What callers may ask for, option by option."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_coordinator.config import SamplingConfig
from bs_coordinator.http.openai_schema import Chat, Completion
from bs_coordinator.http.request_json import parse_request
from bs_coordinator.http.stop_strings import StopText


def _completion(**options: object) -> Completion:
    return parse_request(json.dumps({"prompt": "Hello", **options}).encode(), Completion)


def _chat(*messages: object, **options: object) -> Chat:
    return parse_request(json.dumps({"messages": messages, **options}).encode(), Chat)


@pytest.mark.parametrize(
    "options",
    [
        dict.fromkeys(["max_tokens", "max_completion_tokens", "temperature", "top_p", "stream", "stream_options", "n"]),
        {"n": 1, "best_of": 1, "echo": False, "suffix": "", "presence_penalty": 0, "frequency_penalty": 0.0},
        {"logprobs": None, "logit_bias": {}, "response_format": {"type": "text"}, "stop": [], "modalities": ["text"]},
        {"logprobs": False, "tools": [], "tool_choice": "none", "functions": [], "top_logprobs": 0, "stop": None},
        {"model": "any", "user": "me", "metadata": {"a": 1}, "store": True, "service_tier": "auto"},
        {"stream": False, "stream_options": {"include_usage": None, "include_obfuscation": True}},
        {"stop": "", "max_tokens": 256.0, "n": 1.0, "logit_bias": {"7": None}, "stream_options": {"unknown": None}},
        {"ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True, "length_penalty": 1.0, "priority": 0},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"stop": ["", ""], "prediction": {"type": "content", "content": "x"}, "prompt_cache_retention": "24h"},
        {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "reasoning_effort": "none", "verbosity": "medium"},
        {"unknown": None},
        {"logit_bias": [], "stream_options": [], "chat_template_kwargs": [], "metadata": []},  # as PHP writes {}
        {"logit_bias": {"7": 0, "8": 0.0}, "stop": [None, ""], "guided_choice": [], "extra_body": {}, "grammar": ""},
        {"mirostat": 0, "repeat_penalty": 1.0, "typ_p": 1, "n_probs": 0, "xtc_probability": 0.0, "id_slot": -1},
        {"thinking": {"type": "disabled"}, "reasoning": {"effort": "none"}, "include_reasoning": True, "audio": {}},
    ],
)
def test_empty_options_change_nothing(options: dict[str, object]) -> None:
    plain = SamplingConfig(seed=7)
    assert _completion(seed=7, **options).sampling == plain
    assert _chat({"role": "user", "content": "Hi"}, seed=7, **options).sampling == plain


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("logit_bias", {"1": 5}),
        ("response_format", {"type": "json_object"}),
        ("best_of", 3),
        ("n", 0),
        ("n", 129),
        ("n", 1.5),
        ("suffix", "."),
        ("stop", ["."] * 17),
        ("stop", [7]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("function_call", {"name": "f"}),
        ("tools", "f"),
        ("functions", ["f"]),
        ("logprobs", "yes"),
        ("top_logprobs", 2),
        ("top_logprobs", 21),
        ("min_tokens", 300),
        ("ignore_eos", 1),
        ("stop_token_ids", [2]),
        ("skip_special_tokens", False),
        ("reasoning_effort", "high"),
        ("top_k", 3),
        ("logit_bias", {"7": 0, "8": -1}),
        ("logit_bias", [7]),
        ("thinking", {"type": "enabled"}),
        ("repeat_penalty", 1.1),
        ("guided_json", {"type": "object"}),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("n", True),
        ("seed", "7"),
        ("max_tokens", -1),
        ("stream", "true"),
        ("echo", 0),
        ("stream_options", True),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", 1e300),
        ("top_k", 3.0),
        ("repetition_penalty", 1.1),
        ("verbosity", "low"),
        ("temperature", 2.01),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("top_p", 0),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", 2**200),
        ("stream_options", {"include_usage": 1}),
        ("stream_options", {"chunk_size": 1}),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(name: str, value: object) -> None:
    for ask in (_completion, lambda **options: _chat({"role": "user", "content": "Hi"}, **options)):
        with pytest.raises(ValueError, match=name) as refused:
            ask(**{name: value})
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        ({"tools": [{"type": "function"}]}, ["tools"]),
        ({"tools": [{"type": "function"}], "tool_choice": "auto", "parallel_tool_calls": True}, ["tools"]),
        ({"functions": [{"name": "f"}], "function_call": "auto"}, ["functions"]),
        ({"tools": [{"type": "function"}], "tool_choice": "none"}, []),
        ({"tools": [], "tool_choice": "auto", "parallel_tool_calls": False}, []),
        ({"tools": None, "tool_choice": None}, []),
    ],
)
def test_tools_that_need_not_be_called_change_no_answer(options: dict[str, object], ignored: list[str]) -> None:
    chat = _chat({"role": "user", "content": "Hi"}, seed=7, **options)
    assert chat.sampling == SamplingConfig(seed=7)
    assert chat.ignored == ignored


def test_completions_have_no_tools() -> None:
    with pytest.raises(ValueError, match="`tools` is not implemented"):
        _completion(tools=[{"type": "function"}])


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"prompt": ""}',
        b'{"prompt": []}',
        b'{"prompt": [""]}',
        b'{"prompt": [[]]}',
        b'{"prompt": [null]}',
        b'{"prompt": [true]}',
        b'{"prompt": [-1]}',
        b'{"prompt": [[-1]]}',
        b'{"prompt": [1.5]}',
        b'{"prompt": [1, "x"]}',
        b'{"prompt": [1, [2]]}',
        b'{"prompt": 7}',
        b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"prompt": null}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "user": ' + b"[" * 100_000,
        b'{"prompt": "x",}',
        b'{"prompt": "x"}{"prompt": "x"}',
        b"{'prompt': 'x'}",
        b"prompt=x",
        b'{"prompt": "x", "surprise\\n\\u001b[2J\\u2028": 1}',
        b'{"prompt": "x", "' + b"surprise" * 999 + b'": 1}',
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
    ],
)
def test_invalid_requests_are_refused_in_one_line(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w") as refused:
        parse_request(raw, Completion)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) <= 300


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"])
def test_other_encodings_than_utf_8_are_refused_as_such(encoding: str) -> None:
    with pytest.raises(ValueError, match="not text in UTF-8"):
        parse_request('{"prompt": "Grüße"}'.encode(encoding), Completion)
    assert parse_request('{"prompt": "Grüße"}'.encode("utf-8-sig"), Completion).prompts == ["Grüße"]


def test_the_last_of_two_values_counts() -> None:
    raw = b'{"prompt": "Hello", "max_tokens": 3, "stream_options": {"include_usage": false}, "max_tokens": 5}'
    assert parse_request(raw, Completion).most_tokens == 5


def test_limits_are_taken_as_they_are() -> None:
    asked = _completion(max_tokens=3, max_completion_tokens=5, temperature=2, top_p=0.5, seed=-(2**63))
    assert asked.sampling == SamplingConfig(5, 2.0, 0.5, -(2**63))
    assert _completion(seed=2**63 - 1).sampling.seed == 2**63 - 1


def test_stops_are_one_or_several() -> None:
    assert [_completion(stop=stop).stops for stop in (".", [".", "!"], [], None)] == [["."], [".", "!"], [], []]


_letters = st.text("ab", min_size=1, max_size=4)


@given(st.lists(_letters, max_size=8), st.lists(_letters, max_size=3))
def test_a_text_ends_before_the_first_stop_however_it_is_chunked(pieces: list[str], stops: list[str]) -> None:
    text = StopText(stops)
    given = ""
    for piece in pieces:
        given += text.push(piece)
        if text.hit:
            break
    else:
        given += text.rest()
    whole = "".join(pieces)
    ends = [n for n in range(len(whole) + 1) if whole[:n].endswith(tuple(stops))]
    wanted = min((whole[: ends[0] - len(s)] for s in stops if whole[: ends[0]].endswith(s)), key=len) if ends else whole
    assert (given, text.hit) == (wanted, bool(ends))


def test_a_text_is_held_back_only_where_a_stop_may_have_begun() -> None:
    text = StopText(["\n\n", "END"])
    assert [text.push(piece) for piece in ("Hello", "\n", "world E", "N", "d", "\n", "\n")] == [
        "Hello", "", "\nworld ", "", "ENd", "", "",
    ]  # fmt: skip


def test_without_a_seed_each_request_has_its_own() -> None:
    seeds = {_completion(**asked).sampling.seed for asked in ({}, {}, {"seed": None}, {"seed": None})}
    assert len(seeds) == 4


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("One", "One"), (["One"], "One"), ([5, 6], [5, 6]), ([5.0, 6], [5, 6]), ([[5, 6]], [5, 6]), ([0], [0])],
)
def test_a_prompt_is_a_text_or_its_tokens(prompt: object, expected: object) -> None:
    assert _completion(prompt=prompt).prompts == [expected]


@pytest.mark.parametrize("prompts", [["One", "Two"], [[5], [6]], ["One", [6]]])
def test_prompts_may_be_several(prompts: object) -> None:
    assert _completion(prompt=prompts).prompts == prompts


def test_one_request_has_a_limited_number_of_choices() -> None:
    assert len(_completion(prompt=["x"] * 2, n=128).prompts) == 2
    with pytest.raises(ValueError, match="3 prompts with `n` 128: one request has at most 256 choices"):
        _completion(prompt=["x"] * 3, n=128)


def test_choices_have_consecutive_seeds() -> None:
    assert [sampling.seed for sampling in _completion(n=3, seed=5).samplings] == [5, 6, 7]
    first, second = _completion(n=2).samplings
    assert second.seed == first.seed + 1


def test_log_probabilities_are_asked_for_as_each_endpoint_names_them() -> None:
    def asked(sampling: SamplingConfig) -> tuple[int | None, bool]:
        return sampling.logprobs, sampling.prompt_logprobs

    user = {"role": "user", "content": "Hi"}
    assert asked(_completion(logprobs=3).sampling) == (3, False)
    assert asked(_completion(logprobs=0, echo=True).sampling) == (0, True)
    assert asked(_completion(echo=True).sampling) == (None, False)
    assert asked(_chat(user, logprobs=True).sampling) == (0, False)
    assert asked(_chat(user, logprobs=True, top_logprobs=20).sampling) == (20, False)
    with pytest.raises(ValueError, match="`top_logprobs` needs `logprobs`"):
        _chat(user, top_logprobs=2)


def test_only_an_echo_may_have_no_new_tokens() -> None:
    assert _completion(echo=True, max_tokens=0).most_tokens == 0
    for ask in (_completion, lambda **options: _chat({"role": "user", "content": "Hi"}, **options)):
        with pytest.raises(ValueError, match="max_tokens"):
            ask(max_tokens=0)


@pytest.mark.parametrize("best_of", [None, 2])
def test_as_many_choices_as_are_drawn_are_returned(best_of: int | None) -> None:
    assert _completion(n=2, best_of=best_of).n == 2
    with pytest.raises(ValueError, match="best_of"):
        _completion(n=2, best_of=3)


@pytest.mark.parametrize(
    "extra",
    [
        {"tool_calls": [], "function_call": None, "audio": None, "refusal": None, "annotations": []},
        {"reasoning_content": None, "reasoning": None, "refusal": ""},
        {"reasoning_content": "", "reasoning": "", "tool_calls": None, "unknown": None, "name": None},
        {"images": [], "reasoning_details": [], "thinking_blocks": [], "function_call": {}, "name": ""},
        {"provider_specific_fields": {"refusal": None}, "tool_call_id": "", "prefix": False},
        {"content": [{"type": "text", "text": "Yes?", "annotations": [], "logprobs": None}]},
    ],
)
def test_empty_fields_of_other_servers_answers_are_ignored(extra: dict[str, object]) -> None:
    asked = _chat({"role": "assistant", "content": "Yes?", **extra})
    assert asked.conversation == [{"role": "assistant", "content": "Yes?"}]


@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": []}, {"content": ""}])
def test_an_earlier_answer_may_have_been_empty(content: dict[str, object]) -> None:
    assert _chat({"role": "assistant", **content}).conversation == [{"role": "assistant", "content": ""}]
    if content in ({"content": None}, {}):
        with pytest.raises(ValueError, match="content"):
            _chat({"role": "user", **content})


def test_developers_are_the_system_and_names_are_kept() -> None:
    parts = [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": " brief"}]
    asked = _chat({"role": "developer", "content": parts}, {"role": "user", "name": "Ada", "content": "Hi"})
    assert asked.conversation == [
        {"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi", "name": "Ada"},
    ]  # fmt: skip


def test_messages() -> None:
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    earlier: dict[str, object] = {
        "role": "assistant",
        "content": "Yes?",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
    }
    asked = _chat({"role": "user", "content": parts}, earlier)
    assert asked.conversation == [{"role": "user", "content": "Good day"}, {"role": "assistant", "content": "Yes?"}]
    bad: list[tuple[str, Any]] = [
        ("content", {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        ("content", {"role": "user", "content": None}),
        ("content", {"role": "user", "content": [None]}),
        ("content", {"role": "user", "content": ["Hi"]}),
        ("messages", None),
        ("role", {"role": "tool", "content": "4"}),
        ("name", {"role": "user", "content": "Hi", "name": 7}),
        ("tool_calls", {"role": "assistant", "content": "", "tool_calls": [{}]}),
        ("refusal", {"role": "assistant", "content": "", "refusal": "No."}),
        ("reasoning_content", {"role": "assistant", "content": "", "reasoning_content": "Hm."}),
        ("audio", {"role": "assistant", "content": "", "audio": {"id": "a"}}),
        ("text", {"role": "user", "content": [{"type": "text"}]}),
        ("messages", "Hi"),
    ]
    for word, message in bad:
        with pytest.raises(ValueError, match=word):
            _chat(message)
