"""The weights of tables and what trains them: a fused optimizer's state and steps, freezing, accumulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from embtables import ops
from embtables._util.numbers import is_non_negative
from embtables.formats import BF16, DTYPES, FP32, TRAINING_FORMATS
from embtables.lookup.accumulation import Accumulation
from embtables.lookup.rounding import Rounding
from embtables.lookup.weights import Weights
from embtables.optimizers import FusedOptimizer, rule_of
from embtables.sizes.layout import Form

_NO_STEP = torch.zeros((), dtype=torch.int64, device="cpu")
_NOTHING = torch.empty(0, dtype=torch.float64, device="cpu")


class Store(Weights):
    """Slabs, extras and codes of all groups, and the state of a fused optimizer.

    Args:
        forms: what to allocate.
        optimizer: fused into backward; the weights are then buffers, and ``parameters()`` is empty. ``None``: the
            weights are ordinary parameters.
        sparse: with ``optimizer=None``, whether slab gradients are sparse tensors.
        trainable: ``False`` for served tables: buffers, no optimizer state.
        device: where to allocate, ``"meta"`` included.
    """

    _hyper: Tensor
    _step: Tensor

    def __init__(
        self,
        forms: Sequence[Form],
        optimizer: FusedOptimizer | None,
        *,
        sparse: bool = False,
        trainable: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        if trainable:
            _check_formats(forms, optimizer)
        super().__init__(forms, as_parameters=trainable and optimizer is None, sparse=sparse, device=device)
        self.optimizer = optimizer if trainable else None
        # Which rounding a step makes follows from its number, too.
        self.counts_steps = self.optimizer is not None and (
            self.optimizer.counts_steps or any(form.rounds_stochastically() for form in forms)
        )
        self.accumulation: Accumulation | None = None
        # Of the rows that a training step reads; ``None``: it computes with the fp32 rows.
        self.rounding: Rounding | None = None
        self._strengths: dict[str, Tensor] = {}
        # Makes autograd call the lookup's backward, which updates the weights; it never gets a gradient itself.
        # Where it requires none, the tables are frozen.
        self.hook = torch.zeros((), device="cpu", requires_grad=True)
        if self.optimizer is not None:
            for name in (*self.weight_names, *self._extras.values()):
                if self.is_trained(name):
                    self._add_state(name, self.optimizer)
            hyper = torch.tensor(self.optimizer.hyper_values(), dtype=torch.float64, device=device)
            self.register_buffer("_hyper", hyper, persistent=False)
            if self.counts_steps:
                self.register_buffer("_step", torch.empty((), dtype=torch.int64, device=device), persistent=False)
        self.reset_state()

    def _add_state(self, name: str, optimizer: FusedOptimizer) -> None:
        rows, width = self.matrix(name).shape
        for i, columns in enumerate(optimizer.state_widths(width)):
            state = ops.huge_pages(torch.empty(rows, columns, dtype=DTYPES[FP32.dtype], device=self.device))
            self.register_buffer(f"_state_{i}_{name}", state, persistent=False)

    @torch.no_grad()
    def reset_state(self) -> None:
        """Codes and optimizer state as they are before the first step: zeros, and the learning rate configured."""
        for code in self._codes.values():
            getattr(self, code).zero_()
        if self.optimizer is not None:
            for tensor in self.optimizer_state().values():
                tensor.zero_()
            self._hyper.copy_(torch.tensor(self.optimizer.hyper_values(), dtype=torch.float64))

    def leave_meta(self, device: torch.device) -> None:
        """Allocates what no state dict of the store holds, as it is before the first step; the weights stay."""
        for name in self._non_persistent_buffers_set:
            setattr(self, name, ops.huge_pages(torch.empty_like(self.tensor(name), device=device)))
        if self.rounding is not None:
            self.rounding.to_empty(device=device)
        self._place_strengths()
        self.reset_state()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._place_strengths()
        return self

    def _place_strengths(self) -> None:
        # They have to be there when the weights come back from the meta device.
        if self.device.type != "meta":
            self._strengths = {weight: strength.to(self.device) for weight, strength in self._strengths.items()}

    def left_by_casts(self) -> list[str]:
        """Hyper-parameters too, since in bfloat16 Adam's beta2 would be 1, and the fp32 state of rows in 16 bits."""
        packed = [weight for weight in self.weight_names if not self.is_plain(weight)]
        hyper = ["_hyper"] if "_hyper" in self._buffers else []
        return [*super().left_by_casts(), *hyper, *(name for weight in packed for name in self.state_names(weight))]

    # ---- what a step needs -----------------------------------------------------------------------------------------

    @property
    def rule(self) -> str:
        """The kind of the fused optimizer; empty without one."""
        return "" if self.optimizer is None else self.optimizer.kind

    @property
    def hyper(self) -> Tensor:
        """The fused optimizer's hyper-parameters, as ``embtables.ops`` takes them; empty without one."""
        return _NOTHING if self.optimizer is None else self.tensor("_hyper")

    def count_step(self, number: int = 1) -> None:
        """Counts a training step, where its number is needed; −1 takes one back."""
        if self.counts_steps:
            self._step += number

    def step_number(self) -> Tensor:
        """The number of the present step; 0 where nobody counts."""
        return self._step.clone() if self.counts_steps else _NO_STEP

    def gives_gradients(self) -> bool:
        """Whether any of the weights is a parameter that gets a gradient now."""
        if not torch.is_grad_enabled():
            return False
        trained = any(split.trains() for split in self.split_weights.values())
        return trained or any(parameter.requires_grad for parameter in self.parameters())

    def can_learn(self) -> bool:
        """Whether lookups train now: not without gradients, nor in the served form, nor where all is frozen."""
        return self.gives_gradients() if self.optimizer is None else torch.is_grad_enabled() and self.hook.requires_grad

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freezes or sets free what is trained: parameters, or what a fused optimizer updates."""
        self.hook.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def set_learning_rate(self, lr: float) -> None:
        """Sets the fused optimizer's learning rate, from the next backward on.

        Raises:
            ValueError: for what is no non-negative number, and where there is no fused optimizer.
        """
        if self.optimizer is None:
            raise ValueError("these tables have no fused optimizer: set the learning rate on the torch.optim optimizer")
        if not is_non_negative(lr):
            raise ValueError(f"the learning rate must be a non-negative number, not {lr!r}")
        self._hyper[0] = float(lr)

    # ---- regularization --------------------------------------------------------------------------------------------

    def regularize(self, strengths: Mapping[str, Tensor]) -> None:
        """Has training steps pull the rows that they read towards 0, each as strongly as ``strengths`` says.

        Args:
            strengths: ``[R]`` of every weight, by its attribute, in float32; empty where none is pulled.
        """
        # No buffers: DistributedDataParallel would send those around with every step.
        self._strengths = dict(strengths)

    def strength(self, weight: str) -> Tensor | None:
        """How strongly a step pulls each row of a weight ``[R]``, by its attribute; ``None`` where it pulls no row."""
        return self._strengths.get(weight)

    def strengths(self) -> list[Tensor]:
        """``strength`` of all weights; none where it pulls no rows."""
        return list(self._strengths.values())

    # ---- optimizer state -------------------------------------------------------------------------------------------

    def state_names(self, weight: str) -> list[str]:
        """The attributes of what the update rule keeps for a weight or extra, by its attribute."""
        if self.optimizer is None or not self.is_trained(weight):
            return []
        count = len(self.optimizer.state_widths(self.tensor(weight).shape[-1]))
        return [f"_state_{i}_{weight}" for i in range(count)]

    def state_of(self, weight: str) -> list[Tensor]:
        """What the update rule keeps for a weight or extra, by its attribute, row by row."""
        return [self.tensor(name) for name in self.state_names(weight)]

    def state_for_step(self, weight: str) -> list[Tensor]:
        """What the update rule keeps for a weight, the number of the present step last where steps are counted."""
        state = self.state_of(weight)
        return [*state, self.step_number()] if self.counts_steps else state

    def running_mean(self, weight: str) -> Tensor:
        """The running mean of a weight or extra, by its attribute, where the optimizer keeps one; else a copy."""
        tensor = self.tensor(weight).detach()
        if self.optimizer is None or not self.is_trained(weight):
            return tensor.clone()
        rule, matrix = rule_of(self.optimizer.kind), self.matrix(weight).detach().to(self.dtype)
        hyper = rule.hyper_by_name(self.hyper)
        return rule.running_mean(matrix, self.state_of(weight), hyper, self.step_number()).reshape(tensor.shape).clone()

    def slab_state(self, name: str) -> list[Tensor]:
        """Views ``[rows, *]`` of a slab's optimizer state."""
        start, slab = self._slabs[name]
        return [state[start : start + slab.rows] for state in self.state_of(self.weight_of(name))]

    def optimizer_state(self) -> dict[str, Tensor]:
        """The fused optimizer's tensors by name, the learning rate among them; not copies."""
        names = [n for n in self._buffers if n == "_hyper" or n == "_step" or n.startswith("_state_")]
        return {name.lstrip("_"): getattr(self, name) for name in names}

    def move(self, slab: str, source: Tensor, target: Tensor) -> None:
        """Copies the rows ``source`` of a slab over ``target``, with optimizer state and strength of regularization."""
        start, strength = self.start(slab), self.strength(self.weight_of(slab))
        pulled = [] if strength is None else [strength[start : start + self.rows(slab)]]
        for view in (self.slab(slab), *self.slab_state(slab), *pulled):
            view[target] = view[source]

    def reset(self, slab: str, rows: Tensor) -> None:
        """Zeroes rows of a slab, weights and optimizer state."""
        for view in (self.slab(slab), *self.slab_state(slab)):
            view[rows] = 0


def _check_formats(forms: Sequence[Form], optimizer: FusedOptimizer | None) -> None:
    """Raises ``ValueError`` for slabs that cannot be trained as they would be stored."""
    for slab in (slab for form in forms for slab in form.slabs):
        if slab.format not in TRAINING_FORMATS:
            raise ValueError(
                f"slab '{slab.name}' would be trained in {slab.format}: training stores "
                f"{' or '.join(TRAINING_FORMATS)}, and what is served in another format is the serving form of a "
                "layout, as Layout.of makes them"
            )
        if slab.format == BF16.name and optimizer is None:
            raise ValueError(
                f"slab '{slab.name}' would be trained in bf16 by torch.optim, but rows in bf16 need the stochastic "
                "rounding of fused updates: plan with a fused optimizer, or train in fp32"
            )
