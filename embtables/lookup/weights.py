"""Where the parameters live: one 2-D tensor per row format and width, with slabs side by side in it.

A lookup of all tables is one gather per width, however many tables there are. Slabs, extras and codes keep stable
names, for checkpoints and for sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from embtables import ops
from embtables.formats import DTYPES, FP32, PackedFormat, scales_name, weight_name
from embtables.lookup.slabs import Slabs
from embtables.lookup.split import SlabWeight, SplitWeight
from embtables.sizes.layout import Form

_DENSE = DTYPES[FP32.dtype]  # of extras


class SparseWeight(nn.Embedding):
    """Holds a weight whose gradients are sparse, as ``weight``.

    ``DistributedDataParallel`` expects sparse gradients of the parameters that an ``nn.Embedding`` or
    ``nn.EmbeddingBag`` holds itself, and dense ones of all others (``torch/nn/parallel/distributed.py``,
    ``_build_params_for_reducer``). In state dicts the weight has the name of this module, as dense ones have theirs.
    """

    def __init__(self, weight: Tensor) -> None:
        rows, width = weight.shape
        super().__init__(rows, width, _weight=weight, sparse=True)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix.removesuffix(".")] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        *others: list[str],
    ) -> None:
        lacking: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, lacking, *others)
        missing += [prefix.removesuffix(".") for _ in lacking]


class Weights(Slabs):
    """Slabs, extras and codes of all groups.

    Args:
        forms: what to allocate.
        as_parameters: whether slabs and trained extras are parameters, to which autograd gives gradients, or buffers.
        sparse: whether the gradients of slabs are sparse tensors, where they are parameters.
        device: where to allocate, ``"meta"`` included.
    """

    def __init__(
        self,
        forms: Sequence[Form],
        *,
        as_parameters: bool,
        sparse: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(forms, device)
        self.as_parameters, self.sparse = as_parameters, sparse
        self.split_weights: dict[str, SplitWeight] = {}  # by the attributes that the whole ones have
        extras = [extra for form in forms for extra in form.extras]
        self._extras = {extra.name: f"extra_{i}" for i, extra in enumerate(extras)}
        self._fixed = {self._extras[extra.name] for extra in extras if not extra.trained}
        for name, rows in self._stored_rows.items():
            stored, scales = rows.empty(device)
            self._add_weight(name, ops.huge_pages(stored))
            if scales is not None:
                self.register_buffer(scales_name(name), scales)
        for extra in extras:
            self._add_weight(self._extras[extra.name], torch.empty(extra.shape, dtype=_DENSE, device=device))
        self._codes = {code.name: f"code_{i}" for i, code in enumerate(c for form in forms for c in form.codes)}
        floats = (c for form in forms for c in form.codes if DTYPES[c.dtype].is_floating_point)
        self._codes_in_other_formats = [self._codes[code.name] for code in floats if DTYPES[code.dtype] != _DENSE]
        for code in (c for form in forms for c in form.codes):
            empty = torch.empty(code.shape, dtype=DTYPES[code.dtype], device=device)
            self.register_buffer(self._codes[code.name], ops.huge_pages(empty))

    def _add_weight(self, name: str, weight: Tensor) -> None:
        if not (self.as_parameters and self.is_trained(name)):
            self.register_buffer(name, weight)
        elif self.sparse and name in self.weight_names:  # the gradients of extras are dense in any case
            self.add_module(name, SparseWeight(weight))
        else:
            self.register_parameter(name, nn.Parameter(weight))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves like any module, and casts what is stored in fp32; other formats stay what they are."""
        kept = {name: self._buffers[name] for name in self.left_by_casts()}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = self._buffers[name]
            assert before is not None and now is not None
            if now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        for split in self.split_weights.values():
            for module in split.modules.values():
                module._apply(fn)
            split.lay()
        return self

    def left_by_casts(self) -> list[str]:
        """The attributes of the buffers that ``half()`` and its like leave as they are."""
        return self.in_other_formats()

    def is_half(self) -> bool:
        """Whether the weights are of half precision."""
        return self.dtype.itemsize == 2

    # ---- a parameter for each slab --------------------------------------------------------------------------------

    def split(self) -> None:
        """Makes each slab a parameter of its own, that of ``slab_modules``, for the caller to register.

        They are no parameters of this module then, though it goes on moving, saving and loading them. Lookups read the
        slabs of a width as one tensor, as before.

        Raises:
            ValueError: where the weights are no parameters with dense gradients.
        """
        if not self.as_parameters or self.sparse:
            raise ValueError("only parameters with dense gradients can be split into one for each slab")
        for name in self.weight_names:
            weight = self._parameters.pop(name)
            assert weight is not None
            slabs = {slab: self.rows(slab) for slab in self.slabs_of(name)}
            self.split_weights[name] = SplitWeight(weight.data, slabs)

    @property
    def slab_modules(self) -> dict[str, SlabWeight]:
        """The modules that hold the slabs' own parameters, by name; none unless ``split`` made them."""
        return {name: module for split in self.split_weights.values() for name, module in split.modules.items()}

    def lay(self) -> None:
        """Moves the slabs' own parameters beside each other, where they were assigned one by one."""
        for split in self.split_weights.values():
            split.lay()

    def parameter(self, slab: str) -> Tensor | None:
        """The parameter that is a slab, or the part of one that is; ``None`` where there is no parameter."""
        start, found = self._slabs[slab]
        name = self.weight_of(slab)
        if name in self.split_weights:
            return self.split_weights[name].modules[slab].weight
        held = self._modules.get(name)
        weight = held.weight if isinstance(held, SparseWeight) else self._parameters.get(name)
        return weight if weight is None or found.rows == weight.shape[0] else weight[start : start + found.rows]

    def in_other_formats(self) -> list[str]:
        """The attributes of numbers in other formats than fp32, and of their scales: they are never cast."""
        weights = [name for name, rows in self._stored_rows.items() if rows.format != FP32]
        found = [name for weight in weights for name in (weight, scales_name(weight)) if name in self._buffers]
        return found + self._codes_in_other_formats

    @contextmanager
    def _whole(self, names: list[str], *, loads: bool) -> Iterator[None]:
        """Split weights are saved and loaded whole, as buffers, but are none: others would broadcast buffers."""
        self._buffers.update({name: self.split_weights[name].joined().detach() for name in names})
        try:
            yield
        finally:
            for name in names:
                whole = self._buffers.pop(name)
                assert whole is not None
                if loads:
                    self.split_weights[name].fill(whole)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        # Whoever shards the parameters saves them where they are registered.
        with self._whole([name for name, split in self.split_weights.items() if not split.is_sharded()], loads=False):
            super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Split weights may stand for themselves in a state dict, which then holds them where they are registered."""
        # A module is shown the keys below its own name alone.
        for key in (prefix + name for name in self._modules):
            if key in state_dict:
                state_dict[f"{key}.weight"] = state_dict.pop(key)
        elsewhere = [name for name, split in self.split_weights.items() if state_dict.get(prefix + name) is split]
        for name in elsewhere:
            del state_dict[prefix + name]
        with self._whole([name for name in self.split_weights if name not in elsewhere], loads=True):
            super()._load_from_state_dict(state_dict, prefix, *arguments)

    # ---- weights, extras and codes --------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """A weight, extra, code or state by its name in state dicts, at a fraction of the time of ``getattr``."""
        found = self._buffers.get(name)
        if found is None:
            found = self._parameters.get(name)
        if found is None and name in self.split_weights:
            return self.split_weights[name].joined()
        if found is None:
            found = getattr(self, name)
        return found.weight if isinstance(found, SparseWeight) else found

    def weight(self, width: int) -> Tensor:
        """The rows of all slabs of a width that are stored in fp32, ``[rows, width]``."""
        return self.tensor(weight_name(FP32.name, width))

    def extra(self, name: str) -> Tensor:
        """A dense tensor, whole. A block takes those of its step instead, whose backward updates what is trained."""
        return self.tensor(self._extras[name])

    def is_trained(self, weight: str) -> bool:
        """Whether steps change a weight or extra, by its attribute."""
        return weight not in self._fixed

    def code(self, name: str) -> Tensor:
        """A buffer that no gradient trains."""
        return self.tensor(self._codes[name])

    def matrix(self, weight: str) -> Tensor:
        """A weight or extra, by its attribute, as the rows that its state has: an extra of one dimension is one row."""
        tensor = self.tensor(weight)
        return tensor.view(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.view(1, -1)

    def extra_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the extras, by name."""
        return {name: tuple(self.extra(name).shape) for name in self._extras}

    def code_names(self) -> list[str]:
        """The names of the codes, in the order of their allocation."""
        return list(self._codes)

    def key(self, name: str) -> str:
        """The attribute of an extra or code, which is its name in state dicts."""
        return self._extras.get(name) or self._codes[name]

    def tensors(self) -> Iterator[tuple[str, Tensor, bool]]:
        """``(name, tensor, is no parameter)`` of everything that is allocated, optimizer state aside."""
        for name in self.weight_names:
            yield name, self.tensor(name), False
            if self.scales(name) is not None:
                yield scales_name(name), self.tensor(scales_name(name)), True
        for name in self._extras:
            yield name, self.extra(name), not self.is_trained(self.key(name))
        for name in self._codes:
            yield name, self.code(name), True

    def stored(self) -> dict[str, Tensor]:
        """Weights, scales, extras and codes by their attributes, as files hold them."""
        scales = [scales_name(name) for name in self.weight_names if self.scales(name) is not None]
        names = [*self.weight_names, *scales, *self._extras.values(), *self._codes.values()]
        return {name: self.tensor(name).detach() for name in names}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts these tensors, by their attributes, in the place of buffers, such as those of served tables."""
        assert self._buffers.keys() >= tensors.keys()
        self._buffers.update(tensors)

    def slab(self, name: str) -> Tensor:
        """A view ``[rows, width]`` of the weights of a slab as they are stored: plain numbers, as all are that train.

        Their type is that of the slab's format. What is written into a view in 16 bits is rounded to nearest.

        Raises:
            ValueError: for a slab in a format of packed integers.
        """
        start, slab = self._slabs[name]
        weight = self.weight_of(name)
        if isinstance(self._stored_rows[weight].format, PackedFormat):
            raise ValueError(f"slab '{name}' is stored in {slab.format}: read_slab() gives a copy of its rows")
        if weight in self.split_weights:
            return self.split_weights[weight].modules[name].weight.detach()
        return self.tensor(weight).detach()[start : start + slab.rows]

    def named_slabs(self) -> Iterator[tuple[str, Tensor]]:
        """``(name, view)`` of every slab."""
        return ((name, self.slab(name)) for name in self._slabs)
