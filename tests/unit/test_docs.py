"""The documents keep up with the code: links, paths, commands and quoted messages."""

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import chain, groupby
from pathlib import Path

import click
import pytest

from wire import __version__

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
DOCUMENTS = sorted(chain(ROOT.glob("*.md"), ROOT.glob("docs/*.md"), ROOT.glob("models/*/*.md")))
SETTINGS = [
    *(ROOT / name for name in ("Makefile", "pyproject.toml", ".ci/run")),
    *sorted(path for end in ("yaml", "yml", "j2") for path in ROOT.glob(f"testbed/**/*.{end}")),
    *sorted(ROOT.glob(".github/**/*.yml")),
]
"""Files other than documents that name files, in comments or commands."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SCRIPTS: dict[str, str] = PROJECT["project"]["scripts"]
COMMANDS: dict[str, click.Command] = {
    name: importlib.import_module(target.partition(":")[0]).cli for name, target in SCRIPTS.items()
}
PRODUCT = ("bs_coordinator", "common", "edge_node", "exporter", "testbed", "wdmoe", "wire")
TOP_LEVEL = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
MADE_BY_RUNS = ("runs", "keys", "build", "dist")
PRINTED_BY_OTHERS = ("Connection refused", "certificate is not yet valid", "Failed to connect to the host via ssh")
"""Parts of messages that come from the operating system, OpenSSL and Ansible."""

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    text = re.sub(r"^ *```.*?^ *```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@documents
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(path), f"{target}: no such heading"


@documents
def test_paths_in_backticks_exist(document: Path) -> None:
    for text in re.findall(r"`([^`\n]+)`", document.read_text(encoding="utf-8")):
        if not re.fullmatch(r"[\w.\-/*{},]+", text) or "/" not in text or text.startswith("/"):
            continue
        if text.split("/")[0] in TOP_LEVEL - set(MADE_BY_RUNS):
            assert any(matches(text)), f"{text}: no such path"


@pytest.mark.parametrize("file", SETTINGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_in_settings_exist(file: Path) -> None:
    folders = "|".join(map(re.escape, sorted(TOP_LEVEL - set(MADE_BY_RUNS))))
    for text in re.findall(rf"(?<![\w./-])(?:{folders})/[\w./*-]*", file.read_text(encoding="utf-8")):
        assert any(matches(text.rstrip("."))), f"{text}: no such path"


def matches(pattern: str) -> Iterator[Path]:
    """The paths that a pattern with `*` and one `{a,b}` names."""
    if braces := re.search(r"\{([^}]*)\}", pattern):
        found = [list(matches(pattern.replace(braces[0], choice, 1))) for choice in braces[1].split(",")]
        return chain.from_iterable(found) if all(found) else iter(())
    return ROOT.glob(pattern.rstrip("/"))


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in a document's shell blocks."""
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", text, flags=re.M | re.S):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars=True)
            words.whitespace_split = True
            for is_operator, command in groupby(words, key=lambda word: word in {"&&", "||", "|", ";", "&"}):
                if not is_operator:
                    yield list(command)


def is_placeholder(word: str) -> bool:
    return word.startswith("$") or word == "…"


@documents
def test_documented_commands_parse(document: Path) -> None:
    for words in commands(document.read_text(encoding="utf-8")):
        names = [i for i, word in enumerate(words) if Path(word).name in COMMANDS]
        if names:
            words = words[names[0] :]
            check_command(Path(words[0]).name, words[1:], " ".join(words))


