"""Whatever holds the old tables beside the modules themselves: lists and attributes to rewrite, and the rest."""

from __future__ import annotations

import gc
import logging
import types
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

_LEAVES = (
    str, bytes, int, float, complex, type(None), type, Tensor, logging.Logger, types.ModuleType, types.FunctionType,
    types.BuiltinFunctionType, types.MethodType, types.CodeType,
)  # fmt: skip
_DEPTH = 12


class Holders:
    """What the attributes of a model hold of the old tables, and of optimizers.

    Args:
        model: the model.
        new: for the id of each old parameter or module, what takes its place.
        names: for the same ids, the table's name.

    ``edits`` make the change, ``optimizers`` are those found, ``notes`` say what will be different, ``known`` are the
    ids of all containers that are rewritten.

    Raises:
        ValueError: for a holder that cannot be rewritten, naming it.
    """

    def __init__(self, model: nn.Module, new: Mapping[int, Sequence[Any]], names: Mapping[int, str]) -> None:
        self.new, self.names = new, names
        self.edits: list[Callable[[], object]] = []
        self.optimizers: dict[int, tuple[str, Optimizer]] = {}
        self.notes: list[str] = []
        self.known: set[int] = set()
        self._seen: set[int] = set()
        self._registers: set[int] = set()
        for module in model.modules():
            self.known |= {id(module._modules), id(module._parameters)}
            self._seen |= {id(module), id(module._modules), id(module._parameters), id(module._buffers)}
        for name, module in model.named_modules():
            if id(module) not in new:
                self._dict(vars(module), name or "model", 0)

    # ---- the walk ------------------------------------------------------------------------------------------------

    def _visit(self, value: Any, path: str, depth: int) -> None:
        if isinstance(value, _LEAVES) or id(value) in self._seen or id(value) in self.new or depth > _DEPTH:
            return
        self._seen.add(id(value))
        if isinstance(value, Optimizer) and hasattr(value, "param_groups"):
            self.optimizers[id(value)] = path, value
        elif isinstance(value, dict):
            self._dict(value, path, depth)
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            for i, element in enumerate(value):
                self._visit(element, f"{path}[{i}]", depth + 1)
            if not isinstance(value, tuple) and any(map(self._touched, value)):
                self._sequence(value, path)
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            if isinstance(value, nn.Module):  # none of the model's own: a list or an object holds it
                self._registers.add(id(value._parameters))
            self._dict(vars(value), path, depth)

    def _dict(self, held: dict[Any, Any], path: str, depth: int) -> None:
        for key, value in list(held.items()):
            label = f"{path}.{key}" if isinstance(key, str) and key.isidentifier() else f"{path}[{key!r:.40}]"
            if id(key) in self.new:
                raise ValueError(self._cannot(f"'{path}', by its keys", key))
            self._visit(value, label, depth + 1)
            if self._touched(value):
                self.known |= {id(held)}
                (renewed,) = self._renewed([value], label, pairs=True)
                if id(held) in self._registers and renewed.shape != value.shape:
                    whose = label.replace("._parameters.", ".")
                    raise ValueError(self._cannot(f"'{whose}', a parameter of shape {_shape(value)}", value))
                self._note(label, [value], [renewed])
                self.edits.append(partial(held.__setitem__, key, renewed))

    def _sequence(self, held: Any, path: str) -> None:
        self.known.add(id(held))
        elements = list(held)
        only_weights = all(isinstance(e, nn.Parameter) for e in elements)
        renewed = self._renewed(elements, path, pairs=not only_weights)
        if isinstance(held, frozenset):
            raise ValueError(self._cannot(f"the frozenset '{path}'", next(e for e in elements if self._touched(e))))
        gone = sum(id(e) in self.new for e in elements) if len(renewed) == 0 or not self._any_new(elements) else 0
        if gone:
            self.notes.append(f"{path}: {gone} weights left it, since no parameter takes their place")
        else:
            self._note(path, elements, renewed)

        def fill() -> None:
            held.clear()
            (held.update if isinstance(held, set) else held.extend)(renewed)

        self.edits.append(fill)

    def _any_new(self, elements: Iterable[Any]) -> bool:
        return any(len(self.new[id(e)]) for e in elements if id(e) in self.new)

    def _note(self, path: str, old: Sequence[Any], new: Sequence[Any]) -> None:
        """Says what is rewritten; the shape too where one weight takes the place of one."""
        if len(old) == len(new) == 1 and isinstance(old[0], nn.Parameter):
            self.notes.append(f"{path}: now the new parameter, {_shape(new[0])} in place of {_shape(old[0])}")
        elif len(old) == len(new) == 1 and isinstance(old[0], nn.Module):
            self.notes.append(f"{path}: now the new module")
        else:
            self.notes.append(
                f"{path}: the new in place of what it held of old weights and modules, {self._count(old)}"
            )

    def _count(self, elements: Iterable[Any]) -> int:
        return sum(self._count(e) if isinstance(e, tuple) else id(e) in self.new for e in elements)

    # ---- new contents --------------------------------------------------------------------------------------------

    def _touched(self, value: Any) -> bool:
        """Whether it is an old thing, or a tuple that holds one."""
        return id(value) in self.new or (isinstance(value, tuple) and any(map(self._touched, value)))

    def _renewed(self, elements: Sequence[Any], path: str, pairs: bool) -> list[Any]:
        """The elements with the new in place of the old, each once; where ``pairs``, exactly one for one."""
        result: list[Any] = []
        for element in elements:
            if id(element) in self.new:
                new = self.new[id(element)]
                if pairs and len(new) != 1:
                    raise ValueError(
                        self._cannot(f"'{path}', which has room for exactly one parameter a table", element)
                    )
                result += [n for n in new if pairs or not any(n is r for r in result)]
            elif self._touched(element):
                result.append(self._tuple(element, path))
            else:
                result.append(element)
        return result

    def _tuple(self, value: tuple[Any, ...], path: str) -> tuple[Any, ...]:
        self.known.add(id(value))
        only_weights = all(isinstance(e, nn.Parameter) for e in value)
        renewed = self._renewed(value, path, pairs=not only_weights)
        return type(value)(*renewed) if hasattr(value, "_fields") else type(value)(renewed)

    def _cannot(self, holder: str, element: Any) -> str:
        return (
            f"the table '{self.names[id(element)]}' is held by {holder}, and what takes its place does not fit there: "
            "call compress_ before that is built, or delete it first"
        )


