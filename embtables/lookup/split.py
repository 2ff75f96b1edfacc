"""A parameter for each slab, where lookups read the slabs of a width as one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from embtables import ops


class SlabWeight(nn.Module):
    """Holds the rows of a slab as the parameter ``weight``, as ``nn.Embedding`` holds a table."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


class _Joined(torch.autograd.Function):
    """The tensor in which the parameters lie one after another; its backward gives each its rows of the gradient."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.rows = [parameter.shape[0] for parameter in parameters]
        first = parameters[0]
        return first.data.as_strided((sum(ctx.rows), first.shape[1]), (first.shape[1], 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.split(ctx.rows)


class SplitWeight:
    """A parameter for each slab of a width, ``weight`` of ``modules[name]``, and one tensor for all of them.

    The parameters lie one after another in one storage, so that the one tensor is a view of them. ``lay`` moves them
    there. Parameters that somebody has put elsewhere since, as FSDP does for the time of a forward, are copied by each
    lookup.

    Args:
        weight: ``[rows, width]``, the slabs one after another.
        slabs: the number of rows of each.
    """

    def __init__(self, weight: Tensor, slabs: Mapping[str, int]) -> None:
        self.modules = {name: SlabWeight(part) for name, part in zip(slabs, weight.split(list(slabs.values())))}
        self._begin()

    def _begin(self) -> None:
        # The modules' own dictionaries: an attribute of a module takes many times as long to read.
        self._own = [module._parameters for module in self.modules.values()]
        self._view: Tensor | None = None
        self._seen: list[Tensor] = []
        self._trained: list[bool] = []
        self._addresses: list[int] = []
        self.lay()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files have storage and a graph of their own."""
        return {"modules": self.modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def weights(self) -> list[Tensor]:
        """The parameters as they are now."""
        return [own["weight"] for own in self._own]  # type: ignore[misc]

    def is_sharded(self) -> bool:
        """Whether this process holds only parts of the parameters."""
        return any(hasattr(weight, "full_tensor") for weight in self.weights())

    def trains(self) -> bool:
        """Whether any of the parameters gets a gradient."""
        return any(weight.requires_grad for weight in self.weights())

    def joined(self) -> Tensor:
        """All rows ``[rows, width]``, whose gradient the parameters get.

        Raises:
            RuntimeError: for gradients of parameters of which this process holds only parts.
        """
        weights = self.weights()
        view = self._view
        if (
            view is not None
            and all(map(is_, weights, self._seen))
            and [w.requires_grad for w in weights] == self._trained
        ):
            # Graphs look at no address: what they are made of has been laid.
            if torch.compiler.is_compiling() or [weight.data_ptr() for weight in weights] == self._addresses:
                return view
        if torch.compiler.is_compiling():
            return torch.cat(weights)
        self._view, self._seen = None, []
        if self.is_sharded():
            return torch.cat([self._whole(name, weight) for name, weight in zip(self.modules, weights)])
        if not _in_a_row(weights):
            return torch.cat(weights)
        with torch.inference_mode(False), torch.enable_grad():
            self._view = view = _Joined.apply(*weights)
        self._seen, self._trained = weights, [weight.requires_grad for weight in weights]
        self._addresses = [weight.data_ptr() for weight in weights]
        return view

    @staticmethod
    def _whole(name: str, weight: Tensor) -> Tensor:
        if torch.is_grad_enabled() and weight.requires_grad:
            raise RuntimeError(
                f"this process holds a shard of table '{name}' ({type(weight).__name__}): a lookup with gradients "
                "needs the whole of it, which a call of the module that was sharded gathers"
            )
        whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        return whole

    @torch.no_grad()
    def lay(self) -> None:
        """Has the parameters lie one after another, where they are plain ones of one device and type."""
        weights = self.weights()
        plain = all(type(weight) is nn.Parameter for weight in weights)
        kinds = {(weight.device, weight.dtype) for weight in weights}
        if plain and len(kinds) == 1 and not weights[0].is_meta:
            if not _in_a_row(weights):
                rows = [weight.shape[0] for weight in weights]
                storage = ops.huge_pages(weights[0].new_empty(sum(rows), weights[0].shape[1]))
                for weight, part in zip(weights, storage.split(rows)):
                    part.copy_(weight)
                    weight.data = part
            self.joined()

    @torch.no_grad()
    def fill(self, values: Tensor) -> None:
        """Takes over ``values`` ``[rows, width]``, which may be what ``joined`` gave, changed in place."""
        parts = values.split([weight.shape[0] for weight in self.weights()])
        for module, part in zip(self.modules.values(), parts):
            if module.weight.is_meta and not part.is_meta:
                module.weight = nn.Parameter(part.clone(), requires_grad=module.weight.requires_grad)
            elif module.weight.data_ptr() != part.data_ptr():
                module.weight.copy_(part)
        self.lay()


def _in_a_row(weights: list[Tensor]) -> bool:
    """Whether the tensors lie one after another in one storage."""
    first = weights[0]
    if first.is_meta or any(type(weight) not in (Tensor, nn.Parameter) for weight in weights):
        return False
    storage, address = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in weights:
        own = weight.untyped_storage().data_ptr(), weight.data_ptr()
        if own != (storage, address) or not weight.is_contiguous() or weight.dtype != first.dtype:
            return False
        address += weight.nbytes
    return True
