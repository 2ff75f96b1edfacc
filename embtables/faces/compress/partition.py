"""A plan cut into parts that share no storage, so that each can be built, trained and moved alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from embtables.plan.solver import GroupPlan, Plan
from embtables.sizes.layout import Form, Layout, owner_of


def is_separable(g: GroupPlan) -> bool:
    """Whether every slab, extra and code of a group is named after one of its tables, so that none is shared."""
    names = [table.name for table in g.group.tables]
    items = [*g.layout.training.items(), *g.layout.serving.items()]
    return all(owner_of(item.name, names) is not None for item in items)


def cut(plan: Plan) -> list[list[str]]:
    """Names of the tables of each part: one table, or a group whose tables share storage."""
    parts: list[list[str]] = []
    for g in plan.groups:
        names = [table.name for table in g.group.tables]
        parts += [[name] for name in names] if is_separable(g) else [names]
    return parts


def part(plan: Plan, names: Sequence[str], *, prefix: str = "", hash_seed: int | None = None) -> Plan:
    """The plan of some tables, which share no storage with any other.

    Args:
        plan: of these and other tables.
        names: of the tables.
        prefix: what is cut off the front of each name.
        hash_seed: another than the plan's.
    """
    seed = plan.hash_seed if hash_seed is None else hash_seed

    def renamed(name: str) -> str:
        return name.removeprefix(prefix)

    groups = []
    for g in plan.groups:
        chosen = [i for i, table in enumerate(g.group.tables) if table.name in names]
        if not chosen:
            continue
        layout = Layout(
            {renamed(name): entry for name, entry in g.layout.entries.items() if name in names},
            _part_of_form(g.layout.training, g, names, renamed),
            _part_of_form(g.layout.serving, g, names, renamed),
        )
        tables = tuple(replace(g.group.tables[i], name=renamed(g.group.tables[i].name)) for i in chosen)
        counts = tuple(g.group.counts[i] for i in chosen)
        group = replace(g.group, tables=tables, counts=counts, hash_seed=seed)
        groups.append(GroupPlan(group, g.method, layout))
    tables = tuple(replace(table, name=renamed(table.name)) for table in plan.tables if table.name in names)
    held = {item.name for g in groups for item in g.layout.training.items()}
    codes: dict[str, Any] = {renamed(name): code for name, code in plan.codes.items() if renamed(name) in held}
    return Plan(tables, tuple(groups), None, plan.optimizer, seed, codes)


def _part_of_form(form: Form, g: GroupPlan, names: Sequence[str], renamed: Callable[[str], str]) -> Form:
    """What of a group's tensors is named after the tables ``names``, or after none."""
    tables = [table.name for table in g.group.tables]

    def chosen(items: Sequence[Any]) -> tuple[Any, ...]:
        owners = [(item, owner_of(item.name, tables)) for item in items]
        kept = [(item, owner) for item, owner in owners if owner is None or owner in names]
        return tuple(item if owner is None else replace(item, name=renamed(item.name)) for item, owner in kept)

    return Form(chosen(form.slabs), chosen(form.extras), chosen(form.codes))
