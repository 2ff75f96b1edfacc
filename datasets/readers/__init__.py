"""The readers: one file each here, and those of other packages under the entry point ``embtables.readers``."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from embtables.datasets.reader import Reader

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
    found: dict[str, type[Reader]] = {}
    for point in entry_points(group=GROUP):
        cls = point.load()
        if not (isinstance(cls, type) and issubclass(cls, Reader)):
            raise ValueError(f"entry point '{point.name}' of {GROUP} is {point.value}, which is not a Reader class")
        if cls.kind in _built_in() or found.get(cls.kind, cls) is not cls:
            raise ValueError(
                f"entry point '{point.name}' of {GROUP} names its reader '{cls.kind}', which exists already"
            )
        found[cls.kind] = cls
    return found


def all_readers() -> dict[str, type[Reader]]:
    """The readers by their kinds, those of other packages last.

    Raises:
        ValueError: an entry point does not name a reader, or its kind exists already.
    """
    return dict(sorted(_built_in().items())) | dict(sorted(_third_party().items()))


__all__ = ["GROUP", "all_readers"]
