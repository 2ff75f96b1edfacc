"""The tables and modules that ``compress_`` puts in the place of old ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from embtables.faces.compress.discovery import Unit, is_bag_collection
from embtables.faces.compress.optimizers import Swap
from embtables.faces.compress.partition import cut, part
from embtables.faces.embedding import Embedding, EmbeddingBag
from embtables.hashing import seed_for
from embtables.plan.solver import Plan, checked_counts
from embtables.sizes.layout import FULL
from embtables.tables import EmbeddingTables
from embtables.tables.fitting import keep

# Of tables whose weights are all zero; the initial vectors have to differ from each other.
_LEAST_STD = 1e-6


class Replacements:
    """New modules for old ones, and what optimizers exchange.

    ``modules``: by the old one's id. ``kept``: of the tables that were kept, how much of each, ``None`` where nobody
    measured. ``scales``: of every table the standard deviation of its vectors as they were, and as they start.

    Args: those of ``compress_``.
    """

    def __init__(
        self, sparse: bool | None, std: float | None, seed: int, trained: bool, frequencies: Mapping[str, Any]
    ) -> None:
        self.sparse, self.std, self.seed = sparse, std, seed
        self.trained, self.frequencies = trained, frequencies
        self.modules: dict[int, nn.Module] = {}
        self.swaps: list[Swap] = []
        self.kept: dict[str, float | None] = {}
        self.scales: dict[str, tuple[float, float]] = {}

    def build(self, units: Sequence[Unit], solved: Plan) -> None:
        """Makes the tables of the plan for all units, and a module for each place of each."""
        self._check_devices(units)
        by_name = {unit.configs[0].name: unit for unit in units if unit.collection is None}
        for names in cut(solved):
            members = [by_name[name] for name in names if name in by_name]
            if members:
                tables = self._tables(part(solved, names), names, members)
                for name, unit in zip(names, members):
                    for site in unit.sites:
                        self.modules[id(site.module)] = _view(tables, name, site.module)
        for unit in units:
            if unit.collection is not None:
                names = [config.name for config in unit.configs]
                own = part(
                    solved,
                    names,
                    prefix=f"{unit.collection}.",
                    hash_seed=seed_for(solved.hash_seed, "collection", unit.collection),
                )
                self.modules[id(unit.sites[0].module)] = _collection_view(
                    self._tables(own, names, [unit]), unit.sites[0].module
                )

    def _check_devices(self, units: Sequence[Unit]) -> None:
        meta = [c.name for u in units for c, w in zip(u.configs, u.weights) if w.is_meta]
        if meta and self.std is None:
            raise ValueError(
                f"'{meta[0]}' is on the meta device, so its weight says nothing of the scale of initial vectors: give "
                "std=, and after to_empty() call reset_parameters() of the new modules"
            )

    def _tables(self, plan: Plan, names: Sequence[str], units: Sequence[Unit]) -> EmbeddingTables:
        """The units' tables, whose names in the model are ``names``, with trained weights where they fit."""
        weights = [weight for unit in units for weight in unit.weights]
        paddings = [config.padding_idx for unit in units for config in unit.configs]
        devices = {weight.device for weight in weights}
        if len(devices) > 1:
            raise ValueError(
                f"'{names[0]}' and others would share storage, but are on different devices "
                f"({', '.join(sorted(map(str, devices)))}): give those of each device a pattern of method of their own"
            )
        std = _spread(weights, paddings) if self.std is None else self.std
        sparse = _is_sparse(units, names) if self.sparse is None and plan.optimizer is None else bool(self.sparse)
        tables = EmbeddingTables(plan, seed=self.seed, device=weights[0].device, std=std, sparse=sparse)
        if not weights[0].is_meta:
            in_model = dict(zip((table.name for table in plan.tables), names))
            shares = self._take_over(tables, in_model, weights)
            self.kept.update({in_model[name]: share for name, share in shares.items()})
            for table, name, weight, padding in zip(plan.tables, names, weights, paddings):
                before = _spread([weight], [padding])
                after = before if name in self.kept else std
                if self.trained and name in self.kept:
                    after = _spread([tables.to_dense(table.name)], [padding])
                self.scales[name] = (before, after)
        new = list(tables.parameters())
        self.swaps.append(Swap(list(names), weights, new, _rows(tables, weights, new), _gradients(tables)))
        return tables

    def _take_over(
        self, tables: EmbeddingTables, in_model: Mapping[str, str], weights: Sequence[Tensor]
    ) -> Mapping[str, float | None]:
        """Gives tables the weights that they can hold: how much of each is held, ``None`` where nobody measured."""
        by_name = {name: weight.detach() for name, weight in zip(in_model, weights)}
        counts = {name: self.frequencies[other] for name, other in in_model.items() if other in self.frequencies}
        if self.trained:
            return tables.take_over(by_name, counts)
        plan = tables.plan
        with torch.no_grad():
            return dict.fromkeys(keep(plan.groups, tables.store, by_name, checked_counts(plan.tables, counts)))


