"""What other packages bring: the classes that they registered under an entry point, beside those of this package."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, TypeVar


class Named(Protocol):
    """Has a ``kind``, the word that configurations call it by."""

    kind: ClassVar[str]


T = TypeVar("T", bound=Named)


def load(group: str, base: type[T], built_in: Mapping[str, Any]) -> dict[str, type[T]]:
    """The classes under an entry point ``group`` such as ``"embtables.methods"``, by their ``kind``.

    Args:
        base: what they have to be subclasses of.
        built_in: this package's own, whose kinds are taken.

    Raises:
        ValueError: naming the entry point that is no such class, or whose kind exists already.
    """
    found: dict[str, type[T]] = {}
    for point in entry_points(group=group):
        cls = point.load()
        if not (isinstance(cls, type) and issubclass(cls, base) and hasattr(cls, "kind")):
            raise ValueError(
                f"entry point '{point.name}' of {group} is {point.value}, "
                f"which is not a {base.__name__} class with a kind"
            )
        kind = cls.kind
        if kind in built_in or found.get(kind, cls) is not cls:
            noun = group.rpartition(".")[2].removesuffix("s")
            raise ValueError(f"entry point '{point.name}' of {group} names its {noun} '{kind}', which exists already")
        found[kind] = cls
    return found
