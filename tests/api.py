"""The public interface as text: every public name with its signature, and every command with its options.

``python -m tests.api`` writes ``tests/data/api.txt`` anew; ``tests/project/test_api.py`` compares the file with the
code. Parameters, defaults and annotations are given as the source spells them, so that the text is the same under every
version of Python and of torch.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from embtables.cli.app import COMMANDS, build

FILE = Path(__file__).parent / "data" / "api.txt"
PACKAGES = (
    "embtables",
    "embtables.datasets",
    "embtables.extend",
    "embtables.methods",
    "embtables.models",
    "embtables.optimizers",
    "embtables.serving",
    "embtables.torchrec",
    "embtables.training",
    "embtables.training.config",
)
COMMAND_LINE = "command line"
_HEADING = "== {} =="
_SIMPLE = (bool, int, float, str, tuple, frozenset, type(None))


def names_of(package: ModuleType) -> list[str]:
    """The public names: ``__all__``, else what the module itself defines; of the methods also their classes."""
    public = {name: value for name, value in vars(package).items() if not name.startswith("_")}
    defined = [name for name in public if getattr(public[name], "__module__", "") == package.__name__]
    names = list(getattr(package, "__all__", defined))
    if package.__name__ == "embtables.methods":
        classes = [type(package.from_config(kind)) for kind in package.kinds()]
        names += [cls.__name__ for cls in classes if _is_ours(cls)]
    return sorted(names)


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "embtables"


def describe(package: str) -> Iterator[str]:
    """The lines of one package."""
    module = importlib.import_module(package)
    names = names_of(module)
    for name in names:
        value = getattr(module, name)
        if inspect.isclass(value):
            heading, *members = _class(name, value)
            # What a class has from one that stands here too is said there alone.
            listed = [base for base in value.__mro__[1:] if vars(module).get(base.__name__) is base]
            said = {line for base in listed if base.__name__ in names for line in _class(base.__name__, base)}
            yield heading
            yield from (line for line in members if line not in said)
        elif inspect.isfunction(inspect.unwrap(value)):
            yield f"def {name}{_signature(value)}"
        else:
            yield f"{name} = {value!r}" if isinstance(value, _SIMPLE) else f"{name}: {type(value).__name__}"


def _class(name: str, cls: type) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    yield f"class {name}({bases}):" if bases else f"class {name}:"
    yield from (f"    {line}" for line in _fields(cls))
    members: dict[str, Any] = {}
    # From the last base to the class itself: a name stands for its latest definition. Bases of other packages are
    # theirs to change.
    for base in reversed([base for base in cls.__mro__ if _is_ours(base)]):
        members |= {key: value for key, value in vars(base).items() if not key.startswith("_") or key == "__init__"}
    if dataclasses.is_dataclass(cls) or issubclass(cls, BaseModel):
        members.pop("__init__", None)  # made of the fields, which stand above
    for key, value in sorted(members.items()):
        if isinstance(value, property):
            yield f"    {key}: property{_signature(value.fget).removeprefix('(self)')}"
        elif isinstance(value, (classmethod, staticmethod)):
            yield f"    {type(value).__name__} {key}{_signature(value.__func__)}"
        elif inspect.isfunction(value):
            yield f"    def {key}{_signature(value)}"
        elif key == "kind":
            yield f"    kind = {value!r}"


def _fields(cls: type) -> Iterator[str]:
    """The fields of dataclasses, pydantic models and named tuples, in their order, with type and default."""
    fields: dict[str, Any] = {}
    if dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            made = field.default_factory is not dataclasses.MISSING
            fields[field.name] = field.default_factory() if made else field.default
    elif issubclass(cls, BaseModel):
        fields = {name: _default(field) for name, field in cls.model_fields.items()}
    elif hasattr(cls, "_fields"):
        fields = {name: cls._field_defaults.get(name, dataclasses.MISSING) for name in cls._fields}
    for name, default in fields.items():
        annotation = next(a[name] for a in map(_annotations, cls.__mro__) if name in a)
        # A default that is a config of ours is spelled out where that config stands.
        shown = repr(default) if isinstance(default, (*_SIMPLE, list, dict)) else f"{type(default).__name__}()"
        yield f"{name}: {annotation}" + ("" if default is dataclasses.MISSING else f" = {shown}")


def _default(field: FieldInfo) -> Any:
    return dataclasses.MISSING if field.is_required() else field.get_default(call_default_factory=True)


def _annotations(cls: type) -> dict[str, str]:
    """A class's own annotations, as its source spells them."""
    if not _is_ours(cls):
        return {}
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return {n.target.id: ast.unparse(n.annotation) for n in node.body if isinstance(n, ast.AnnAssign)}


def _signature(function: Callable[..., Any]) -> str:
    """Parameters and result, as the source spells them."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    assert isinstance(node, ast.FunctionDef), function
    return f"({ast.unparse(node.args)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def describe_commands() -> Iterator[str]:
    """The lines of the command line: every command with its arguments and options."""
    for command in COMMANDS:
        yield from _command(f"embtables {command.name}", typer.main.get_command(build(command.name)), command.name)


def _command(path: str, command: Any, name: str | None = None) -> Iterator[str]:
    if name is not None:
        command = command.commands[name]
    if subcommands := getattr(command, "commands", None):
        for key in sorted(subcommands):
            yield from _command(f"{path} {key}", subcommands[key])
        return
    yield path
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            yield f"    {parameter.name.upper()}"
        elif "--help" not in parameter.opts:
            spellings = ", ".join([*parameter.opts, *parameter.secondary_opts])
            yield f"    {spellings}" + (" (required)" if parameter.required else "")


def section(name: str) -> str:
    """The text of one package, or of the command line."""
    return "\n".join(describe_commands() if name == COMMAND_LINE else describe(name))


def read() -> dict[str, str]:
    """The file's sections by name."""
    sections: dict[str, str] = {}
    for block in FILE.read_text(encoding="utf-8").split("\n\n"):
        heading, _, text = block.strip().partition("\n")
        sections[heading.strip("= ")] = text
    return sections


def main() -> None:
    sections = [f"{_HEADING.format(name)}\n{section(name)}\n" for name in (*PACKAGES, COMMAND_LINE)]
    FILE.write_text("\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
