"""From tables, a method and a budget to exact sizes and bytes; nothing here allocates a tensor of a table.

``solver`` has ``Plan`` and ``plan``; ``layout`` is what a plan allocates, ``formats`` what a row takes in bytes,
``budget`` how bytes are shared out, and ``memory`` what is counted.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    # Not imported with the package: the methods import its layout, and the solver imports the methods.
    if name in ("Plan", "plan"):
        from embtables.plan import solver

        return getattr(solver, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
