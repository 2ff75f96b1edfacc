"""Every name that the author of a method, an optimizer or a reader needs; the guide is docs/extending.md.

- A method: ``Method`` with its sizes (``Group``, ``Layout``, ``Form``, ``Entry``, ``Slab``, ``Extra``, ``Code``,
  ``Floor``) and one ``Recipe`` per table, of the addresses below. What no recipe can say is a ``Block``; what happens
  over the course of training is a ``Stage``.
- An optimizer: ``FusedOptimizer``.
- A reader of data sets: ``embtables.datasets.Reader`` and ``RowReader``, which need the extra ``train``.
"""

from embtables.config import TableConfig
from embtables.formats import RowFormat
from embtables.hashing import balanced_ids, hash_ids, hash_signs, mix, seed_for, to_range, turn_for
from embtables.lookup.block import Block, Extras, Part
from embtables.lookup.engine import Touched
from embtables.lookup.recipe import (
    Address,
    Balanced,
    BalancedBlock,
    Capped,
    CircularBlock,
    Coded,
    Digit,
    Hashed,
    Listed,
    Range,
    Ranks,
    Recipe,
    Row,
    concat,
)
from embtables.lookup.store import Store
from embtables.methods.addressing import SharingMethod
from embtables.methods.base import (
    Floor,
    Initializer,
    Method,
    Stage,
    TableEntry,
    chunk_widths,
    full_entry,
    full_layout,
    shared_layout,
)
from embtables.methods.ranking import RankedMethod, counts_by_rank, is_ranked, rank_code, ranks_of, remapped
from embtables.optimizers import FusedOptimizer
from embtables.sizes.budget import allocate, collision_weights, keep_apart, split
from embtables.sizes.layout import FULL, Code, Counts, Entry, Extra, Form, Group, Layout, Slab

__all__ = [
    "FULL",
    "Address",
    "Balanced",
    "BalancedBlock",
    "Block",
    "Capped",
    "CircularBlock",
    "Code",
    "Coded",
    "Counts",
    "Digit",
    "Entry",
    "Extra",
    "Extras",
    "Floor",
    "Form",
    "FusedOptimizer",
    "Group",
    "Hashed",
    "Initializer",
    "Layout",
    "Listed",
    "Method",
    "Part",
    "Range",
    "RankedMethod",
    "Ranks",
    "Recipe",
    "Row",
    "RowFormat",
    "SharingMethod",
    "Slab",
    "Stage",
    "Store",
    "TableConfig",
    "TableEntry",
    "Touched",
    "allocate",
    "balanced_ids",
    "chunk_widths",
    "collision_weights",
    "concat",
    "counts_by_rank",
    "full_entry",
    "full_layout",
    "hash_ids",
    "hash_signs",
    "is_ranked",
    "keep_apart",
    "mix",
    "rank_code",
    "ranks_of",
    "remapped",
    "seed_for",
    "shared_layout",
    "split",
    "to_range",
    "turn_for",
]
