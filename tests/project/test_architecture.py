"""docs/architecture.md draws the package as it is: its arrows are the imports, and all of them point downwards."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
# What users and authors import from, and what everybody may use.
FRONT = {"", "__main__", "extend", "torchrec"}


def part_of(module: str) -> str:
    """``embtables.lookup.engine`` belongs to the part ``lookup``; what stands at the top is a part of its own."""
    names = module.split(".")
    return names[1] if len(names) > 1 else ""


def modules() -> Iterator[tuple[str, ast.Module]]:
    # models/ and datasets/ are parts of the package by links, which are not followed here.
    own = [(path, path.relative_to(ROOT)) for path in (ROOT / "embtables").rglob("*.py") if not path.is_symlink()]
    linked = [
        (path, Path("embtables") / path.relative_to(ROOT))
        for f in ("models", "datasets")
        for path in (ROOT / f).rglob("*.py")
    ]
    for path, inside in dict([*own, *linked]).items():
        names = inside.with_suffix("").parts
        names = names[:-1] if names[-1] == "__init__" else names
        yield ".".join(names), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules that are imported at run time, inside functions too; not those for types alone."""
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    left_out = {id(inner) for node in for_types for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield f"{node.module}.{alias.name}" if node.module == "embtables" else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def actual() -> dict[str, set[str]]:
    parts = {part_of(name) for name, _ in modules()}
    found: dict[str, set[str]] = {part: set() for part in parts - FRONT}
    for name, tree in modules():
        own = part_of(name)
        for module in imports(tree):
            if module.split(".")[0] == "embtables" and own not in FRONT:
                other = part_of(module)
                if other in parts and other != own:
                    found[own].add(other)
    return found


def drawn() -> dict[str, set[str]]:
    """The lines ``part → part, part`` of the page's picture, from the top to the bottom."""
    block = re.search(r"<!-- imports -->\n```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    result = {}
    for line in block[1].splitlines():
        part, _, others = line.partition("→")
        names = [name.strip() for name in others.split(",")]
        result[part.strip()] = {name for name in names if name and name != "nothing"}
    return result


def test_the_picture_shows_all_imports_and_no_other() -> None:
    picture, code = drawn(), {part: others - FRONT for part, others in actual().items()}
    assert picture == code, {
        part: (sorted(picture.get(part, set())), sorted(code.get(part, set())))
        for part in picture.keys() | code.keys()
        if picture.get(part) != code.get(part)
    }


def test_nothing_imports_what_stands_above_it() -> None:
    order = list(drawn())
    upwards = {
        (part, other) for part, others in drawn().items() for other in others if order.index(other) < order.index(part)
    }
    assert upwards == set()
