"""Chat templates that refuse a conversation or fail: one line, and what to do about a system message."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models, pre_tokenizers

from bs_coordinator.engine.template_process import PROCESSES
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
def test_a_refused_system_message_names_the_remedy(
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


_LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("waste", "reason"),
    [
        (_LOOPS, "more than 1 s of processor time"),
        # At once, so that the processor time to fill what is allowed does not count.
        ("{{ messages[0].content * 10000000000 }}", "MemoryError"),
        ("{{ 'rock ' * 99999 }}", r"it writes \d+ characters"),
    ],
)
def test_a_template_that_takes_too_much_fails_only_its_caller(
    waste: str, reason: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    """Bundles are tried when they are exported, but what a user writes can be what makes a template endless."""
    condition = "{% if 'rock' in messages[0].content %}"
    tokenizer = tokenizer_of(f"{condition}{waste}{{% endif %}}{{% for m in messages %}}{TURN}{{% endfor %}}")
    harmless = [{"role": "user", "content": "What is a stone?"}]
    expected = tokenizer.encode_chat(harmless)
    with ThreadPoolExecutor(2) as threads:
        wasteful = threads.submit(tokenizer.encode_chat, [USER])
        assert tokenizer.encode_chat(harmless) == expected  # meanwhile
        with pytest.raises(ChatTemplateError, match=f"^the model's chat template .*{reason}"):
            wasteful.result()
    assert tokenizer.encode_chat(harmless) == expected


def test_templates_are_rendered_as_transformers_does_it(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{% endfor %}{{ add_generation_prompt }}"
    messages = [SYSTEM, {"role": "user", "content": "naïve 🙂 \x00 \ud7ff <&> rock"}]
    transformers_own = tokenizer_of(template)._tokenizer
    expected = transformers_own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert PROCESSES.render(template, messages, transformers_own.special_tokens_map) == expected
