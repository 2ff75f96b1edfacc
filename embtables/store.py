"""Where the parameters live: one 2-D tensor a width, slabs side by side in it, and the one gather over them.

A lookup of all tables is one ``index_select`` a width, however many tables there are. Slabs, extras and codes keep
stable names, for checkpoints and for sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embtables import ops
from embtables.layout import DTYPES, Form, Slab
from embtables.optimizers import FusedOptimizer

_NO_STEP = torch.zeros((), dtype=torch.int64)
_NOTHING = torch.empty(0)


class Part(NamedTuple):
    """A request to the store: ``rows`` (int64 of any shape, counted within ``width``; −1 yields zeros).

    ``subset``: which of the ids, counted flat, the first dimension of ``rows`` stands for; ``None`` for all of them, in
    their own shape.
    """

    width: int
    rows: Tensor
    subset: Tensor | None = None


class _DenseOnce(torch.autograd.Function):
    """A weight under another name, to which lookups give sparse gradients: they add up as such, and become dense once.

    Otherwise each of a step's lookups would fill and add a tensor of the size of the weight.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, aliases: _Aliases) -> Tensor:
        ctx.aliases = aliases
        return weight.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.aliases.clear()
        return grad.to_dense() if grad.is_sparse else grad, None


class _Aliases(dict[tuple[int, int], Tensor]):
    """The weights' other names, by object and address, from the first lookup after a backward pass to the next one.

    On the meta device all addresses are 0.
    """

    def of(self, weight: Tensor) -> Tensor:
        key = id(weight), weight.data_ptr()
        if key not in self:
            self[key] = _DenseOnce.apply(weight, self)
        return self[key]

    def __reduce__(self) -> tuple[type[_Aliases], tuple[()]]:
        """Copies and files begin without."""
        return _Aliases, ()


