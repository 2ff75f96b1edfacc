"""Compressed tables inside a model that exists: ``compress_``."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer

from embtables._util.names import few
from embtables.config import OutOfRange
from embtables.faces.compress.discovery import Finding, Unit, find, refuse_wrappers
from embtables.faces.compress.optimizers import check, containers, move
from embtables.faces.compress.references import Holders, refuse_other_holders
from embtables.faces.compress.replacements import Replacements
from embtables.faces.compress.report import Compression, SwappedTable
from embtables.optimizers import FusedOptimizer
from embtables.plan.solver import MethodLike, Plan, by_pattern, method_of, plan_apart
from embtables.sizes.budget import Budget
from embtables.tables import EmbeddingTables


def compress_(
    model: nn.Module,
    method: MethodLike | Mapping[str, MethodLike],
    budget: Budget | None = None,
    *,
    optimizer: str | dict[str, Any] | FusedOptimizer | None = None,
    rebind: Optimizer | Sequence[Optimizer] = (),
    frequencies: Mapping[str, Any] | None = None,
    sparse: bool | None = None,
    std: float | None = None,
    seed: int = 0,
    hash_seed: int = 0,
    on_out_of_range: OutOfRange = "error",
    precision: str | None = None,
    training_precision: str = "fp32",
    trained: bool = False,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> Compression:
    """Swaps the embedding tables inside any model for compressed ones, in place, under one joint budget.

    It finds ``nn.Embedding``, ``nn.EmbeddingBag`` and torchrec's ``EmbeddingBagCollection`` and
    ``EmbeddingCollection``. A table's name is the qualified name of its module (in a collection: followed by the
    table's own). Modules of torch.nn that share a weight, and modules at several places, become one table; a collection
    shares no storage with other modules. What cannot be honored is left alone, and the report says why.

    Tables kept in full, and those of methods with rows of their own for ids, such as ``pruned`` and
    ``mixed_dimension``, go on with what their rows can hold of the weights they have. With ``trained=True`` so do all
    others: rows that ids share become those that are nearest to the trained vectors, and the report says how much of
    each table is held. Without it they start anew, with the standard deviation of the weights that they replace, since
    means of untrained vectors would only be shorter. Tables that share one storage, as those of ``unified`` and
    ``robe`` do, start with that of their weights together, and the report names those whose scale that changes: a
    pattern of ``method`` for each of them gives them storages of their own. ``padding_idx`` and ``sparse`` carry
    over.

    A table that an optimizer has trained already and that starts anew is named in a warning.

    Args:
        model: any module that contains tables.
        method: as in ``embtables.plan``: a method, or a mapping from patterns of table names to methods; with a
            mapping, tables that no pattern matches are left alone.
        budget: inference bytes of all tables that are swapped, together, as in ``embtables.plan``.
        optimizer: a fused optimizer for the tables, updated inside backward; they then leave the model's optimizers.
            ``None``: ordinary parameters, which take the place of the old ones in the model's optimizers.
        rebind: optimizers built before that are no attributes of the model. Those that are, or are reached from one,
            are found. Options of their groups and learning-rate schedulers stay.
        frequencies: ``{table name: counts}``, as in ``embtables.plan``.
        sparse: whether gradients are sparse; by default as the replaced module's were.
        std: standard deviation of the initial vectors, instead of that of the weights replaced; needed on the meta
            device, where there are none.
        seed: of the initial weights.
        hash_seed: of all hashes.
        on_out_of_range: what ids outside a table's range do from now on, as in ``TableConfig``.
        precision: what rows are served in, as in ``embtables.plan``: ``compress_(model, "full", precision="int8")``
            keeps all that a trained model has learned but for the rounding, which ``finalize`` of its tables does.
        training_precision: what rows are stored in while they are trained, as in ``embtables.plan``; ``"bf16"`` needs a
            fused optimizer.
        trained: whether the model has been trained, so that all tables are fitted to the weights that they replace, as
            ``EmbeddingTables.take_over`` does; ids count by ``frequencies`` where these are given.
        evaluate: measures a model, such as its loss on a validation set; the report then says what compression cost. It
            is called with the model as it is, when all is checked and nothing changed, and once more at the end, with
            the new tables in the form in which they will be served. Whether modules train is afterwards as before. What
            it raises in the first call is raised; in the second, when the model has its new tables, it is a warning,
            and the report lacks that number.

    Returns:
        What was swapped, left alone and moved; ``print`` it.

    Raises:
        ValueError: before anything is changed, for whatever could go wrong later in silence: an optimizer or another
            holder of the old tables that cannot be told of the new ones, a wrapped or compiled model, no table at all.
        InfeasibleBudget: before anything is changed, with the floor, where no tables of this method fit.

    Example::

        report = compress_(model, {"*item*": "hash", "*": "full"}, budget="20%")
        print(report)
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, not a {type(model).__name__}")
    if evaluate is not None and not callable(evaluate):
        raise ValueError(f"evaluate must be a function of the model, not a {type(evaluate).__name__}")
    refuse_wrappers(model)
    known = set(map(id, model.modules()))
    given = _optimizers(rebind, model)
    patterns = by_pattern(method)
    finding = find(model, list(patterns))
    _check_patterns(finding, patterns)
    units = [
        replace(unit, configs=[replace(config, on_out_of_range=on_out_of_range) for config in unit.configs])
        for unit in finding.units
    ]
    solved = plan_apart(
        _apart(units),
        patterns,
        budget,
        frequencies,
        optimizer,
        hash_seed=hash_seed,
        precision=precision,
        training_precision=training_precision,
    )
    built = Replacements(sparse, std, seed, trained, frequencies or {})
    built.build(units, solved)
    whole = {name for name, share in built.kept.items() if share is None or share > 1 - 1e-6}
    copies = {copy: first for copy, first in _copies(units) if not {copy, first} <= whole}
    holders, optimizers = _checked(model, units, built, given)
    before = None if evaluate is None else _measured(evaluate, model)
    moved, old = _swap(units, built, holders, optimizers)
    shown = _tables(units, solved, built)
    left_bytes = _bytes_left(model, finding)
    left_alone = finding.left_alone
    del finding, units, built, holders, optimizers
    gc.collect()
    not_freed = sorted({name for name, weight, storage in old if weight() is not None or not storage.expired()})
    if not_freed:
        warnings.warn(
            f"{len(not_freed)} of the old tables are still in memory, since something still holds them or a view "
            f"of them ('{not_freed[0]}'); training will not change them any more",
            stacklevel=2,
        )
    shared = {line["shared_by"]: line["inference_bytes"] for line in solved.lines() if line["shared_by"] is not None}
    after = None
    if evaluate is not None:
        with ExitStack() as served:
            for module in list(model.modules()):
                if isinstance(module, EmbeddingTables) and id(module) not in known:
                    served.enter_context(module.as_served())
            try:
                after = _measured(evaluate, model)
            except Exception as error:  # all is swapped: who asked needs the report more than the number
                warnings.warn(
                    f"evaluate failed with the new tables ({type(error).__name__}: {error}), so that the report does "
                    "not say what compression cost",
                    stacklevel=2,
                )
    return Compression(solved, shown, shared, left_alone, left_bytes, moved, not_freed, copies, before, after)


