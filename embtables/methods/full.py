"""A row per id: the uncompressed table."""

from __future__ import annotations

from typing import ClassVar

from embtables.methods.base import Floor, Method, full_layout
from embtables.sizes.layout import Group, Layout


class Full(Method):
    """The full table, e(x) = E[x], with E of shape ``[num_embeddings, embedding_dim]``.

    The baseline. It takes no budget; where one is given the tables have to fit into it.
    """

    kind: ClassVar[str] = "full"
    needs_budget: ClassVar[bool] = False

    def floor(self, group: Group) -> Floor:
        return Floor(group.full_bytes, "the full tables")

    def fit(self, group: Group, limit: int) -> Layout:
        return full_layout(group)
