"""The pages of the documentation, without building the site (unit): links and anchors lead
somewhere, every page is in the site's navigation, Python compiles, command lines are read by the
real parser, and the API is where it is said to be.
"""

from __future__ import annotations

import ast
import importlib.util
import posixpath
import re
import shlex
import textwrap
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import typer.main
import yaml

from docs.hooks import ELSEWHERE, LINK, ROOT, linked, place_of
from knowedit.cli.app import app
from knowedit.methods.listing import methods

FILES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / file for file in ELSEWHERE)]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
#: Pages that name every command, or none.
UNTOLD = ("docs/cli.md", "CHANGELOG.md")
#: Commands that are called in another way: `knowedit stats MODEL`.
OTHERWISE = {"knowedit stats collect"}
#: A method that CONTRIBUTING's reader writes.
WRITTEN = {"my-method"}
FENCE = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def prose(text):
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(text):
    """What the headings of a page are called in links."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


def rows(text):
    """Runs of neighbouring table rows, outside of code blocks, each row split at its pipes."""
    found = [[]]
    for line in FENCE.sub("", text).splitlines():
        if line.startswith("|"):
            found[-1].append(re.split(r"(?<!\\)\|", line.strip()))
        elif found[-1]:
            found.append([])
    return found


def commands(text):
    """Every command line `knowedit ...` of a page that says all its words."""
    shells = [body for _, kind, body in FENCE.findall(text) if kind in ("", "sh", "bash")]
    lines = [line.strip() for body in shells for line in body.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(knowedit [^`\n]*)`", FENCE.sub("", text))
    for line in lines:
        for part in re.split(r"\s;\s", line) if re.match("knowedit |torchrun ", line) else ():
            words = shlex.split(part, comments=True)
            words = words[words.index("knowedit") + 1 :]
            if words and not {"...", "|", "COMMAND"} & {*words}:
                yield words


def check(command, words, context=None):
    """Read a command line as the program does, without running it. Raises the parser's errors."""
    made = command.context_class(command, info_name="knowedit", parent=context)
    if hasattr(command, "commands"):
        if not words or words[0] == "--verbose":
            return check(command, words[1:], context) if words else None
        if words[0] not in command.commands and "collect" in command.commands:
            words = ["collect", *words]  # of `knowedit stats MODEL`
        _, found, left = command.resolve_command(made, words)
        return check(found, left, made)
    given, left, _ = command.make_parser(made).parse_args(list(words))
    assert not left, f"too many words: {left}"
    return given


@pytest.mark.parametrize("file", PAGES)
def test_every_link_leads_somewhere(file):
    for _, target, anchor, _ in LINK.findall(prose(PAGES[file])):
        there = (
            posixpath.normpath(posixpath.join(posixpath.dirname(file), target)) if target else file
        )
        assert (ROOT / there).exists(), f"{file} links to {target}, which is not there"
        if anchor and there in PAGES:
            assert anchor[1:] in anchors(PAGES[there]), f"{file}: {there} has no {anchor}"


