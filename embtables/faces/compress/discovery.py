"""The tables inside a model, and why some of them have to be left alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from embtables.config import TableConfig
from embtables.faces.embedding import Embedding, EmbeddingBag
from embtables.plan.solver import method_of
from embtables.tables import EmbeddingTables

_STOCK = (nn.Embedding, nn.EmbeddingBag)
# What a subclass may define without changing what its users can do with it.
_HARMLESS = ("__init__", "reset_parameters", "extra_repr", "__repr__", "_fill_padding_idx_with_zero", "_abc_impl")
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# Wrappers that nothing can be swapped in, and what to do instead.
_WRAPPERS = {
    "DistributedDataParallel": "has registered its parameters already: call compress_ before wrapping",
    "FullyShardedDataParallel": "has flattened its parameters already: call compress_ before wrapping",
    "FSDPModule": "has sharded its parameters already: call compress_ before fully_shard",
    "DistributedModelParallel": "has sharded its tables already: call compress_ before wrapping",
    "DataParallel": "copies tables to other devices without their addresses: call compress_ on its .module, and train "
    "that on one device or under DistributedDataParallel",
    "AveragedModel": "averages one by one the rows of tables, which stand for other ids in a table of another name: "
    "make it after compress_",
    "OptimizedModule": "is compiled already: call compress_ before torch.compile",
    "ScriptModule": "is TorchScript, whose modules cannot be swapped: call compress_ before scripting",
}


@dataclass(slots=True)
class Site:
    """A module, its qualified names in the model, and where it hangs: a parent and the name there."""

    module: nn.Module
    names: list[str]
    places: list[tuple[nn.Module, str]] = field(default_factory=list)


@dataclass(slots=True)
class Unit:
    """Tables that are swapped together: one, of several modules where they are tied, or all of a collection.

    ``weights`` go with ``configs``, whose names are qualified; ``collection`` is the collection's name.
    """

    sites: list[Site]
    configs: list[TableConfig]
    weights: list[nn.Parameter]
    collection: str | None = None


@dataclass(slots=True)
class Finding:
    """What is to be swapped, and the reason for each table-like module that is left alone, by name."""

    units: list[Unit]
    left_alone: dict[str, str]


def refuse_wrappers(model: nn.Module) -> None:
    """Raises ``ValueError`` where something has taken hold of the parameters that cannot be told of new ones."""
    for name, module in model.named_modules():
        label = f"'{name}'" if name else "the model"
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS and cls.__module__.startswith(("torch.", "torchrec.")):
                raise ValueError(f"{label} is a {cls.__name__}, which {_WRAPPERS[cls.__name__]}")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{label} is compiled in place already: call compress_ before .compile()")


def find(model: nn.Module, patterns: Sequence[str]) -> Finding:
    """All tables inside ``model`` whose qualified names match a pattern.

    Raises:
        ValueError: where the model is itself a table, or patterns match some tables of a collection only.
    """
    if isinstance(model, (*_STOCK, Embedding, EmbeddingBag, EmbeddingTables)) or is_collection(model):
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which no module holds, so it cannot be swapped in place: "
            "build an embtables.Embedding or a collection of embtables.torchrec, or give the module that contains it"
        )
    shared = _Shared(model)
    units: list[Unit] = []
    left: dict[str, str] = {}
    tied: dict[int, list[Site]] = {}
    within: set[int] = set()
    sites = _sites(model)
    for site in sites:
        module, name = site.module, site.names[0]
        if id(module) in within:
            continue
        if isinstance(module, (Embedding, EmbeddingBag, EmbeddingTables)):
            left[name] = "it is compressed already"
        elif is_collection(module):
            found = _collection(site, shared)
            if isinstance(found, Unit):
                units.append(found)
            else:
                left[name] = found
        elif isinstance(module, _STOCK):
            tied.setdefault(id(module._parameters.get("weight", module)), []).append(site)
            continue
        elif (other := _other_table(module)) is not None:
            left[name] = other
        else:
            continue
        within |= {id(m) for m in module.modules()}
    for group in tied.values():
        reasons = {site.names[0]: reason for site in group if (reason := _why_not(site, group, shared))}
        for site in group if reasons else ():
            culprit, reason = next(iter(reasons.items()))
            left[site.names[0]] = reasons.get(site.names[0], f"its weight is also that of '{culprit}', and {reason}")
        if not reasons:
            units.append(_unit(group, patterns))
    chosen = [unit for unit in units if _matches(unit, patterns)]
    left |= {u.sites[0].names[0]: "no pattern of method matches its name" for u in units if u not in chosen}
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    chosen.sort(key=lambda unit: order[unit.sites[0].names[0]])
    return Finding(chosen, dict(sorted(left.items(), key=lambda item: order[item[0]])))


def _sites(model: nn.Module) -> list[Site]:
    """Every module of the model once, with all its names."""
    found: dict[int, Site] = {}
    for prefix, parent in model.named_modules(remove_duplicate=False):
        for attribute, child in parent._modules.items():
            if child is not None:
                site = found.setdefault(id(child), Site(child, []))
                site.names.append(f"{prefix}.{attribute}" if prefix else attribute)
                if not any(p is parent and a == attribute for p, a in site.places):
                    site.places.append((parent, attribute))
    return list(found.values())


class _Shared:
    """Which modules use each parameter, and which tensors lie in each storage."""

    def __init__(self, model: nn.Module) -> None:
        self.users: dict[int, list[tuple[str, nn.Module]]] = {}
        self.storages: dict[int, set[int]] = {}
        self.names: dict[int, str] = {}
        for prefix, module in model.named_modules():
            for table in (module._parameters, module._buffers):
                for attribute, tensor in table.items():
                    if tensor is not None and type(tensor) in (Tensor, nn.Parameter):
                        self.users.setdefault(id(tensor), []).append((prefix, module))
                        self.names[id(tensor)] = f"{prefix}.{attribute}" if prefix else attribute
                        self.storages.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))

    def why_not(self, weight: Tensor | None, own: Sequence[nn.Module]) -> str | None:
        """Who else uses a weight than the modules ``own``."""
        assert weight is not None
        for name, module in self.users[id(weight)]:
            if not any(module is m for m in own):
                return f"its weight is also that of '{name}' ({type(module).__name__})"
        others = self.storages[weight.untyped_storage()._cdata] - {id(weight)}
        return f"its weight shares memory with '{self.names[others.pop()]}'" if others else None


# ---- nn.Embedding and nn.EmbeddingBag --------------------------------------------------------------------------------


def _why_not(site: Site, tied: Sequence[Site], shared: _Shared) -> str | None:
    """Why a table of torch.nn is left alone; ``None`` where it can be swapped."""
    module = site.module
    assert isinstance(module, _STOCK)
    if parametrize.is_parametrized(module):
        return "its weight is parametrised: torch.nn.utils.parametrize.remove_parametrizations first"
    added = _added(type(module))
    if added:
        return (
            f"its class {type(module).__name__} has a '{added[0]}' of its own, which a compressed table would not have"
        )
    if "forward" in vars(module):
        return "its forward was replaced by another function"
    noted = _in_the_way(module)
    if noted:
        return f"its attribute '{noted[0]}' would hide one that a compressed table has: rename it first"
    if set(module._parameters) != {"weight"} or module._buffers or module._modules:
        return "it holds more than a weight, or something else in its place"
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return "it has hooks, which a compressed table would not call: remove them first"
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} rescales the rows of a full table, and compressed ones share rows"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq=True is not supported (EmbeddingTables.regularize scales by frequency)"
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        return "mode='max' is not supported, only sum and mean"
    reason = why_not_weight(module.weight)
    if reason is not None:
        return reason
    padding = module.padding_idx
    if isinstance(module, nn.Embedding) and padding is not None and not module.weight.is_meta:
        if bool(module.weight[padding].any()):
            return (
                f"its vector of padding_idx={padding} is not zero, as that of a compressed table is: zero it first "
                f"(weight.data[{padding}] = 0)"
            )
    if any(_settings(s.module) != _settings(module) for s in tied):
        return "the modules that share its weight differ in padding_idx or sparse"
    return shared.why_not(module._parameters["weight"], [s.module for s in tied])


def _settings(module: nn.Module) -> tuple[object, object]:
    return getattr(module, "padding_idx", None), getattr(module, "sparse", None)


def _added(cls: type) -> list[str]:
    """What a subclass adds to or overrides in the class of torch.nn."""
    own = cls.__mro__[: next(i for i, c in enumerate(cls.__mro__) if c in _STOCK)]
    added = [n for c in own for n, v in vars(c).items() if callable(v) or not n.startswith("__")]
    return [name for name in added if name not in _HARMLESS]


def _in_the_way(module: nn.Module) -> list[str]:
    """What a user noted on a table under names that a compressed one has for something else."""
    bag = isinstance(module, nn.EmbeddingBag)
    stock = vars((nn.EmbeddingBag if bag else nn.Embedding)(1, 1, device="meta"))
    new = EmbeddingBag if bag else Embedding
    return [n for n in vars(module) if n not in stock and (n in ("name", "tables") or hasattr(new, n))]


def why_not_weight(weight: Tensor) -> str | None:
    """Why a weight cannot be replaced, if so, whatever module it is in."""
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor (quantized or sharded?)"
    if weight.dtype != torch.float32:
        return f"its weight is {weight.dtype}, and tables are trained in float32: convert it first (.float())"
    if not weight.requires_grad:
        return "its weight is frozen (requires_grad=False), and a compressed table would have to be trained"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "its weight has gradient hooks, which new parameters would not call: remove them first"
    if not weight.numel():
        return f"it is empty, of shape {tuple(weight.shape)}"
    if not weight.is_meta and not bool(torch.isfinite(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))):
        return "its weight holds NaN or infinite values"
    return None


def _unit(tied: Sequence[Site], patterns: Sequence[str]) -> Unit:
    names = [name for site in tied for name in site.names]
    name = next((n for n in names if method_of(n, patterns) is not None), names[0])
    module = tied[0].module
    assert isinstance(module, _STOCK)
    config = TableConfig(name, module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx)
    weight = module._parameters["weight"]
    assert weight is not None
    return Unit(list(tied), [config], [weight])


# ---- collections -----------------------------------------------------------------------------------------------------


def _torchrec_class(name: str) -> type | None:
    """A class of torchrec's, where the program uses torchrec; it is never imported for this."""
    module = sys.modules.get("torchrec.modules.embedding_modules")
    return getattr(module, name, None)


