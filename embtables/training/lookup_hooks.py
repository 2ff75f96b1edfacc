"""Sees the vectors of each lookup of a model, whether the model calls the tables or their ``lookup``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from embtables.tables import EmbeddingTables

__all__ = ["Vectors", "intercept"]

Vectors: TypeAlias = Tensor | dict[str, Tensor]


def intercept(tables: EmbeddingTables, see: Callable[[Vectors], None]) -> Callable[[], None]:
    """Have ``see`` called with the vectors of every lookup; returns the undoing. (A forward hook misses ``lookup``.)

    In a model that is compiled, lookups and ``see`` run uncompiled, between its graphs.
    """
    names = ("forward", "lookup")

    def around(look_up: Callable[..., Vectors]) -> Callable[..., Vectors]:
        @torch.compiler.disable
        def looked_up(*arguments: Any, **options: Any) -> Vectors:
            vectors = look_up(*arguments, **options)
            see(vectors)
            return vectors

        return looked_up

    for name in names:
        setattr(tables, name, around(getattr(tables, name)))

    def undo() -> None:
        for name in names:
            delattr(tables, name)

    return undo