def test_every_page_is_in_the_navigation_once():
    def leaves(entry):
        for value in entry.values() if isinstance(entry, dict) else entry:
            yield from [value] if isinstance(value, str) else leaves(value)

    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.safe_load("nav:" + text.partition("\nnav:")[2])["nav"]
    assert sorted(leaves(nav)) == sorted(place_of(file) for file in PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_a_table_have_as_many_cells(page):
    """A pipe in code parts a row too, on most sites."""
    for table in rows(PAGES[page]):
        assert len({len(row) for row in table}) <= 1, table


def test_links_between_files_become_links_between_pages():
    text = "[a](docs/cli.md#x) ![b](docs/pictures/b.png) [c](https://d.org/e) [f](#g)"
    assert linked("index.md", text) == text.replace("docs/", "")
    assert (
        linked("kernels.md", "[m](../knowedit_kernels/moments/README.md#the-state)")
        == "[m](kernels/moments.md#the-state)"
    )
    assert linked("kernels/moments.md", "[s](../solver/README.md)") == "[s](solver.md)"


@pytest.mark.parametrize("file", [file for file in PAGES if "```python" in PAGES[file]])
def test_python_compiles(file):
    for _, kind, body in FENCE.findall(PAGES[file]):
        if kind == "python":
            compile(textwrap.dedent(body), file, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("file", [f for f in PAGES if f not in ("docs/cli.md", "CHANGELOG.md")])
def test_command_lines_are_as_the_program_reads_them(file):
    for words in commands(PAGES[file]):
        try:
            check(typer.main.get_command(app), words)
        except Exception as error:
            raise AssertionError(f"{file}: knowedit {shlex.join(words)}: {error}") from error


def test_every_command_is_told_of_in_a_page_of_its_own():
    """Beside the generated reference: by a command line, or by its name."""
    told = "".join(text for file, text in PAGES.items() if file not in UNTOLD)

    def missing(command, path):
        for name, below in getattr(command, "commands", {}).items():
            yield from missing(below, f"{path} {name}")
        if not hasattr(command, "commands") and not re.search(rf"{path}\b", told):
            yield path

    assert set(missing(typer.main.get_command(app), "knowedit")) == OTHERWISE


def test_the_methods_that_pages_name_are_there():
    listed = PAGES["docs/which.md"]
    table = re.findall(r"^\|[^|]*\|([^|]*)\|", listed, re.MULTILINE)[2:]
    named = re.findall(
        r"`([a-z][a-z-]*)`",
        "".join([*table, listed.partition("Not in the table")[2].partition("\n\n")[0]]),
    )
    for text in PAGES.values():
        named += re.findall(r"--method ([a-z][a-z-]*)\b", text)
    assert len(named) > 20
    assert {*named} - {*methods()} == WRITTEN


def shell_lines(text):
    """The lines of a page's shell blocks, without comments."""
    for _, kind, body in FENCE.findall(text):
        if kind in ("", "sh", "bash"):
            for line in body.replace("\\\n", " ").splitlines():
                yield line.partition(" # ")[0].strip()


def test_modules_and_make_targets_are_there():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    lines = [line for text in PAGES.values() for line in shell_lines(text)]
    called = [found[1] for line in lines if (found := re.search(r"\bpython3? -m (\S+)", line))]
    made = [line.split()[1] for line in lines if line.startswith("make ")]
    assert {"demo", "test"} <= {*made} <= {*targets}
    gone = [name for name in called if name != "venv" and importlib.util.find_spec(name) is None]
    assert called and gone == []


def test_what_pip_is_told_to_install_is_what_the_package_asks_for():
    """Extras are there; a release that the package replaces at once is not installed first."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for text in PAGES.values() for line in shell_lines(text)]
    lines += re.findall(r"`(pip install [^`]*)`", "".join(PAGES.values()))
    installs = [shlex.split(line) for line in lines if line.startswith("pip install ")]
    assert len(installs) >= 2
    for words in installs:
        extras = {name for word in words for name in re.findall(r"^\.\[(.*)\]$", word)}
        assert extras <= {*project["optional-dependencies"]}
        capped = {re.split(r"\W", one)[0] for one in project["dependencies"] if "<" in one}
        assert "-c" in words or not capped & {*words}, words


def test_a_wrong_command_line_is_found():
    (found,) = commands("```\nknowedit eval MODEL --metod memit   # text\n```")
    with pytest.raises(Exception, match="metod"):
        check(typer.main.get_command(app), found)
    with pytest.raises(Exception, match="no command 'evla'"):
        check(typer.main.get_command(app), ["evla", "MODEL"])


@pytest.mark.parametrize("file", [file for file in PAGES if "\n::: " in PAGES[file]])
def test_what_the_api_pages_name_is_there_and_explained(file):
    for path in re.findall(r"^::: (\S+)$", PAGES[file], re.MULTILINE):
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, path


def test_the_kernels_reference_has_every_public_name():
    import knowedit_kernels as kernels

    named = re.findall(r"^::: (\S+)$", PAGES["docs/api/kernels.md"], re.MULTILINE)
    public = {name for name, found in vars(kernels).items() if name[0] != "_" and callable(found)}
    assert public - {path.rpartition(".")[2] for path in named} == set()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "pictures").glob("*.svg")), ids=lambda p: p.name
)
def test_drawn_pictures_are_svg_with_a_title(path: Path):
    drawn = ET.parse(path).getroot()
    assert drawn.tag.endswith("svg") and drawn[0].tag.endswith("title") and drawn[0].text


def test_settings_that_a_page_shows_are_a_file_of_the_examples():
    shown = [body for _, kind, body in FENCE.findall(PAGES["docs/integrations/easyedit.md"])
             if kind == "yaml"]  # fmt: skip
    assert shown == [(ROOT / "examples/easyedit/ROME.yaml").read_text("utf-8")]
