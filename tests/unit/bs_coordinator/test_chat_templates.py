"""Chat templates that refuse a conversation or fail: one line, and what to do about a system message."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models, pre_tokenizers

from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.errors import ChatTemplateError

SYSTEM = {"role": "system", "content": "Answer in verse."}
USER = {"role": "user", "content": "What is a cap rock?"}
TURN = "{{ '<' + m['role'] + '>' + m['content'] }}"


@pytest.fixture
def tokenizer_of(tmp_path: Path) -> Callable[[str], Tokenizer]:
    """A word tokenizer with this chat template."""

    def make(template: str) -> Tokenizer:
        backend = BackendTokenizer(models.WordLevel({"[U]": 0, "rock": 1}, unk_token="[U]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        (tmp_path / "chat_template.jinja").write_text(template)
        return Tokenizer(tmp_path)

    return make


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        ("{{ raise_exception('Users and assistants only') }}", "Users and assistants only"),
        ("{{ raise_exception('Two\nlines') }}", "Two"),
        ("{{ {}['user' + 'name'] + 1 }}", "username"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_a_refused_system_message_is_told_with_what_to_do(
    refusal: str, reason: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    condition = "{% if m['role'] not in ['user', 'assistant'] %}"
    tokenizer = tokenizer_of(f"{{% for m in messages %}}{condition}{refusal}{{% endif %}}{TURN}{{% endfor %}}")
    assert tokenizer.encode_chat([USER])
    with pytest.raises(ChatTemplateError) as caught:
        tokenizer.encode_chat([SYSTEM, USER])
    assert str(caught.value).startswith(
        "the model's chat template refuses these messages: it takes no system message ("
    )
    assert reason in str(caught.value)
    assert str(caught.value).endswith("put its text into the first user message instead")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], [SYSTEM]])
def test_a_template_that_fails_without_a_system_message_too(
    messages: list[dict[str, str]], tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of("{{ raise_exception('tools needed') }}")
    with pytest.raises(ChatTemplateError, match=r"^the model's chat template refuses these messages: tools needed$"):
        tokenizer.encode_chat(messages)


def test_a_template_that_takes_system_messages(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizer_of(f"{{% for m in messages %}}{TURN}{{% endfor %}}")
    assert len(tokenizer.encode_chat([SYSTEM, USER])) > len(tokenizer.encode_chat([USER]))
