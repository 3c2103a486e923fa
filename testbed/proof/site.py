"""The documentation site: python -m testbed.proof.site FOLDER (make docs).

The pages are the Markdown files of this repository, copied to a folder of their own in the same places, so that their
links work as on GitHub. The page of all options is made from the commands themselves. Needs a clone, zensical, and
otherwise only what every command needs.
"""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
CONFIG = "mkdocs.yml"
PAGES = ("*.md", "docs/*.md", "models/*/README.md", "tests/unit/edge_node/recordings/README.md")
FILES = ("docs/images/*", "docs/notebooks/*", "docs/site.css", "LICENSE", "CITATION.cff")
"""Other files that pages show or link to."""
OPTIONS = Path("docs") / "options.md"
_OPTIONS_HEAD = """# Options of all commands

The help of every command, as `--help` prints it. [Commands](commands.md) gives an overview.
"""
_WIDTH = 100


def build(folder: Path, *, root: Path = ROOT, timeout_s: float = 300) -> str:
    """Write the site of the documents in `root` to `folder/site`; what is there already is replaced.

    Returns:
        What is wrong, such as links to missing pages or headings; empty if nothing is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    documents = folder / "documents"
    for old in (documents, folder / "site"):
        shutil.rmtree(old, ignore_errors=True)
    for pattern in (*PAGES, *FILES):
        for source in root.glob(pattern):
            copy = documents / source.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".md":
                copy.write_text(for_python_markdown(source.read_text(encoding="utf-8")), encoding="utf-8")
            else:
                shutil.copy(source, copy)
    (documents / OPTIONS).write_text(options_markdown(), encoding="utf-8")
    shutil.copy(root / CONFIG, folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    try:
        done = subprocess.run(
            command, cwd=folder, timeout=timeout_s, check=False, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"zensical did not end within {timeout_s:g} s"
    if done.returncode == 0:
        return ""
    return click.unstyle(done.stdout).partition("Traceback")[0].strip() or f"zensical ended with {done.returncode}"


def for_python_markdown(text: str) -> str:
    """The same document for zensical's parser, which differs from GitHub's in lists and HTML.

    What belongs to an item must be indented by four spaces for each level, a list needs an empty line before it, and
    Markdown within HTML must be announced.
    """
    lines: list[str] = []
    columns: list[int] = []  # where the contents of the present item begin, and of those that it is in
    in_code = spaced = False
    for line in text.replace("<details>", '<details markdown="1">').splitlines():
        body = line.lstrip(" ")
        indent, depth = len(line) - len(body), len(columns)
        follows_text = bool(lines and lines[-1])
        item = None if in_code else re.match(r"(?:[-*+]|(\d+)\.) +", body)
        if item and follows_text and depth == 0 and item[1] not in (None, "1"):
            item = None  # a sentence that ends with a number
        while columns and body and not in_code and indent < columns[-1] and (item or not follows_text):
            columns.pop()
        if item and follows_text and item[1] not in (None, "1") and len(columns) == depth:
            body, item = body.replace(".", "\\.", 1), None
        if item:
            if follows_text and (depth == 0 or spaced):
                lines.append("")
            lines.append("    " * len(columns) + body)
            columns.append(indent + item.end())
        elif body:
            extra = max(0, indent - columns[-1]) if columns else indent
            lines.append("    " * len(columns) + " " * extra + body)
        else:
            lines.append("")
        spaced = bool(columns) and (spaced or not body)
        in_code ^= body.startswith("```")
    return "\n".join(lines) + "\n"


def commands(root: Path = ROOT) -> Iterator[tuple[str, click.Command]]:
    """Every command and group of this project with its full name, groups before what they contain."""
    scripts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    for name, target in scripts.items():
        yield from _with_subcommands(name, importlib.import_module(target.partition(":")[0]).cli)


def _with_subcommands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from _with_subcommands(f"{name} {inner.name}", inner)


def options_markdown() -> str:
    """The help of every command."""
    parts = [_OPTIONS_HEAD]
    for name, command in commands():
        context = click.Context(command, info_name=name, terminal_width=_WIDTH, help_option_names=["-h", "--help"])
        level = "##" if " " not in name else "###"
        parts.append(f"{level} {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def commands_table() -> str:
    """The table of all commands in docs/commands.md."""
    rows = [
        f"| `{name}` | {command.get_short_help_str(limit=200)} |"
        for name, command in commands()
        if not isinstance(command, click.Group)
    ]
    return "\n".join(["| command | purpose |", "|---|---|", *rows]) + "\n"


def main() -> int:
    """Write the site to the folder that the command line names, and say where it is or what is wrong."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs")
    if problems := build(folder):
        click.echo(problems, err=True)
        return 1
    click.echo(f"the site is in {folder / 'site'}; to read it: python3 -m http.server -d {folder / 'site'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
