"""The methods: one file each in this folder, and those of other packages under the entry point ``embtables.methods``.

``from embtables.methods import Hash`` works for every method here. ``from_config`` turns a word, a mapping or a method
into a method; ``kinds`` lists the words.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from embtables._util.names import did_you_mean
from embtables.methods.base import Method
from embtables.plugins import load

GROUP = "embtables.methods"


@cache
def _built_in() -> dict[str, type[Method]]:
    modules = [
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__) if m.name != "base"
    ]
    classes = (
        c
        for module in modules
        for c in vars(module).values()
        if isinstance(c, type) and c.__module__ == module.__name__
    )
    return {c.kind: c for c in classes if issubclass(c, Method) and hasattr(c, "kind")}


@cache
def _third_party() -> dict[str, type[Method]]:
    return load(GROUP, Method, _built_in())


def kinds() -> list[str]:
    """The names of all methods that store tables, those of other packages last."""
    return [*sorted(kind for kind, cls in _built_in().items() if not cls.chooses), *sorted(_third_party())]


def from_config(config: str | dict[str, Any] | Method) -> Method:
    """``"hash"``, ``{"kind": "compositional", "operation": "mult"}`` or a method itself → a method.

    Raises:
        ValueError: naming the unknown method or field, with those that exist.
    """
    if isinstance(config, Method):
        return config
    values = {"kind": config} if isinstance(config, str) else dict(config) if isinstance(config, dict) else {}
    kind = values.pop("kind", None)
    cls = _built_in().get(kind) or _third_party().get(kind) if isinstance(kind, str) else None
    if cls is None:
        known = ["auto", *kinds()]
        raise ValueError(f"unknown method {config!r}{did_you_mean(kind, known)}: choose one of {', '.join(known)}")
    return cls(**values)


def method_label(method: str | dict[str, Any]) -> str:
    """What a method is called: ``hash``; ``compositional(operation=mult)``; ``user_*: hash, *: full``.

    What an option says of each table, such as ``worth``, is left out: there may be thousands of them.
    """
    if isinstance(method, str):
        return method
    if "kind" not in method:
        return ", ".join(f"{pattern}: {method_label(spec)}" for pattern, spec in method.items())
    shown = {name: "…" if isinstance(value, dict) else value for name, value in method.items() if name != "kind"}
    options = ",".join(f"{name}={value}" for name, value in sorted(shown.items()))
    return f"{method['kind']}({options})" if options else str(method["kind"])


def __getattr__(name: str) -> Any:
    for cls in _built_in().values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *sorted(cls.__name__ for cls in _built_in().values())]


__all__ = ["GROUP", "Method", "from_config", "kinds", "method_label"]