def _rows(tables: EmbeddingTables, old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]) -> list[tuple[int, int]]:
    """Where each old table lies within the new parameters, if all are stored in full there: which one, first row."""
    store = tables.store
    full = all(e.variant == FULL for g in tables.plan.groups for e in g.layout.entries.values())
    if not full or not new:
        return []
    number = {parameter.shape[1]: i for i, parameter in enumerate(new)}
    return [(number[weight.shape[1]], store.start(table.name)) for table, weight in zip(tables.plan.tables, old)]


def _gradients(tables: EmbeddingTables) -> set[str]:
    """The kinds of gradient that the parameters get: those of projections are dense, whatever ``sparse`` says."""
    store = tables.store
    weights = {id(store.tensor(name)) for name in store.weight_names}
    return {"sparse" if store.sparse and id(p) in weights else "dense" for p in tables.parameters()}


def _spread(weights: Sequence[Tensor], paddings: Sequence[int | None]) -> float:
    """Root mean square of all entries but those of padding vectors."""
    total, count = 0.0, 0
    for weight, padding in zip(weights, paddings):
        dense = weight.detach()
        total += float(torch.linalg.vector_norm(dense, dtype=torch.float64)) ** 2
        count += dense.numel()
        if padding is not None:
            total -= float(torch.linalg.vector_norm(dense[padding], dtype=torch.float64)) ** 2
            count -= dense.shape[1]
    return max(_LEAST_STD, sqrt(max(0.0, total) / max(1, count)))


def _is_sparse(units: Sequence[Unit], names: Sequence[str]) -> bool:
    flags = {bool(getattr(site.module, "sparse", False)) for unit in units for site in unit.sites}
    if len(flags) > 1:
        raise ValueError(
            f"'{names[0]}' and others would share storage, but some have sparse=True and some not: say sparse=True or "
            "sparse=False, or give them patterns of method of their own"
        )
    return flags.pop()


def _view(tables: EmbeddingTables, name: str, old: nn.Module) -> nn.Module:
    view: Embedding | EmbeddingBag
    stock: nn.Module
    if isinstance(old, nn.EmbeddingBag):
        view = EmbeddingBag.of(tables, name, "mean" if old.mode == "mean" else "sum", bool(old.include_last_offset))
        stock = nn.EmbeddingBag(1, 1, device="meta")
    else:
        view = Embedding.of(tables, name)
        stock = nn.Embedding(1, 1, device="meta")
    for attribute, value in vars(old).items():
        if attribute not in vars(view) and attribute not in vars(stock):
            vars(view)[attribute] = value  # what a user noted on the module
    return view.train(old.training)


def _collection_view(tables: EmbeddingTables, old: nn.Module) -> nn.Module:
    from embtables.torchrec import EmbeddingBagCollection, EmbeddingCollection

    view: nn.Module
    if is_bag_collection(old):
        view = EmbeddingBagCollection.of(tables, old.is_weighted())  # type: ignore[operator]
    else:
        view = EmbeddingCollection.of(tables, old.need_indices())  # type: ignore[operator]
    return view.train(old.training)
