"""Where the values of an id lie and how they become its vector, as plain data: what the readers of files go by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from embtables.formats import PackedFormat, ResidualFormat, row_format, scales_name
from embtables.lookup.features import BlockLookup
from embtables.lookup.recipe import Address, Recipe, SparseRow
from embtables.lookup.recipe_block import RecipeBlock
from embtables.lookup.sparse_rows import stored_values
from embtables.lookup.store import Store
from embtables.lookup.stored_rows import StoredRows
from embtables.serving.numpy_reader import LOOKUPS_VERSION

# The fields of addresses that name tensors.
_TENSORS = ("code", "offsets", "values", "projection")


def lookups_of(blocks: Sequence[BlockLookup], store: Store) -> dict[str, Any]:
    """The lookups of tables, for the header of a file; the recipe of a table is ``None`` where its method has none."""
    tables: dict[str, Any] = {}
    slabs: set[str] = set()
    for block in blocks:
        recipes = block.block.recipes if isinstance(block.block, RecipeBlock) else [None] * len(block.tables)
        for table, seed, recipe in zip(block.tables, block.seeds, recipes):
            tables[table.name] = {"fold_seed": seed, "recipe": recipe and _recipe(recipe, store)}
            slabs |= {address.slab for address in recipe.all_addresses()} if recipe else set()
    # In an order of their own, so that equal tables make equal files.
    return {
        "version": LOOKUPS_VERSION,
        "tables": dict(sorted(tables.items())),
        "slabs": {name: _slab(name, store) for name in sorted(slabs)},
    }


def _recipe(recipe: Recipe, store: Store) -> dict[str, Any]:
    def key(name: str | None) -> str | None:
        return None if name is None else store.key(name)

    ranks = recipe.ranks
    return {
        "combine": recipe.combine,
        "addresses": [_address(address, store) for address in recipe.addresses],
        "ranks": None if ranks is None else {"code": store.key(ranks.code), "first": ranks.first},
        "inner": key(recipe.inner),
        "projection": key(recipe.projection),
        "zeros": recipe.zeros,
        "rest": None if recipe.rest is None else _recipe(recipe.rest, store),
        "sparse": None if recipe.sparse is None else _sparse(recipe.sparse, store),
    }


def _address(address: Address, store: Store) -> dict[str, Any]:
    kind = re.sub("(?<=[a-z])(?=[A-Z])", "_", type(address).__name__).lower()
    fields = asdict(address)
    tensors = {name: store.key(fields[name]) for name in _TENSORS if fields.get(name) is not None}
    return {"kind": kind, **fields, **tensors}


def _slab(name: str, store: Store) -> dict[str, Any]:
    weight, start = store.weight_of(name), store.start(name)
    scales = None if store.scales(weight) is None else scales_name(weight)
    return {"rows": store.rows(name), **_stored(store.stored_rows(weight), weight, scales, start)}


def _sparse(sparse: SparseRow, store: Store) -> dict[str, Any]:
    values = stored_values(row_format(sparse.format), sparse.entries)
    weight, scales = (f"{sparse.matrix}/{name}" for name in ("values", "scales"))
    names = [name.rpartition("/")[2] for name in sparse.index()]
    return {
        "form": sparse.form,
        "first": sparse.first,
        "values": _stored(values, store.key(weight), store.key(scales) if values.format.scales else None, 0),
        **{name: store.key(code) for name, code in zip(names, sparse.index())},
    }


def _stored(rows: StoredRows, weight: str, scales: str | None, start: int) -> dict[str, Any]:
    """How the rows of a slab are stored, whose first one is ``start``."""
    unit, block = rows.place(start)
    found: dict[str, Any] = {"width": rows.width, "weight": weight, "unit": unit, "kind": "floats", "bits": 0}
    if isinstance(rows.format, PackedFormat):
        found |= {
            "kind": "signs" if isinstance(rows.format, ResidualFormat) else "integers",
            "bits": rows.format.bits,
            "num_scales": rows.format.scales,
            "scales": scales,
            "block": block,
            "rows_per_scale": rows.share or 0,
        }
    return found
