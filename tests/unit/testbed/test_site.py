"""The documentation site: its links, its navigation, that it loads nothing from elsewhere, and its generated parts."""

import re
from pathlib import Path

import msgspec
import pytest
from markdown_it import MarkdownIt

from testbed.plan import schema
from testbed.plan.limits import RunLimits
from testbed.proof.site import CONFIG, OPTIONS, ROOT, build, commands, commands_table

LOADED = re.compile(
    r"<(?:script|link|img|iframe|source|video)\b[^>]*?\b(?:src|href|srcset)=[\"']?((?:https?:)?//[^\"' >]+)"
)
"""What a browser fetches for a page, if it is not from the site itself."""
FROM_CSS = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert build(folder) == ""
    return folder / "site"


def pages(site: Path) -> dict[str, str]:
    found = {str(page.relative_to(site)): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    return {name: text for name, text in found.items() if name != "404.html"}


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    for name, text in pages(site).items():
        assert not LOADED.findall(text), name
    for style in site.rglob("*.css"):
        assert not FROM_CSS.findall(style.read_text(encoding="utf-8")), style


def test_every_page_is_in_the_navigation(site: Path) -> None:
    found = pages(site)
    listed = set(re.findall(r"^ *- [^:]+: (\S+\.md)$", (ROOT / CONFIG).read_text(encoding="utf-8"), flags=re.M))
    html = {re.sub(r"README\.md$", "index.md", page).removesuffix(".md") + ".html" for page in listed}
    assert html == set(found), f"pages in {CONFIG} and pages of the site differ"


def test_the_site_has_the_files_that_pages_show(site: Path) -> None:
    for name, text in pages(site).items():
        for target in re.findall(r"<img\b[^>]*\bsrc=[\"']?([^\"' >]+)", text):
            assert (site / name).parent.joinpath(target).exists(), f"{name}: {target}"


def structure(html: str) -> list[str]:
    """The lists, tables, quotes and code blocks of a page in their order, with what is inside what."""
    return re.findall(r"</?(?:ul|ol|li|table|pre|blockquote)\b", html)


def test_lists_and_what_is_in_them_are_as_a_commonmark_parser_has_them(site: Path) -> None:
    parser = MarkdownIt("commonmark").enable("table")
    for name, html in pages(site).items():
        article = html.partition("<article")[2].partition("</article>")[0]
        source = site.parent / "documents" / re.sub(r"index\.html$", "README.md", name).replace(".html", ".md")
        if source.name != OPTIONS.name:
            original = (ROOT / source.relative_to(site.parent / "documents")).read_text(encoding="utf-8")
            assert structure(article) == structure(parser.render(original)), name


def test_links_to_missing_pages_and_headings_fail(tmp_path: Path) -> None:
    root = tmp_path / "clone"
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text("# Title\n\n[a](docs/missing.md) [b](docs/commands.md#no-heading)\n")
    (root / "docs" / "commands.md").write_text(
        "# Commands\n\n## A heading\n\n[c](../README.md#title) [d](#a-heading)\n"
    )
    config = (ROOT / CONFIG).read_text(encoding="utf-8").partition("\nnav:")[0]
    (root / CONFIG).write_text(f"{config}\n", encoding="utf-8")
    problems = build(tmp_path / "out", root=root)
    assert "page does not exist" in problems
    assert "anchor does not exist" in problems
    assert problems.count("[ README.md:3:") == 2
    assert "commands.md:5" not in problems


def test_the_page_of_options_has_the_help_of_every_command(site: Path) -> None:
    text = (site.parent / "documents" / OPTIONS).read_text(encoding="utf-8")
    for name, command in commands():
        assert f"# {name}\n" in text
        assert all(option in text for parameter in command.params for option in parameter.opts if option[:2] == "--")


def test_commands_md_lists_every_command() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page.endswith(commands_table()), "docs/commands.md says how to make this table"


def plan_fields() -> set[str]:
    """The keys that a plan may have, those within others included."""
    structs: list[type[msgspec.Struct]] = [RunLimits]
    structs += [kind for kind in vars(schema).values() if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
    return {field.encode_name for struct in structs for field in msgspec.structs.fields(struct)}


def test_experiments_md_explains_every_field_of_a_plan() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([^`\n]+)`", page))))
    assert plan_fields() <= named, plan_fields() - named