def _shape(weight: Tensor) -> str:
    return " × ".join(f"{n:,}" for n in weight.shape)


# ---- holders outside the model ---------------------------------------------------------------------------------------


def refuse_other_holders(old: Sequence[Any], names: Mapping[int, str], known: set[int]) -> None:
    """Raises ``ValueError`` for whatever else holds old parameters or modules, but for single variables.

    Args:
        old: parameters and modules.
        names: the table's name for the id of each.
        known: ids of containers that are dealt with.
    """
    gc.collect()
    targets = {id(o) for o in old}
    holders = gc.get_referrers(*old)
    # One whose constructor failed has no groups, and updates nothing.
    optimizers = [o for o in gc.get_objects() if issubclass(type(o), Optimizer) and "param_groups" in vars(o)]
    for optimizer in optimizers:
        held = [id(p) for group in optimizer.param_groups for p in group["params"] if id(p) in targets]
        if held and not {id(group["params"]) for group in optimizer.param_groups} <= known:
            raise ValueError(
                f"an optimizer ({type(optimizer).__name__}) that is no attribute of the model holds {len(held)} of the "
                f"old tables, '{names[held[0]]}' among them, and would go on updating those: give it as "
                "rebind=(optimizer,), or build it after compress_"
            )
    for holder in holders:
        if id(holder) in known or id(holder) in targets or holder is old or _is_variables(holder):
            continue
        if _is_rewritten(holder, targets, known):
            continue
        which = next(names[id(r)] for r in gc.get_referents(holder) if id(r) in targets)
        raise ValueError(
            f"the old table '{which}' is also held by {describe(holder)}, outside of what compress_ can rewrite, and "
            "would live on there in silence: delete it, or build it after compress_"
        )


def _is_rewritten(holder: Any, targets: set[int], known: set[int]) -> bool:
    """Whether an object holds the targets by attributes that are rewritten, and by nothing else, such as slots."""
    attributes = getattr(holder, "__dict__", None)
    if attributes is None or id(attributes) not in known:
        return False
    held = Counter(id(r) for r in gc.get_referents(holder) if id(r) in targets)
    return not held - Counter(map(id, attributes.values()))


def _is_variables(holder: Any) -> bool:
    """A caller's own single variables: the locals of a function, the globals of a script."""
    return isinstance(holder, types.FrameType) or (isinstance(holder, dict) and "__builtins__" in holder)


def describe(holder: Any) -> str:
    """A container or other object, with the attribute or variable that it is, where that can be told."""
    kind = f"a {type(holder).__name__}"
    if isinstance(holder, (list, tuple, set, dict, deque)):
        kind += f" of {len(holder)}"
    for owner in gc.get_referrers(holder):
        if isinstance(owner, dict):
            key = next((k for k, v in owner.items() if v is holder), None)
            if "__builtins__" in owner:
                return f"{kind} (the variable '{key}')"
            names = [type(o).__name__ for o in gc.get_referrers(owner) if getattr(o, "__dict__", None) is owner]
            if names:
                return f"{kind} (attribute '{key}' of a {names[0]})"
        elif not isinstance(owner, types.FrameType) and hasattr(owner, "__dict__"):
            key = next((k for k, v in vars(owner).items() if v is holder), None)
            if key is not None:
                return f"{kind} (attribute '{key}' of a {type(owner).__name__})"
    return kind
