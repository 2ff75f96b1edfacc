"""A row an id: the uncompressed table."""

from __future__ import annotations

from typing import ClassVar

from embtables.layout import Form, Group, Layout
from embtables.methods.base import Floor, Method, full_entry


class Full(Method):
    """The full table, e(x) = E[x], with E of shape ``[num_embeddings, embedding_dim]``.

    The baseline. It takes no budget; where one is given the tables have to fit into it.
    """

    kind: ClassVar[str] = "full"
    needs_budget: ClassVar[bool] = False

    def floor(self, group: Group) -> Floor:
        return Floor(group.full_bytes, "the full tables")

    def fit(self, group: Group, limit: int) -> Layout:
        pairs = [full_entry(table) for table in group.tables]
        entries = {table.name: entry for table, (entry, _) in zip(group.tables, pairs)}
        return Layout.of(entries, Form(slabs=tuple(slab for _, slab in pairs)))
