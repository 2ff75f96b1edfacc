"""The code as ruff and mypy see it. `make format` cures most of what ruff says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, "\n" + result.stdout + result.stderr


def test_ruff_check() -> None:
    run("ruff", "check", ".")


def test_ruff_format() -> None:
    run("ruff", "format", "--check", ".")


@pytest.mark.slow
def test_mypy() -> None:
    run("mypy")


def test_no_class_has_too_many_jobs() -> None:
    """A class with more than 300 lines or 30 methods is several: one for each reason to change it."""
    found = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for folder in ("embtables", "datasets", "models")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        if (node.end_lineno or 0) - node.lineno >= 300 or sum(isinstance(n, ast.FunctionDef) for n in node.body) > 30
    ]
    assert not found, "classes to divide: " + ", ".join(found)


def returns(function: ast.FunctionDef) -> list[int]:
    """The lines of a function's own ``return`` statements, not of those of functions inside it."""
    found: list[int] = []
    left: list[ast.AST] = list(function.body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Return):
            found.append(node.lineno)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            left += ast.iter_child_nodes(node)
    return found


def early_returns(source: str) -> list[int]:
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return sorted(line for f in functions if f.name.startswith("test_") for line in returns(f))


def test_no_test_passes_by_returning() -> None:
    """One that returns before its end counts as passed; ``pytest.skip`` or fewer parameters say what was not done."""
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line in early_returns(path.read_text())
    ]
    assert not found, "tests return early: " + ", ".join(found)


def test_early_returns_are_found() -> None:
    source = """
def test_one():
    if x:
        return
    def helper():
        return 1
    with y:
        for z in w:
            return

def helper():
    return
"""
    assert early_returns(source) == [4, 9]


def test_test_modules_import_none_of_the_others() -> None:
    """What several of them need is in ``conftest.py`` or in a module of cases."""
    found = []
    modules = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path.name}: {name}" for name in names if name.removeprefix("tests.") in modules]
    assert not found, "test modules import test modules: " + ", ".join(found)