def _measured(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    trains = {module: module.training for module in model.modules()}
    try:
        found = evaluate(model)
    finally:
        for module, training in trains.items():
            module.training = training
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"evaluate must return a number, such as a loss, not a {type(found).__name__}") from None


def _optimizers(rebind: Optimizer | Sequence[Optimizer], model: nn.Module) -> list[Optimizer]:
    given: list[Any] = list(rebind) if isinstance(rebind, (list, tuple)) else [rebind]
    own = {id(p) for p in model.parameters()}
    for i, optimizer in enumerate(given):
        kind = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            cure = (
                "give its .optimizer"
                if isinstance(getattr(optimizer, "optimizer", None), Optimizer)
                else "leave it out"
            )
            raise ValueError(f"rebind must hold torch.optim optimizers, not a {kind}: {cure}")
        if not any(id(p) in own for group in getattr(optimizer, "param_groups", ()) for p in group["params"]):
            raise ValueError(
                f"rebind[{i}] ({kind}) holds no parameter of this model: give the optimizer made of its parameters()"
            )
    return given


def _check_patterns(finding: Finding, patterns: Mapping[str, MethodLike]) -> None:
    """Raises ``ValueError`` where there is nothing to do, or a pattern matches only what is left alone."""
    left = [f"'{name}': {reason}" for name, reason in finding.left_alone.items()]
    if not finding.units:
        raise ValueError(
            "there is no table to compress in this model"
            + (f"; left alone would be {'; '.join(left[:5])}" if left else "")
            + ("; …" if len(left) > 5 else "")
        )
    names = [config.name for unit in finding.units for config in unit.configs]
    for pattern in patterns:
        alone = [name for name in finding.left_alone if method_of(name, [pattern])]
        if alone and not any(method_of(name, [pattern]) for name in names):
            raise ValueError(
                f"the pattern '{pattern}' matches only what has to be left alone: '{alone[0]}', of which: "
                f"{finding.left_alone[alone[0]]}"
            )


def _apart(units: Sequence[Unit]) -> list[list[Any]]:
    """The tables that may share storage: those of each collection, and those of all other modules."""
    plain = [config for unit in units if unit.collection is None for config in unit.configs]
    return [tables for tables in (plain, *(u.configs for u in units if u.collection is not None)) if tables]


