"""Full tables trained so that their first columns do without the others: one training for every budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from embtables.formats import FP32
from embtables.hashing import mix, seed_for
from embtables.lookup.recipe import Recipe, Row, concat
from embtables.lookup.store import Store
from embtables.methods.base import Floor, Method, Stage, TableEntry
from embtables.methods.widths import width_path
from embtables.sizes.layout import Entry, Form, Group, Layout

if TYPE_CHECKING:
    from embtables.lookup.engine import Touched

# Into so many equal parts a step's random number divides the chances of the widths.
_PARTS = 2**30


class Matryoshka(Method):
    """e(x) = [E[x, 1…w], 0, …, 0] of a full table E of shape ``[n, D]``, with w solved for the budget after training.

    Training does not depend on the budget: one training is served at every budget and in every precision
    (``EmbeddingTables.serve``). A share s of its steps shows the first w columns of all tables alone, with w drawn from
    the k powers of two below D, and the others all D. Hidden columns are zeros and get gradients of zero. A step's
    gradient thus has the expectation of that of (1 − s)·L_D + (s/k)·Σ_w L_w, where L_w is the loss that the first w
    columns have: the sum of nested losses of Kusupati et al., equation 1, with these weights c_w, at the price of one
    of its terms. In tables of different D each has as many of the w columns as there are.

    Outside of training lookups show as many columns as are served. w is the same for all tables, but for those whose D
    is smaller; what is left of the budget is divided as ``FewerDimensions`` does. Trained full tables are taken over as
    they are; their columns are in no order, so that a few of them are worth little before training has gone on.

    Optimizers update all columns of each row that a step looks up: Adam moves hidden ones by their momentum.

    Args:
        nested_share: s.

    Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022; in recommenders Wang et al., "Matryoshka
    Representation Learning for Recommendation" (MRL4Rec), 2024. A width drawn at random: Rippel, Gelbart & Adams,
    "Learning Ordered Representations with Nested Dropout", ICML 2014.
    """

    kind: ClassVar[str] = "matryoshka"
    served_values: ClassVar[tuple[str, ...]] = ("width",)
    nested_share: float = Field(default=0.5, ge=0, le=1)

    def floor(self, group: Group) -> Floor:
        return Floor(width_path(group).least[0], "one scalar per id")

    def fit(self, group: Group, limit: int) -> Layout:
        widths = width_path(group).widths(limit)
        entries = {table.name: Entry("nested", {"width": width}) for table, width in zip(group.tables, widths)}
        rows = [table.rows or 0 for table in group.tables]
        trained = [group.slab(t.name, n, t.embedding_dim) for t, n in zip(group.tables, rows)]
        served = [group.slab(t.name, n, width) for t, n, width in zip(group.tables, rows, widths)]
        return Layout(entries, Form(tuple(trained)).in_format(FP32.name), Form(tuple(served)))

    # ---- the module ----------------------------------------------------------------------------------------------

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        return concat(Row(entry.table.name))

    def served_recipe(self, entry: TableEntry, group: Group) -> Recipe:
        return concat(Row(entry.table.name), zeros=entry.table.embedding_dim - entry.entry.values["width"])

    def keep(self, layout: Layout, group: Group, store: Store, weights: Mapping[str, Tensor]) -> list[str]:
        """All of them, since training works on the full tables."""
        for name, weight in weights.items():
            store.slab(name)[: len(weight)] = weight
        return list(weights)

    def serve(self, layout: Layout, group: Group, trained: Store, served: Store) -> None:
        for slab in layout.serving.slabs:
            served.write_slab(slab.name, trained.slab(slab.name)[:, : slab.width])

    def stage(self, layout: Layout, group: Group, store: Store) -> Stage:
        shows = {name: entry.values["width"] for name, entry in layout.entries.items()}
        seed = seed_for(group.hash_seed, group.name, "width")
        return NestedWidths(shows, max(table.embedding_dim for table in group.tables), self.nested_share, seed)


class NestedWidths(Stage):
    """Draws the number of columns that each training step shows, by a hash of the step's number.

    Args:
        shows: as in ``Stage``.
        dim: D, of the widest table.
        nested_share: the share of steps that show fewer columns.
        seed: of the hash, a signed 64-bit integer.
    """

    def __init__(self, shows: Mapping[str, int], dim: int, nested_share: float, seed: int) -> None:
        super().__init__()
        self.shows, self.dim, self.seed = shows, dim, seed
        nested = (dim - 1).bit_length()
        ends = [round(_PARTS * nested_share * (i + 1) / nested) for i in range(nested)]
        # On the CPU, where drawing waits for no device.
        self.ends = torch.tensor(ends, dtype=torch.int64, device="cpu")
        self.steps = torch.zeros((), dtype=torch.int64, device="cpu")
        self.width = torch.tensor(dim, device="cpu")

    @torch.no_grad()
    def step(self, touched: Touched) -> None:
        self.steps += 1
        number = mix(self.steps ^ self.seed) & (_PARTS - 1)
        self.width.copy_((2 ** (number >= self.ends).sum()).clamp(max=self.dim))

    def state(self) -> dict[str, Tensor]:
        return {"steps": self.steps}