def is_collection(module: nn.Module) -> bool:
    """Whether it is one of torchrec's plain collections."""
    return type(module) in (_torchrec_class("EmbeddingBagCollection"), _torchrec_class("EmbeddingCollection"))


def is_bag_collection(module: nn.Module) -> bool:
    return type(module) is _torchrec_class("EmbeddingBagCollection")


def _collection(site: Site, shared: _Shared) -> Unit | str:
    """A collection's tables, or why it is left alone."""
    from embtables.faces.torchrec.shared import table_config

    collection: Any = site.module
    name = site.names[0]
    if any(getattr(m, hooks, None) for m in collection.modules() for hooks in _HOOKS):
        return "it has hooks, which a compressed collection would not call: remove them first"
    bags = is_bag_collection(collection)
    stock = collection.embedding_bags if bags else collection.embeddings
    configs: list[TableConfig] = []
    weights: list[nn.Parameter] = []
    for config in collection.embedding_bag_configs() if bags else collection.embedding_configs():
        weight = stock[config.name].weight
        pooling: Any = config.pooling.name.lower() if bags else "sum"
        try:
            table = table_config(config, pooling)
        except ValueError as error:
            return str(error)
        reason = why_not_weight(weight) or shared.why_not(weight, [stock[config.name]])
        if reason is not None:
            return f"table '{config.name}': {reason}"
        configs.append(replace(table, name=f"{name}.{config.name}", init_fn=None))
        weights.append(weight)
    return Unit([site], configs, weights, name)


def _other_table(module: nn.Module) -> str | None:
    """Why a module that looks like a table, by its class, is none that can be swapped."""
    name, package = type(module).__name__, type(module).__module__
    if "Embedding" not in name or not package.startswith(("torch.", "torchrec.")):
        return None
    if "quant" in package or "qat" in package:
        return f"it is quantized ({name})"
    if package.startswith("torchrec.") and name.endswith(("EmbeddingCollection", "EmbeddingBagCollection")):
        return f"{name} is none of torchrec's plain collections"
    return None


def _matches(unit: Unit, patterns: Sequence[str]) -> bool:
    unmatched = [config.name for config in unit.configs if method_of(config.name, patterns) is None]
    if unmatched and len(unmatched) < len(unit.configs):
        raise ValueError(
            f"no pattern of method matches table '{unmatched[0]}', but one matches another table of the collection "
            f"'{unit.collection}', which is swapped as a whole: add a pattern, such as '*': 'full'"
        )
    return not unmatched