class Store(nn.Module):
    """Slabs, extras and codes of all groups.

    Args:
        forms: what to allocate.
        optimizer: fused into backward; the weights are then buffers, and ``parameters()`` is empty. ``None``: the
            weights are ordinary parameters.
        sparse: with ``optimizer=None``, whether slab gradients are sparse tensors.
        trainable: ``False`` for served tables: buffers, no optimiser state.
        device: where to allocate, ``"meta"`` included.
    """

    _hyper: Tensor
    _place: Tensor
    _step: Tensor
    # Whether the present lookup trains: who looks up says so, since modules of different modes may share a store.
    training_lookup = False

    def __init__(
        self,
        forms: Sequence[Form],
        optimizer: FusedOptimizer | None,
        *,
        sparse: bool = False,
        trainable: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer if trainable else None
        self.sparse = sparse
        self.trainable = trainable
        # Set where a step looks up more than once: the dense gradients of all lookups are then made as one.
        self.many_lookups = False
        self._aliases = _Aliases()
        # Makes autograd call the lookup's backward, which updates the weights; it never gets a gradient itself.
        self._hook = torch.zeros((), device="cpu", requires_grad=True)
        # Extras in the present forward: two blocks that use one have to update it once, by the sum of their gradients.
        self._in_use: dict[str, Tensor] = {}
        # Moves along with the module, where there may be no other tensor (every table dropped).
        self.register_buffer("_place", torch.empty(0, device=device), persistent=False)
        self._slabs: dict[str, tuple[int, Slab]] = {}
        rows: dict[int, int] = {}
        for slab in (s for form in forms for s in form.slabs):
            if slab.name in self._slabs:
                raise ValueError(f"two slabs are named '{slab.name}'")
            start = rows.setdefault(slab.width, 0)
            self._slabs[slab.name] = (start, slab)
            rows[slab.width] = start + slab.rows
        self.widths = tuple(rows)
        for width in self.widths:
            self._add_weight(f"weight_{width}", ops.huge_pages(torch.empty(rows[width], width, device=device)))
        self._extras = {extra.name: f"extra_{i}" for i, extra in enumerate(e for form in forms for e in form.extras)}
        for extra in (e for form in forms for e in form.extras):
            self._add_weight(self._extras[extra.name], torch.empty(extra.shape, device=device))
        self._codes = {code.name: f"code_{i}" for i, code in enumerate(c for form in forms for c in form.codes)}
        for code in (c for form in forms for c in form.codes):
            empty = torch.empty(code.shape, dtype=DTYPES[code.dtype], device=device)
            self.register_buffer(self._codes[code.name], empty)
        if self.optimizer is not None:
            self.register_buffer(
                "_hyper", torch.empty(len(self._hyper_values()), dtype=torch.float64, device=device), persistent=False
            )
            if self.optimizer.counts_steps:
                self.register_buffer("_step", torch.empty((), dtype=torch.int64, device=device), persistent=False)
        self.reset_state()

    @torch.no_grad()
    def reset_state(self) -> None:
        """Codes and optimiser state as they are before the first step: zeros, and the learning rate configured."""
        for code in self._codes.values():
            getattr(self, code).zero_()
        if self.optimizer is not None:
            for tensor in self.optimizer_state().values():
                tensor.zero_()
            self._hyper.copy_(torch.tensor(self._hyper_values(), dtype=torch.float64))

    def _hyper_values(self) -> list[float]:
        """What ``embtables.ops`` takes as ``hyper``, which ends in the norm to clip at only where there is one."""
        fields = self.optimizer.to_dict() if self.optimizer is not None else {}
        values = [float(fields.get(name, 0.0)) for name in ("lr", "l2", "eps", "beta1", "beta2", "clip_row_norm")]
        return values if values[-1] else values[:-1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Store:
        """Moves and casts like any module, but hyper-parameters stay float64: in bfloat16 Adam's beta2 would be 1."""
        hyper = self._buffers.get("_hyper")
        self._aliases.clear()
        super()._apply(fn, recurse)
        if hyper is not None and self._hyper.dtype != hyper.dtype:
            self._hyper = hyper.to(self._hyper.device)
        return self

    def _add_weight(self, name: str, weight: Tensor) -> None:
        if self.trainable and self.optimizer is None:
            self.register_parameter(name, nn.Parameter(weight))
            return
        self.register_buffer(name, weight)
        if self.optimizer is not None:
            rows, width = (weight.shape[0], weight[0].numel()) if weight.ndim > 1 else (1, weight.numel())
            for i, state_width in enumerate(self.optimizer.state_widths(width)):
                state = ops.huge_pages(torch.empty(rows, state_width, device=weight.device))
                self.register_buffer(f"_state_{i}_{name}", state, persistent=False)

    # ---- the parts of a step -------------------------------------------------------------------------------------

    def gather(self, parts: Sequence[Part], *, may_skip: bool = False) -> list[Tensor]:
        """The values of each part, ``[*rows.shape, width]``, by one gather for each width.

        ``may_skip`` says that an index may be −1, which yields zeros and takes no gradient.
        """
        values: list[Tensor | None] = [None] * len(parts)
        for width in dict.fromkeys(part.width for part in parts):
            which = [i for i, part in enumerate(parts) if part.width == width]
            flat = torch.cat([parts[i].rows.reshape(-1) for i in which])
            if may_skip:
                found = (flat >= 0).nonzero().squeeze(1)
                rows = self._lookup(width, flat[found])
                rows = rows.new_zeros(flat.shape[0], width).index_put((found,), rows)
            else:
                rows = self._lookup(width, flat)
            for i, chunk in zip(which, rows.split([parts[i].rows.numel() for i in which])):
                values[i] = chunk.view(*parts[i].rows.shape, width)
        return [value for value in values if value is not None]

    def _lookup(self, width: int, index: Tensor) -> Tensor:
        weight: Tensor = getattr(self, f"weight_{width}")
        if self.optimizer is not None and self.training_lookup:
            state = self._state(f"weight_{width}")
            rows: Tensor = ops.fused_lookup(weight, state, index, self._hook, self._hyper, self.optimizer.kind)
            return rows
        if self.sparse:
            return F.embedding(index, weight, sparse=True)
        if self.many_lookups and weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return F.embedding(index, self._aliases.of(weight), sparse=True)
        return weight.index_select(0, index)

    def extra(self, name: str) -> Tensor:
        """A dense parameter, whole; in a training lookup with a fused optimiser its backward updates it."""
        weight: Tensor = getattr(self, self._extras[name])
        if self.optimizer is None or not self.training_lookup:
            return weight
        if name not in self._in_use:
            state = self._state(self._extras[name])
            self._in_use[name] = ops.fused_dense(weight, state, self._hook, self._hyper, self.optimizer.kind)
        return self._in_use[name]

    def code(self, name: str) -> Tensor:
        buffer: Tensor = getattr(self, self._codes[name])
        return buffer

    def begin_step(self) -> None:
        """Called once a training forward: Adam's bias correction counts it."""
        self._in_use.clear()
        if self.optimizer is not None and self.optimizer.counts_steps:
            self._step += 1

    def _state(self, name: str) -> list[Tensor]:
        """What the update rule keeps for a weight, the number of the present step last where it counts steps."""
        state = self._state_of_rows(name)
        return [*state, self._step.clone()] if self.optimizer is not None and self.optimizer.counts_steps else state

    def _state_of_rows(self, name: str) -> list[Tensor]:
        if self.optimizer is None:
            return []
        count = len(self.optimizer.state_widths(getattr(self, name).shape[-1]))
        return [getattr(self, f"_state_{i}_{name}") for i in range(count)]

    def end_step(self) -> None:
        """Called at the end of a forward."""
        self._in_use.clear()
        self.training_lookup = False

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._place.device

    # ---- for native code ------------------------------------------------------------------------------------------

    def weight_rows(self) -> dict[int, int]:
        """Rows of each weight, by its width."""
        return {width: getattr(self, f"weight_{width}").shape[0] for width in self.widths}

    def extra_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(getattr(self, attribute).shape) for name, attribute in self._extras.items()}

    def code_key(self, name: str) -> str:
        """A code's name in state dicts."""
        return self._codes[name]

    def codes(self) -> dict[str, Tensor]:
        return {name: self.code(name) for name in self._codes}

    def gives_gradients(self) -> bool:
        """Whether the weights are parameters that get a gradient now."""
        return torch.is_grad_enabled() and any(w.requires_grad for w in (*self.lookup_weights(), *self.extra_weights()))

    def tensor(self, name: str) -> Tensor:
        """A weight, extra, code or state by its attribute: the same as ``getattr``, at a fraction of its time."""
        found = self._buffers.get(name)
        if found is None:
            found = self._parameters.get(name)
        return found if found is not None else getattr(self, name)

    def lookup_weights(self, widths: Sequence[int] | None = None) -> list[Tensor]:
        """The weights of these widths, by default of all."""
        return [self.tensor(f"weight_{width}") for width in (self.widths if widths is None else widths)]

    def differentiated_weights(self, widths: Sequence[int]) -> list[Tensor]:
        """The same; where a step has many lookups and dense gradients under their other names."""
        weights = self.lookup_weights(widths)
        return [self._aliases.of(w) for w in weights] if self.many_lookups and not self.sparse else weights

    def extra_weights(self, names: Sequence[str] | None = None) -> list[Tensor]:
        """These extras, by default all."""
        return [self.tensor(self._extras[name]) for name in (self._extras if names is None else names)]

    def code_tensors(self) -> list[Tensor]:
        return [self.tensor(attribute) for attribute in self._codes.values()]

    @property
    def hyper(self) -> Tensor:
        """The fused optimiser's hyper-parameters, as ``embtables.ops`` takes them; empty without one."""
        return _NOTHING if self.optimizer is None else self._hyper

    def next_step(self, begun: bool = False) -> Tensor:
        """The number of the step that is about to begin, or of the one that has ``begun``; 0 where nobody counts."""
        if self.optimizer is None or not self.optimizer.counts_steps:
            return _NO_STEP
        return self._step.clone() if begun else self._step + 1

    def names(self, widths: Sequence[int], extras: Sequence[str]) -> list[str]:
        """The attributes of these weights and extras, of their state, of all codes and of the hyper-parameters."""
        weights = [*(f"weight_{width}" for width in widths), *(self._extras[name] for name in extras)]
        states = [f"_state_{i}_{name}" for name in weights for i in range(2)]
        hyper = [] if self.optimizer is None else ["_hyper"]
        return [*weights, *(state for state in states if state in self._buffers), *self._codes.values(), *hyper]

    def two_states(self, names: Sequence[str]) -> list[Tensor]:
        """Two tensors of optimiser state for each weight, empty where the rule has none."""
        kept = [f"_state_{i}_{name}" for name in names for i in range(2)]
        return [self.tensor(state) if state in self._buffers else _NOTHING for state in kept]

    def lookup_states(self, widths: Sequence[int]) -> list[Tensor]:
        return self.two_states([f"weight_{width}" for width in widths])

    def extra_states(self, names: Sequence[str]) -> list[Tensor]:
        return self.two_states([self._extras[name] for name in names])

    # ---- names, views and sizes ----------------------------------------------------------------------------------

    def start(self, slab: str) -> int:
        """First row of a slab among the rows of its width."""
        return self._slabs[slab][0]

    def slab(self, name: str) -> Tensor:
        """A view ``[rows, width]`` of a slab's weights."""
        start, slab = self._slabs[name]
        weight: Tensor = getattr(self, f"weight_{slab.width}")
        return weight.detach()[start : start + slab.rows]

    def named_slabs(self) -> Iterator[tuple[str, Tensor]]:
        """``(name, view)`` of every slab."""
        return ((name, self.slab(name)) for name in self._slabs)

    def tensors(self) -> Iterator[tuple[str, Tensor, bool]]:
        """``(name, tensor, is a code)`` of everything that is allocated, optimiser state aside."""
        for width in self.widths:
            yield f"weight_{width}", getattr(self, f"weight_{width}"), False
        for name, attribute in self._extras.items():
            yield name, getattr(self, attribute), False
        for name, attribute in self._codes.items():
            yield name, getattr(self, attribute), True

    def move(self, slab: str, source: Tensor, target: Tensor) -> None:
        """Copies the rows ``source`` of a slab, weights and optimiser state, over the rows ``target``."""
        for view in (self.slab(slab), *self.slab_state(slab)):
            view[target] = view[source]

    def reset(self, slab: str, rows: Tensor) -> None:
        """Zeroes rows of a slab, weights and optimiser state."""
        for view in (self.slab(slab), *self.slab_state(slab)):
            view[rows] = 0

    def slab_state(self, name: str) -> list[Tensor]:
        """Views ``[rows, *]`` of a slab's optimiser state."""
        start, slab = self._slabs[name]
        return [state[start : start + slab.rows] for state in self._state_of_rows(f"weight_{slab.width}")]

    def set_learning_rate(self, lr: float) -> None:
        if self.optimizer is None:
            raise ValueError("these tables have no fused optimizer: set the learning rate on the torch.optim optimizer")
        if isinstance(lr, bool) or not 0 <= lr < float("inf"):
            raise ValueError(f"the learning rate must be a non-negative number, not {lr!r}")
        self._hyper[0] = lr

    def optimizer_state(self) -> dict[str, Tensor]:
        """The fused optimiser's tensors by name, the learning rate among them; not copies."""
        names = [n for n in self._buffers if n == "_hyper" or n == "_step" or n.startswith("_state_")]
        return {name.lstrip("_"): getattr(self, name) for name in names}
