"""Optimizers that were built before the swap: their parameter groups get the new parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import (
    ASGD,
    LBFGS,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)

_DENSE_ONLY = (Adam, AdamW, Adamax, NAdam, RAdam, Adadelta, RMSprop, Rprop, ASGD)


@dataclass(slots=True)
class Swap:
    """Old parameters, and the new ones that take their place, all together; names of the tables.

    ``rows``: where each old table lies within the new parameters, by number and first row, so that an optimizer's state
    fits; empty where some are not stored in full. ``gradients``: what the new ones get, of "sparse" and "dense".
    """

    names: list[str]
    old: list[nn.Parameter]
    new: list[nn.Parameter]
    rows: list[tuple[int, int]]
    gradients: set[str]


def check(path: str, optimizer: Optimizer, swaps: Sequence[Swap]) -> None:
    """Raises ``ValueError`` where the optimizer cannot be given the new parameters."""
    if isinstance(optimizer, LBFGS) and any(_places(optimizer, p) for swap in swaps for p in swap.old):
        raise ValueError(f"{path}: LBFGS keeps one vector of all parameters: build it after compress_")
    for swap in swaps:
        if _places(optimizer, swap.old[0]):
            _check_gradients(path, optimizer, swap)
        places = [_places(optimizer, p) for p in swap.old]
        for name, place in zip(swap.names, places):
            if place != places[0]:
                raise ValueError(
                    f"'{swap.names[0]}' and '{name}' would share storage, but {path} ({type(optimizer).__name__}) has "
                    f"them in {_words(places[0])} and {_words(place)}: give them patterns of method of their own, or "
                    "put them into one group"
                )


def _check_gradients(path: str, optimizer: Optimizer, swap: Swap) -> None:
    which = f"'{swap.names[0]}': {path} ({type(optimizer).__name__})"
    if type(optimizer) in _DENSE_ONLY and "sparse" in swap.gradients:
        raise ValueError(
            f"{which} takes dense gradients alone, and those of the new table would be sparse: sparse=False"
        )
    if isinstance(optimizer, SparseAdam) and "dense" in swap.gradients:
        cure = "a method without trained projections" if "sparse" in swap.gradients else "sparse=True"
        raise ValueError(
            f"{which} takes sparse gradients alone, and those of the new table would be dense: choose {cure}, or "
            "another optimizer"
        )


def _places(optimizer: Optimizer, parameter: nn.Parameter) -> list[int]:
    return [i for i, g in enumerate(optimizer.param_groups) if any(p is parameter for p in g["params"])]


def _words(places: list[int]) -> str:
    return "group " + ", ".join(map(str, places)) if places else "no group"


def containers(optimizer: Optimizer) -> set[int]:
    """Ids of what ``move`` rewrites."""
    return {id(group["params"]) for group in optimizer.param_groups} | {id(optimizer.state)}


def move(path: str, optimizer: Optimizer, swaps: Sequence[Swap]) -> str:
    """Puts the new parameters where the old ones were, and says so; options of the groups stay as they are.

    State of old parameters goes, but where all tables of a swap are stored in full it is the new parameters'.
    """
    swap_of = {id(p): swap for swap in swaps for p in swap.old}
    groups: list[int] = []
    left = entered = 0
    within: dict[int, Mapping[str, Any]] = {}
    for number, group in enumerate(optimizer.param_groups):
        params: list[Any] = []
        labels: list[str] = []
        named = group.get("param_names")
        for i, parameter in enumerate(group["params"]):
            swap = swap_of.get(id(parameter))
            new = [parameter] if swap is None else [p for p in swap.new if not any(p is q for q in params)]
            params += new
            if named is not None:
                labels += [named[i]] if swap is None else [f"{swap.names[0]}.{j}" for j in range(len(new))]
            if swap is not None:
                left += 1
                entered += len(new)
                groups += [number] if number not in groups else []
                within[id(swap)] = group
        group["params"][:] = params
        if named is not None:
            named[:] = labels
    if not left:
        return f"{path} ({type(optimizer).__name__}): holds none of the tables, so it stays as it is"
    states = sum(_move_state(optimizer, within[id(swap)], swap) for swap in swaps if id(swap) in within)
    in_groups = f"group {', '.join(map(str, groups))}" if len(optimizer.param_groups) > 1 else "its group"
    text = f"{path} ({type(optimizer).__name__}): {entered} new parameters took the place of {left} in {in_groups}"
    if states:
        text += f"; the state of {states} was dropped"
    if not any(group["params"] for group in optimizer.param_groups):
        text += "; nothing is left for it to update"
    return text


def _move_state(optimizer: Optimizer, group: Mapping[str, Any], swap: Swap) -> int:
    """Returns of how many tables it was dropped."""
    states = [optimizer.state.pop(old, None) or {} for old in swap.old]
    merged = [_merged(swap, states, number) for number in range(len(swap.new))]
    if merged and all(merged):
        optimizer.state.update(zip(swap.new, merged))
        return 0
    if isinstance(optimizer, Adagrad):  # the one that makes its state in the constructor
        for parameter in swap.new:
            start = group.get("initial_accumulator_value", 0.0)
            optimizer.state[parameter] = {"step": torch.tensor(0.0), "sum": torch.full_like(parameter, start)}
        return sum(bool(state and state["step"] > 0) for state in states)
    return sum(map(bool, states))


def _merged(swap: Swap, states: Sequence[Mapping[str, Any]], number: int) -> dict[str, Any]:
    """The state of a new parameter, of those of the tables in it; empty where they do not make one."""
    order = sorted((row, i) for i, (n, row) in enumerate(swap.rows) if n == number)
    parts = [(states[i], swap.old[i].shape) for _, i in order]
    if not parts or any(state.keys() != parts[0][0].keys() for state, _ in parts):
        return {}
    if len(parts) == 1:
        return dict(parts[0][0])
    merged: dict[str, Any] = {}
    for key, first in parts[0][0].items():
        values = [state[key] for state, _ in parts]
        if all(isinstance(v, torch.Tensor) and v.shape == shape for v, (_, shape) in zip(values, parts)):
            merged[key] = torch.cat(values)
        elif all(v is None or isinstance(v, torch.Tensor) and v.numel() == 1 for v in values) and all(
            v == first for v in values
        ):
            merged[key] = first
        else:
            return {}
    return merged
