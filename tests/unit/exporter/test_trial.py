"""A trunk that a base station would refuse, or that would fail while it answers, is not exported."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, processors

from bs_coordinator.engine import tokenizer as base_station
from bs_coordinator.errors import ChatTemplateError
from bs_coordinator.trunk.llama import LlamaTrunk
from exporter.bundle import trial
from exporter.bundle.bundle import export_bundle
from exporter.bundle.trial import try_trunk
from exporter.checkpoint.limited_process import RefusedError
from exporter.errors import CheckpointError
from tests.checkpoints import VOCABULARY, copy_checkpoint, edit_config
from tests.conftest import Run
from wire.errors import BundleError
from wire.manifest import Quantisation

USER = [{"role": "user", "content": "Where does basalt come from?"}]
LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('Two roles only') }}{% endif %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

Break = Callable[[Path], object]


def template(text: str) -> Break:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def tokenizer_config(**values: object) -> Break:
    return lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps(values))


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Break:
    def apply(folder: Path) -> None:
        document = json.loads((folder / "tokenizer.json").read_text())
        change(document)
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return apply


def added_token(folder: Path) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.save(str(folder / "tokenizer.json"))


def foreign_begin(folder: Path) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="[B] $A", special_tokens=[("[B]", 70_000)])
    backend.save(str(folder / "tokenizer.json"))


def no_unknown_token(folder: Path) -> None:
    Tokenizer(models.WordPiece({"rock": 0}, unk_token="none")).save(str(folder / "tokenizer.json"))


def sentencepiece_only(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def rope(**parameters: object) -> Break:
    return lambda folder: edit_config(folder, rope_parameters=parameters, rope_theta=10_000.0)


REFUSED: dict[str, tuple[Break, str]] = {
    "no default template": (
        tokenizer_config(chat_template=[{"name": "rag", "template": LOOP}]),
        "chat template fails for a user's message: This model has multiple chat templates with no default",
    ),
    "template without end of a block": (
        template("{% for m in messages %}"),
        "chat template fails for a user's message",
    ),
    "template that refuses everything": (template("{{ raise_exception('Never') }}"), "TemplateError: Never"),
    "template of an unknown filter": (template("{{ messages | polish }}"), "No filter named 'polish'"),
    "template of unknown fields": (template("{{ messages[0].parts[0].text }}"), "UndefinedError"),
    "template that writes nothing": (template("{# nothing #}"), "chat template writes nothing"),
    "template without limit": (template("{{ 'x' * 4000000 }}"), "chat template writes 4000000 characters"),
    "template longer than a base station allows": (
        template("{{ 'x' * 70000 }}" + LOOP),
        "chat template writes 70",
    ),
    "template as a number": (tokenizer_config(chat_template=7), "chat template fails for a user's message"),
    "token beyond the embeddings": (added_token, "its tokenizer has ids up to 48, but vocab_size is 48"),
    "begin beyond the embeddings": (foreign_begin, "its tokenizer makes token 70000 of a text"),
    "negative id": (tokenizer(lambda t: t["model"]["vocab"].update(w1=-1)), "its tokenizer can't be used"),
    "id as text": (tokenizer(lambda t: t["model"]["vocab"].update(w1="1")), "its tokenizer can't be used"),
    "two tokens of one id": (
        tokenizer(lambda t: t["model"]["vocab"].update(w1=t["model"]["vocab"]["w2"])),
        "its tokenizer has the id",
    ),
    "huge id": (tokenizer(lambda t: t["model"]["vocab"].update(w1=2**31)), "has ids up to 2147483648, but vocab_size"),
    "unknown kind": (tokenizer(lambda t: t["model"].update(type="Runes")), "its tokenizer can't be used"),
    "no unknown token": (no_unknown_token, "its tokenizer can't be used"),
    "limit as text": (tokenizer_config(model_max_length="512"), "its tokenizer can't be used"),
    "tokenizer.model alone": (sentencepiece_only, "tokenizer.model needs a library here and on the base station"),
    "rope of an unknown kind": (rope(rope_type="spiral"), "transformers can't use its config.json"),
    "rope without its factor": (rope(rope_type="yarn"), "transformers can't use its config.json"),
    "rope with a negative factor": (
        rope(rope_type="linear", factor=-2.0),
        "rope_parameters.factor is -2.0, a positive number expected",
    ),
    "rope with a list of factors that holds none": (
        rope(rope_type="longrope", factor=2.0, short_factor=[1.0] * 8, long_factor=[1.0] * 7 + [0]),
        "rope_parameters.long_factor is 0, a positive number expected",
    ),
    "rope by kind of layer": (
        rope(full_attention={"rope_type": "linear", "factor": "2"}),
        "rope_parameters.factor is '2', a positive number expected",
    ),
    "activation of a number": (lambda f: edit_config(f, attention_dropout="much"), "transformers can't use its config"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, mixtral: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    breakage, message = REFUSED[kind]
    source, out = copy_checkpoint(mixtral(), tmp_path / "checkpoint"), tmp_path / "out"
    breakage(source)
    result = run("exporter", "bundle", source, out, "--jobs", 1)
    assert result.returncode == 10, result.stdout + result.stderr
    assert message in result.stderr
    assert str(source) in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("text", [ENDLESS, "{{ 'x' * (2 ** 40) }}", "{{ 10 ** (10 ** 9) }}"])
def test_a_template_may_not_take_all_time_or_memory(
    text: str, mixtral: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy_checkpoint(mixtral(), tmp_path / "checkpoint")
    template(text)(source)
    monkeypatch.setattr(trial, "TEMPLATE_S", 1.0)
    with pytest.raises(
        CheckpointError, match=r"does not end within 1 s: repair or remove it|MemoryError|ended the process"
    ):
        try_trunk(source, VOCABULARY, source)


def test_a_template_may_not_take_longer_than_a_base_station_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 3.0])
    monkeypatch.setattr(trial, "time", SimpleNamespace(process_time=lambda: next(times)))
    written = SimpleNamespace(apply_chat_template=lambda *_, **__: "text")
    with pytest.raises(RefusedError, match=r"takes 3\.0 s of processor time .* a base station allows 1 s"):
        trial._render(written, USER)


def test_what_a_template_refuses_and_a_base_station_can_do_without(
    mixtral: Callable[..., Path], tmp_path: Path, run: Run
) -> None:
    source = copy_checkpoint(mixtral(), tmp_path / "checkpoint")
    once = "{% if messages | length > 2 %}{{ raise_exception('Ask once') }}{% endif %}"
    template(NO_SYSTEM + once + LOOP)(source)
    result = run("exporter", "bundle", source, tmp_path / "out", "--jobs", 1)
    assert result.returncode == 0, result.stderr
    assert "its chat template refuses a system message: TemplateError: Two roles only" in result.stdout
    assert "its chat template refuses a second turn: TemplateError: Ask once" in result.stdout


def use_as_a_base_station(folder: Path) -> None:
    """Load a trunk and read a prompt, as a base station does."""
    trunk = LlamaTrunk(folder)
    tokenizer = base_station.Tokenizer(folder)
    ids = tokenizer.encode(trial.PROBE)
    if tokenizer.has_chat_template:
        ids += tokenizer.encode_chat(USER)
    trunk.embed(torch.tensor(ids), trunk.new_cache())


ACCEPTED: dict[str, Break] = {
    "as it is": lambda folder: None,
    "template": template(LOOP),
    "named templates": tokenizer_config(
        chat_template=[{"name": "default", "template": LOOP}, {"name": "tool_use", "template": "{{ oops() }}"}]
    ),
    "a template of its own over that of the config": lambda folder: (
        template(LOOP)(folder),
        tokenizer_config(chat_template="{{ raise_exception('the other one') }}")(folder),
    ),
    "several end tokens": lambda folder: edit_config(folder, eos_token_id=[2, 5, 7]),
    "rope": rope(rope_type="linear", factor=2.0),
    "sliding window": lambda folder: edit_config(folder, sliding_window=16),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_is_exported_works_on_a_base_station(kind: str, mixtral: Callable[..., Path], tmp_path: Path) -> None:
    source, out = copy_checkpoint(mixtral(), tmp_path / "checkpoint"), tmp_path / "out"
    ACCEPTED[kind](source)
    result = export_bundle(source, out, Quantisation(scheme="fp32"), layers=[0], experts=[0], jobs=1)
    assert result.lost == ()
    use_as_a_base_station(out / "trunk")


@pytest.mark.parametrize(
    "kind",
    [
        "no default template",
        "template of an unknown filter",
        "begin beyond the embeddings",
        "rope without its factor",
    ],
)
def test_what_is_refused_does_not_work_on_a_base_station(
    kind: str, mixtral: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = copy_checkpoint(mixtral(), tmp_path / "checkpoint"), tmp_path / "out"
    export_bundle(source, out, Quantisation(scheme="fp32"), layers=[0], experts=[0], jobs=1)
    REFUSED[kind][0](out / "trunk")
    with pytest.raises((BundleError, ChatTemplateError, IndexError, KeyError)):
        use_as_a_base_station(out / "trunk")