def _copies(units: Sequence[Unit]) -> Iterator[tuple[str, str]]:
    """Names of tables with equal weights, as a deep copy has: the later one's, and the first one's."""
    alike: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, weight in ((c.name, w.detach()) for u in units for c, w in zip(u.configs, u.weights)):
        if weight.is_meta or bool((weight == weight[-1, -1]).all()):  # constants are equal without being copies
            continue
        others = alike.setdefault((weight.shape, weight.device, *weight[-1].tolist()), [])
        first = next((n for n, w in others if torch.equal(w, weight)), None)
        if first is None:
            others.append((name, weight))
        else:
            yield name, first


# ---- the swap --------------------------------------------------------------------------------------------------------


def _checked(
    model: nn.Module, units: Sequence[Unit], built: Replacements, given: Sequence[Optimizer]
) -> tuple[Holders, dict[int, tuple[str, Optimizer]]]:
    """Who holds the old tables, and the optimizers among them by their id, with a path to each.

    Raises:
        ValueError: for one that cannot be told of the new tables.
    """
    new: dict[int, Sequence[Any]] = {key: [module] for key, module in built.modules.items()}
    new |= {id(weight): swap.new for swap in built.swaps for weight in swap.old}
    names = {id(w): n for swap in built.swaps for w, n in zip(swap.old, swap.names)}
    names |= {id(m): s.names[0] for u in units for s in u.sites for m in s.module.modules()}
    holders = Holders(model, new, names)
    optimizers = dict(holders.optimizers)
    for i, optimizer in enumerate(given):
        optimizers.setdefault(id(optimizer), (f"rebind[{i}]", optimizer))
    for path, optimizer in optimizers.values():
        check(path, optimizer, built.swaps)
    known = holders.known.union(*(containers(optimizer) for _, optimizer in optimizers.values()))
    known |= {id(swap.old) for swap in built.swaps} | {id(unit.weights) for unit in units}
    known |= {id(site) for unit in units for site in unit.sites}
    known |= {
        id(table) for u in units for s in u.sites for m in s.module.modules() for table in (m._parameters, m._modules)
    }
    refuse_other_holders([w for s in built.swaps for w in s.old], names, known)
    refuse_other_holders([m for u in units for s in u.sites for m in s.module.modules()], names, known)
    return holders, optimizers


def _swap(
    units: Sequence[Unit],
    built: Replacements,
    holders: Holders,
    optimizers: Mapping[int, tuple[str, Optimizer]],
) -> tuple[list[str], list[tuple[str, weakref.ref[nn.Parameter], StorageWeakRef]]]:
    """Changes everything; what was moved, and the old weights by name as weak references."""
    for unit in units:
        for site in unit.sites:
            for parent, attribute in site.places:
                parent._modules[attribute] = built.modules[id(site.module)]
    for edit in holders.edits:
        edit()
    lost = [
        name
        for swap in built.swaps
        for weight, name in zip(swap.old, swap.names)
        if name not in built.kept and any(optimizer.state.get(weight) for _, optimizer in optimizers.values())
    ]
    if lost:
        warnings.warn(
            f"what {few(lost)} learned so far is lost, since these tables start anew: "
            + (
                "their method has no place for it"
                if built.trained
                else "with trained=True those with rows are fitted to it"
            ),
            stacklevel=3,
        )
    moved = [move(path, optimizer, built.swaps) for path, optimizer in optimizers.values()]
    # The storage too, which views of a weight keep alive without it.
    old = [
        (name, weakref.ref(weight), StorageWeakRef(weight.untyped_storage()))
        for swap in built.swaps
        for weight, name in zip(swap.old, swap.names)
    ]
    return moved + holders.notes, old


def _tables(units: Sequence[Unit], solved: Plan, built: Replacements) -> list[SwappedTable]:
    lines = {line["table"]: line for line in solved.lines()}
    shown = []
    for unit in units:
        for config, weight in zip(unit.configs, unit.weights):
            line = lines[config.name]
            others = () if unit.collection else [n for s in unit.sites for n in s.names if n != config.name]
            shown.append(
                SwappedTable(
                    config.name,
                    tuple(others),
                    weight.shape[0],
                    weight.shape[1],
                    line["method"],
                    line["stored_as"],
                    weight.numel() * weight.element_size(),
                    line["inference_bytes"],
                    config.name in built.kept,
                    built.kept.get(config.name),
                    *built.scales.get(config.name, (None, None)),
                )
            )
    return shown


def _bytes_left(model: nn.Module, finding: Finding) -> int:
    """Bytes of the weights of what was left alone, each counted once."""
    modules = dict(model.named_modules(remove_duplicate=False))
    weights = {id(p): p for name in finding.left_alone for p in modules[name].parameters()}
    return sum(p.numel() * p.element_size() for p in weights.values())
