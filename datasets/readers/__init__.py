"""The readers: one file each here, and those of other packages under the entry point ``embtables.readers``."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from embtables.datasets.reader import Reader
from embtables.plugins import load

GROUP = "embtables.readers"


@cache
def _built_in() -> dict[str, type[Reader]]:
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    classes = (
        of
        for module in modules
        for of in vars(module).values()
        if isinstance(of, type) and of.__module__ == module.__name__
    )
    return {of.kind: of for of in classes if issubclass(of, Reader)}


@cache
def _third_party() -> dict[str, type[Reader]]:
    return load(GROUP, Reader, _built_in())  # type: ignore[type-abstract]


def all_readers() -> dict[str, type[Reader]]:
    """The readers by their kinds, those of other packages last.

    Raises:
        ValueError: an entry point does not name a reader, or its kind exists already.
    """
    return dict(sorted(_built_in().items())) | dict(sorted(_third_party().items()))


__all__ = ["GROUP", "all_readers"]
