"""The documentation as a reader uses it: its Python runs, its commands exist, its links lead somewhere.

A block that needs an optional package stands under the line ``<!-- requires: torchrec -->`` and is left out without it.
A block under ``<!-- prints -->`` is what the Python block before it prints.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from embtables.cli.app import COMMANDS, build
from embtables.methods import kinds

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(ROOT.glob("docs/*.md")) + sorted(ROOT.glob("docs/methods/*.md")) + sorted(ROOT.glob("*.md"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_REQUIRES = re.compile(r"<!-- requires: ([\w., ]+) -->\n\Z")
_PRINTS = "<!-- prints -->\n"


class Block(NamedTuple):
    """A fenced block, the line it begins on, the packages it cannot run without, and whether it is an output."""

    language: str
    text: str
    line: int
    requires: tuple[str, ...]
    is_output: bool


def blocks(markdown: str) -> list[Block]:
    found = []
    for match in _FENCE.finditer(markdown):
        before = markdown[: match.start()]
        requires = _REQUIRES.search(before)
        names = tuple(requires[1].replace(",", " ").split()) if requires else ()
        line = before.count("\n") + 2
        found.append(Block(match[1], match[2], line, names, before.endswith(_PRINTS)))
    return found


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def missing(package: str) -> bool:
    try:
        importlib.import_module(package)
    except (ImportError, OSError):  # OSError: fbgemm's CUDA build on a host without a driver
        return True
    return False


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pages
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "docs"}
    left_out = set()
    printed = io.StringIO()
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.is_output:
            assert block.text.strip() == printed.getvalue().strip(), f"line {block.line}: not what the code prints"
        if block.language != "python":
            continue
        absent = {package for package in block.requires if missing(package)}
        left_out |= absent
        if not absent:
            # The empty lines in front make a traceback name the line of the page.
            # The block does not inherit this file's future imports: a dataclass in it has annotations, not strings.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
    if left_out:
        pytest.skip(f"the blocks that need {', '.join(sorted(left_out))} did not run")


@pages
def test_fences_are_closed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(_FENCE.findall(text))


@pages
def test_commands_exist(page: Path) -> None:
    """Every ``embtables …`` line of a shell block names a sub-command that exists, with options that it has."""
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language not in ("bash", "sh", "console"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["embtables"] and words[1:]:
                check_command(words[1:], f"{name_of(page)}: {line}")


def check_command(words: list[str], where: str) -> None:
    import typer.main

    assert words[0].startswith("-") or words[0] in {command.name for command in COMMANDS}, where
    command = typer.main.get_command(build(words[0]))
    while (subcommands := getattr(command, "commands", None)) and words and not words[0].startswith("-"):
        assert words[0] in subcommands, where
        command, words = subcommands[words[0]], words[1:]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert option in known | {"--help"}, f"{where}: there is no option {option}"


@pages
def test_relative_links_exist(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:href|src)="([^"]+)"', text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{name_of(page)} links to {target}, which does not exist"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked.read_text(encoding="utf-8")), f"{name_of(page)}: no section {target}"


def anchors(markdown: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("kind", kinds())
def test_every_method_has_a_page(kind: str) -> None:
    page = ROOT / "docs" / "methods" / f"{kind}.md"
    assert page.is_file(), f"method {kind} has no page docs/methods/{kind}.md"
    index = (page.parent / "README.md").read_text(encoding="utf-8")
    assert f"({kind}.md)" in index, f"docs/methods/README.md does not list {kind}"