def check_command(name: str, arguments: list[str], line: str) -> None:
    """Follow the sub-commands that a line names, and check that each of its options exists."""
    command = COMMANDS[name]
    context = click.Context(command, info_name=name)
    while isinstance(command, click.Group):
        if not arguments or is_placeholder(arguments[0]) or arguments[0].startswith("-"):
            # `wdmoe-node` serves when no command is named.
            assert name == "wdmoe-node", f"{line}: no command"
            arguments = ["serve", *arguments]
        found = command.get_command(context, arguments[0])
        assert found is not None, f"{line}: no command {arguments[0]}"
        command, arguments = found, arguments[1:]
        context = click.Context(command, parent=context, info_name=command.name)
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in arguments:
        if re.match(r"--?[a-z]", word):
            assert word.partition("=")[0] in known, f"{line}: no option {word}"
    if not any(is_placeholder(word) or word == "[OPTIONS]" for word in arguments):
        positional = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
        with context.scope():
            parser = command.make_parser(context)
            _, rest, _ = parser.parse_args(list(arguments))
        assert positional or not rest, f"{line}: too many arguments"


def test_every_command_is_checked() -> None:
    with pytest.raises(AssertionError, match="no option --frobnicate"):
        check_command("wdmoe-bs", ["chat", "--frobnicate"], "wdmoe-bs chat --frobnicate")
    with pytest.raises(AssertionError, match="no command talk"):
        check_command("wdmoe-bs", ["talk"], "wdmoe-bs talk")
    check_command("wdmoe-node", ["--bundle", "b", "--id", "pi1"], "wdmoe-node --bundle b --id pi1")


def every_command(command: click.Command, path: list[str]) -> Iterator[tuple[list[str], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from every_command(inner, [*path, name])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_ends_with_an_example_of_it(name: str) -> None:
    for path, command in every_command(COMMANDS[name], [name]):
        lines = [
            words for words in commands(f"```sh\n{getattr(command, 'example', '')}\n```\n") if words[0] in COMMANDS
        ]
        assert lines, f"{' '.join(path)}: no example"
        for words in lines:
            check_command(words[0], words[1:], " ".join(words))
            assert words[: len(path)] == path or path == ["wdmoe-node", "serve"], " ".join(words)


def template(string: ast.expr) -> str:
    """A string or f-string with `…` for what is filled in."""
    if isinstance(string, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "…" for part in string.values)
    return string.value if isinstance(string, ast.Constant) and isinstance(string.value, str) else ""


@cache
def messages() -> tuple[str, ...]:
    """Every string of the product, and the text of its playbooks."""
    found: set[str] = set()
    for folder in PRODUCT:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix == ".py":
                tree = ast.parse(path.read_text(encoding="utf-8"))
                found |= {template(n) for n in ast.walk(tree) if isinstance(n, (ast.JoinedStr, ast.Constant))}
            elif path.suffix in (".yml", ".j2"):
                found.add(re.sub(r"\s+", " ", path.read_text(encoding="utf-8")))
    return tuple(found)


def is_printed(quote: str) -> bool:
    """Whether some message has all fixed parts of a quote, in their order."""
    fixed = [part.strip() for part in re.split("…", quote)]
    fixed = [part for part in fixed if part not in ("", ")", "s")]
    pattern = re.compile(".*".join(map(re.escape, fixed)), re.S)
    return any(pattern.search(message) for message in messages())


def quoted_messages() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = text.partition("## Messages")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    quotes = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    return [quote for quote in quotes if " " in quote and quote != "fleet up"]


@pytest.mark.parametrize("quote", quoted_messages())
def test_quoted_messages_are_printed(quote: str) -> None:
    for printed_by_others in PRINTED_BY_OTHERS:
        quote = quote.replace(f"({printed_by_others})", "").replace(printed_by_others, "")
    assert is_printed(quote), "docs/troubleshooting.md quotes a message that the product does not have"


def test_a_message_that_is_not_printed_is_noticed() -> None:
    assert not is_printed("the … is on fire")


def documented_names() -> set[str]:
    """The names that the wheel installs at the top level, by the table in docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = text.partition("## Folders and imports\n")[2].partition("\n### ")[0]
    return set(re.findall(r"^\| `(\w+)/` \|", table, flags=re.M))


def test_the_wheel_s_names_are_documented() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert documented_names() == set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == packages


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
