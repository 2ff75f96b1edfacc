"""From a plan and the storage that it allocates to the blocks and stages of its tables."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from embtables.lookup.block import Block
from embtables.lookup.features import BlockLookup
from embtables.lookup.program import check_recipe
from embtables.lookup.recipe import Recipe, Row, concat
from embtables.lookup.recipe_block import RecipeBlock, shape_of
from embtables.lookup.store import Store
from embtables.methods.base import Stage, TableEntry
from embtables.plan.solver import GroupPlan, Plan
from embtables.sizes.layout import FULL


def build_blocks(
    plan: Plan, store: Store, feature_names: Sequence[str], *, served: bool
) -> tuple[list[BlockLookup], list[int]]:
    """The blocks over a store: one for each group, variant, dimension and shape of recipe.

    Returns:
        The blocks, and for each output its place among their lookups, one block after another.
    """
    blocks: list[BlockLookup] = []
    order: list[tuple[str, str]] = []
    for g in plan.groups:
        members: dict[tuple[str, int], list[tuple[TableEntry, str]]] = {}
        for table in g.group.tables:
            entry = TableEntry(table, g.layout.entries[table.name])
            for feature in table.feature_names:
                members.setdefault((entry.entry.variant, table.embedding_dim), []).append((entry, feature))
        own = {key: _block(g, [entry for entry, _ in pairs], store, served) for key, pairs in members.items()}
        for (variant, _), pairs in members.items():
            block = own[variant, pairs[0][0].table.embedding_dim]
            # Rows of tables in full are their own; others of the group may be read by its blocks too.
            may_be_native = variant == FULL or all(b is None for (v, _), b in own.items() if v != FULL)
            for built, looked_up in _by_shape(g, block, pairs, store, served):
                tables = [entry.table for entry, _ in looked_up]
                features = [feature for _, feature in looked_up]
                lookup = BlockLookup(
                    built, tables, features, feature_names, plan.hash_seed, may_be_native=may_be_native
                )
                if isinstance(built, RecipeBlock):
                    for spec, recipe in zip(lookup.specs(), built.recipes):
                        check_recipe(spec, recipe, store)
                blocks.append(lookup)
                order += [(table.name, feature) for table, feature in zip(tables, features)]
    outputs = [(table.name, feature) for table in plan.tables for feature in table.feature_names]
    return blocks, [order.index(pair) for pair in outputs]


def _block(g: GroupPlan, entries: list[TableEntry], store: Store, served: bool) -> Block | None:
    """The block that a method writes itself; ``None`` for tables that are looked up by their recipes."""
    if entries[0].entry.variant == FULL:
        return None
    return (g.method.served_block if served else g.method.block)(entries, g.group, store)


def _by_shape(
    g: GroupPlan, block: Block | None, pairs: list[tuple[TableEntry, str]], store: Store, served: bool
) -> list[tuple[Block, list[tuple[TableEntry, str]]]]:
    if block is not None:
        return [(block, pairs)]
    recipe_of = g.method.served_recipe if served else g.method.recipe
    alike: dict[Hashable, tuple[list[Recipe], list[tuple[TableEntry, str]]]] = {}
    for entry, feature in pairs:
        full = entry.entry.variant == FULL
        recipe = concat(Row(entry.table.name)) if full else recipe_of(entry, g.group)
        recipes, members = alike.setdefault(shape_of(recipe, store), ([], []))
        recipes.append(recipe)
        members.append((entry, feature))
    dim = pairs[0][0].table.embedding_dim
    return [(RecipeBlock(recipes, store, dim), members) for recipes, members in alike.values()]


def build_stages(plan: Plan, store: Store) -> list[Stage]:
    """What the methods do over the course of training."""
    stages = (g.method.stage(g.layout, g.group, store) for g in plan.groups)
    return [stage for stage in stages if stage is not None]
