"""Which rows ids share where no id chooses: in equal numbers if there is a vocabulary, or at random."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from embtables.config import TableConfig
from embtables.hashing import seed_for, turn_for
from embtables.lookup.recipe import Balanced, BalancedBlock, CircularBlock, Hashed
from embtables.methods.base import Method, TableEntry
from embtables.sizes.layout import Entry, Group

Addressing = Literal["balanced", "random"]


class SharingMethod(Method):
    """A method whose ids share the rows of a slab that has fewer of them.

    Args:
        addressing: ``"balanced"`` deals out the m rows of a slab to each m ids of a vocabulary in turn, to every m of
            them in another order that the seed decides. So every row has as many ids as any other, or one fewer, and
            the first m ids, which are the most frequent ones of prepared data, have a row each. ``"random"`` hashes
            ids as if they were strangers, which is the classical hashing trick: the numbers of ids per row are then
            scattered as those of a Poisson distribution are. Tables without a vocabulary are always hashed.
    """

    # What older plans hold is said by their entries.
    later_fields: ClassVar[tuple[str, ...]] = (*Method.later_fields, "addressing")
    addressing: Addressing = "balanced"

    def shared_entry(self, variant: str, table: TableConfig, **sizes: int) -> Entry:
        """The entry of a table whose ids share rows. It says that addresses are balanced; older entries do not."""
        balanced = self.addressing == "balanced" and table.num_embeddings is not None
        return Entry(variant, {**sizes, "addressing": "balanced"} if balanced else sizes)

    def row(self, entry: TableEntry, group: Group, slab: str, lookup: int, signed: bool = False) -> Hashed | Balanced:
        """The address of a table's lookup of this number, in all rows of a slab."""
        seed, turn, sign = _seeds(entry, group, lookup, signed)
        return Hashed(slab, seed, sign) if turn is None else Balanced(slab, seed, turn, sign)

    def scalars(
        self, entry: TableEntry, group: Group, slab: str, lookup: int, number: int, signed: bool = False
    ) -> CircularBlock | BalancedBlock:
        """The address of so many scalars of a slab of width 1, for a table's lookup of this number."""
        seed, turn, sign = _seeds(entry, group, lookup, signed)
        if turn is None:
            return CircularBlock(slab, seed, number, sign)
        return BalancedBlock(slab, seed, turn, number, sign)


def _seeds(entry: TableEntry, group: Group, lookup: int, signed: bool) -> tuple[int, int | None, int | None]:
    """The seed of a lookup, by how much it turns where addresses are balanced, and the seed of its signs."""
    key, addressing = (group.hash_seed, entry.table.name), entry.entry.values.get("addressing", "random")
    if addressing not in get_args(Addressing):
        raise ValueError(f"table '{entry.table.name}' has the addressing {addressing!r}, which there is not")
    turn = turn_for(*key, lookup=lookup) if addressing == "balanced" else None
    return seed_for(*key, "row", lookup), turn, seed_for(*key, "sign", lookup) if signed else None
