"""Optimisers that were built before the swap: their parameter groups get the new parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Adagrad, Optimizer


@dataclass(slots=True)
class Swap:
    """Old parameters, and the new ones that take their place, all together; names of the tables.

    ``same``: whether the one new parameter is the one old table, of the same shape, so that an optimiser's state fits.
    """

    names: list[str]
    old: list[nn.Parameter]
    new: list[nn.Parameter]
    same: bool


def check(path: str, optimizer: Optimizer, swaps: Sequence[Swap]) -> None:
    """Raises ``ValueError`` where the optimiser cannot be given the new parameters."""
    if isinstance(optimizer, LBFGS) and any(_places(optimizer, p) for swap in swaps for p in swap.old):
        raise ValueError(f"{path}: LBFGS keeps one vector of all parameters: build it after compress_")
    for swap in swaps:
        places = [_places(optimizer, p) for p in swap.old]
        for name, place in zip(swap.names, places):
            if place != places[0]:
                raise ValueError(
                    f"'{swap.names[0]}' and '{name}' would share storage, but {path} ({type(optimizer).__name__}) has "
                    f"them in {_words(places[0])} and {_words(place)}: give them patterns of method of their own, or "
                    "put them into one group"
                )


def _places(optimizer: Optimizer, parameter: nn.Parameter) -> list[int]:
    return [i for i, g in enumerate(optimizer.param_groups) if any(p is parameter for p in g["params"])]


def _words(places: list[int]) -> str:
    return "group " + ", ".join(map(str, places)) if places else "no group"


def containers(optimizer: Optimizer) -> set[int]:
    """Ids of what ``move`` rewrites."""
    return {id(group["params"]) for group in optimizer.param_groups} | {id(optimizer.state)}


def move(path: str, optimizer: Optimizer, swaps: Sequence[Swap]) -> str | None:
    """Puts the new parameters where the old ones were, and says so; options of the groups stay as they are.

    State of old parameters goes, but where a table is stored in full and alone it is the new parameter's.
    """
    swap_of = {id(p): swap for swap in swaps for p in swap.old}
    groups: list[int] = []
    left = entered = states = 0
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
                states += _move_state(optimizer, group, parameter, new, swap.same)
        group["params"][:] = params
        if named is not None:
            named[:] = labels
    if not left:
        return None
    in_groups = f"group {', '.join(map(str, groups))}" if len(optimizer.param_groups) > 1 else "its group"
    text = f"{path} ({type(optimizer).__name__}): {entered} new parameters took the place of {left} in {in_groups}"
    if states:
        text += f"; the state of {states} was dropped"
    if not any(group["params"] for group in optimizer.param_groups):
        text += "; nothing is left for it to update"
    return text


def _move_state(
    optimizer: Optimizer, group: Mapping[str, Any], old: nn.Parameter, new: Sequence[nn.Parameter], same: bool
) -> int:
    """Returns how many entries were dropped, 0 or 1."""
    state = optimizer.state.pop(old, None)
    if state and same:
        optimizer.state[new[0]] = state
        return 0
    if isinstance(optimizer, Adagrad):  # the one that makes its state in the constructor
        for parameter in new:
            start = group.get("initial_accumulator_value", 0.0)
            optimizer.state[parameter] = {"step": torch.tensor(0.0), "sum": torch.full_like(parameter, start)}
        return int(state is not None and bool(state["step"] > 0))
    return int(bool(state))
