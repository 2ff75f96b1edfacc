"""The optimizers that can be fused into the tables' backward pass: a frozen dataclass says all of an update rule.

Its fields are the hyper-parameters, ``state_widths`` and ``counts_steps`` say what it keeps, and ``update`` is its form
in PyTorch. ``embtables.ops`` has native forms of some rules and takes ``update`` for all others. Other packages bring
theirs under the entry point ``embtables.optimizers``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from embtables._util.names import did_you_mean
from embtables._util.numbers import is_non_negative
from embtables.plugins import load

GROUP = "embtables.optimizers"
_CLIP = "clip_row_norm"

# All rules by their kind, from the definition of their class on, so that operators know a rule by that word alone.
_rules: dict[str, type[FusedOptimizer]] = {}


@dataclass(frozen=True)
class FusedOptimizer:
    """What all rules have in common; a subclass is a rule of its own, with a ``kind`` of its own.

    ``lr``: the learning rate. ``l2``: weight decay, added to the gradient of touched rows. ``clip_row_norm``: the
    largest norm of a row's gradient, summed over the batch; a longer one is shortened to it, before ``l2`` is added. 0
    for none. A norm over all tables could only be known after all rows, when the first ones are updated already.

    Fields are non-negative numbers, unless a subclass checks its own in ``__post_init__``. Operators take them as one
    tensor (``hyper_values``), so that a new learning rate compiles nothing.
    """

    kind: ClassVar[str]
    # Whether ``update`` needs the number of the present step, one int64 for all tables.
    counts_steps: ClassVar[bool] = False
    # Whether the state holds the running mean of the weights, see ``averaged``.
    keeps_mean: ClassVar[bool] = False

    lr: float = 0.01
    l2: float = 0.0
    clip_row_norm: float = 0.0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "kind"):
            return
        known = _rules.get(cls.kind, cls)
        # A cell of a notebook that runs again, and dataclass(slots=True), define their class anew.
        if (known.__module__, known.__name__) != (cls.__module__, cls.__name__):
            raise ValueError(
                f"the optimizer {cls.__module__}.{cls.__name__} has the kind '{cls.kind}', "
                f"which is that of {known.__module__}.{known.__name__}: give it another one"
            )
        _rules[cls.kind] = cls

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_non_negative(value):
                raise ValueError(f"{type(self).__name__}.{field.name} must be a non-negative number, not {value!r}")
            if not isinstance(value, (int, float)):  # those of NumPy go into no JSON
                object.__setattr__(self, field.name, float(value))

    # ---- the rule --------------------------------------------------------------------------------------------------

    @classmethod
    def state_widths(cls, width: int) -> tuple[int, ...]:
        """Columns of each state tensor that goes with a weight of ``width`` columns; by default there is none.

        State is fp32 and begins with zeros.
        """
        return ()

    @classmethod
    def is_row_wise(cls) -> bool:
        """Whether some of the state belongs to a row as a whole, and not to one of its scalars."""
        return any(columns < 2 for columns in cls.state_widths(2))

    @staticmethod
    def update(
        grad: Tensor, weight: Tensor, state: Sequence[Tensor], hyper: Mapping[str, Tensor], step: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """One step on U distinct rows: what is subtracted from them ``[U, width]``, and their new state.

        A pure function, whose rows do not depend on one another.

        Args:
            grad: ``[U, width]``, summed over the batch, clipped, and with ``l2`` added.
            weight: the rows themselves, ``[U, width]``.
            state: their state, ``[U, columns]`` each.
            hyper: the fields by name, float64 scalars.
            step: the number of the present step from 1 on, an int64 scalar; only ``counts_steps`` makes sure of it.
        """
        raise NotImplementedError

    @staticmethod
    def after_rounding(
        state: Sequence[Tensor], error: Tensor, hyper: Mapping[str, Tensor], step: Tensor
    ) -> Sequence[Tensor]:
        """The new state of rows from which rounding took ``error`` ``[U, width]`` more than ``update`` said.

        That is where rows are trained in 16 bits; by default their state does not depend on it.
        """
        return state

    @staticmethod
    def running_mean(weight: Tensor, state: Sequence[Tensor], hyper: Mapping[str, Tensor], step: Tensor) -> Tensor:
        """The mean of a weight over the steps so far, where the rule keeps one (``averaged``); else the weight."""
        return weight

    # ---- hyper-parameters as a tensor ------------------------------------------------------------------------------

    def hyper_values(self) -> list[float]:
        """``lr``, ``l2``, the rule's own fields as defined and, only where rows are clipped, ``clip_row_norm``.

        So the length says whether rows are clipped, which graphs and kernels must know beforehand.
        """
        names = self._hyper_names()
        return [float(getattr(self, name)) for name in (names if self.clip_row_norm else names[:-1])]

    @classmethod
    def hyper_by_name(cls, hyper: Tensor) -> dict[str, Tensor]:
        """The values of ``hyper_values`` as scalars; ``clip_row_norm`` is absent where rows are not clipped."""
        cls.clips_rows(hyper)
        return dict(zip(cls._hyper_names(), hyper.unbind()))

    @classmethod
    def clips_rows(cls, hyper: Tensor) -> bool:
        """Whether rows are clipped with these hyper-parameters.

        Raises:
            ValueError: for a tensor of another length than the rule's.
        """
        names, count = cls._hyper_names(), hyper.numel()
        if hyper.ndim != 1 or count not in (len(names) - 1, len(names)):
            raise ValueError(
                f"hyper holds {count} numbers, but those of {cls.kind} are {', '.join(names[:-1])} "
                f"and, where rows are clipped, {_CLIP}"
            )
        return count == len(names)

    @classmethod
    def _hyper_names(cls) -> tuple[str, ...]:
        return (*(field.name for field in fields(cls) if field.name != _CLIP), _CLIP)

    def to_dict(self) -> dict[str, Any]:
        """The kind and the fields, as ``optimizer_from_config`` takes them."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class SGD(FusedOptimizer):
    """Stochastic gradient descent on the rows that a batch touches: w ← w − lr·g, without any state.

    The default rate is large, since it is made for losses that are means over a batch: each row's gradient g is then
    the small part that its own examples have in it. ``lr``, ``l2`` and ``clip_row_norm`` are those of
    ``FusedOptimizer``, here and in the other rules.
    """

    kind: ClassVar[str] = "sgd"
    lr: float = 1.0

    @staticmethod
    def update(
        grad: Tensor, weight: Tensor, state: Sequence[Tensor], hyper: Mapping[str, Tensor], step: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        return hyper["lr"] * grad, ()


@dataclass(frozen=True)
class RowWiseAdagrad(FusedOptimizer):
    """Adagrad with one scalar s of state for each row, as FBGEMM has it; the default, for its state is small.

    s ← s + mean(g²) over the row; w ← w − lr·g / (√s + eps). ``eps`` bounds the step of a row whose s is almost 0.
    """

    kind: ClassVar[str] = "rowwise_adagrad"
    lr: float = 0.05
    eps: float = 1e-8

    @classmethod
    def state_widths(cls, width: int) -> tuple[int, ...]:
        return (1,)

    @staticmethod
    def update(
        grad: Tensor, weight: Tensor, state: Sequence[Tensor], hyper: Mapping[str, Tensor], step: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        total = state[0] + grad.square().mean(1, keepdim=True)
        return hyper["lr"] * grad / (total.sqrt() + hyper["eps"]), (total,)


@dataclass(frozen=True)
class Adagrad(FusedOptimizer):
    """Adagrad (Duchi et al. 2011): every scalar has a sum s of its squared gradients, by which its steps shrink.

    s ← s + g²; w ← w − lr·g / (√s + eps). ``eps`` bounds the step of a scalar whose s is almost 0.
    """

    kind: ClassVar[str] = "adagrad"
    lr: float = 0.05
    eps: float = 1e-8

    @classmethod
    def state_widths(cls, width: int) -> tuple[int, ...]:
        return (width,)

    @staticmethod
    def update(
        grad: Tensor, weight: Tensor, state: Sequence[Tensor], hyper: Mapping[str, Tensor], step: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        total = state[0] + grad.square()
        return hyper["lr"] * grad / (total.sqrt() + hyper["eps"]), (total,)


@dataclass(frozen=True)
class Adam(FusedOptimizer):
    """Adam (Kingma & Ba 2015) whose moments move on touched rows only; the bias correction counts all steps.

    These are the semantics of ``torch.optim.SparseAdam``. ``beta1`` and ``beta2`` are the shares that the running means
    of g and of g² keep at each step, and ``eps`` is added to the square root that a step is divided by.
    """

    kind: ClassVar[str] = "adam"
    counts_steps: ClassVar[bool] = True
    lr: float = 0.01
    # By name only: optimizer states that were saved hold the numbers in this order.
    _: KW_ONLY
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            if not getattr(self, name) < 1:
                raise ValueError(f"Adam.{name} must be below 1, not {getattr(self, name)!r}")

    @classmethod
    def state_widths(cls, width: int) -> tuple[int, ...]:
        return (width, width)

    @staticmethod
    def update(
        grad: Tensor, weight: Tensor, state: Sequence[Tensor], hyper: Mapping[str, Tensor], step: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        # 1 − β is taken in float64: in float32 1 − 0.999 is off by 1e-5.
        m = hyper["beta1"] * state[0] + (1 - hyper["beta1"]) * grad
        v = hyper["beta2"] * state[1] + (1 - hyper["beta2"]) * grad.square()
        m_hat = m / (1 - hyper["beta1"] ** step)
        v_hat = v / (1 - hyper["beta2"] ** step)
        return hyper["lr"] * m_hat / (v_hat.sqrt() + hyper["eps"]), (m, v)


# ---- a running mean of the weights ---------------------------------------------------------------------------------

#: The kind of a rule that also keeps a running mean is this and that of the rule.
AVERAGED = "averaged_"


def averaged(optimizer: str | dict[str, Any] | FusedOptimizer, horizon: int) -> FusedOptimizer:
    """The same rule, which also keeps the running mean of all weights; ``EmbeddingTables.averaged`` gives it.

    mean_t = β_t·mean_{t−1} + (1 − β_t)·w_t after training step t, with β_t = min(t, h) / (min(t, h) + 1): up to step h
    the plain mean of all weights so far, the initial ones among them, and an exponential one afterwards. Only the rows
    that a step touches are visited: of each row the state holds mean − w as it was when the row was last touched, and
    when that was, from which the mean at any later step follows. So the state takes ``width + 1`` numbers a row more.

    Its kind is that of the rule after ``averaged_``: ``{"kind": "averaged_adam", "horizon": 500}``.

    Args:
        optimizer: any fused optimizer, as ``optimizer_from_config`` takes it.
        horizon: h, in training steps.

    Raises:
        ValueError: for an optimizer that is none, or is averaged already, or a horizon that is no whole number from 1
            on; in backward, for tables of half precision, whose numbers cannot count steps.

    Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control Optim. 30(4), 1992.
    """
    inner = optimizer_from_config(optimizer)
    if inner is None:
        raise ValueError("a running mean needs a fused optimizer, which updates the rows of which it keeps the mean")
    fields_of = {field.name: getattr(inner, field.name) for field in fields(inner)}
    rule: Any = _averaged_rule(type(inner))
    found: FusedOptimizer = rule(**fields_of, horizon=horizon)
    return found


def _averaged_rule(rule: type[FusedOptimizer]) -> type[FusedOptimizer]:
    """The rule that also keeps a running mean."""
    if rule.keeps_mean:
        raise ValueError(f"the optimizer {rule.kind} keeps a running mean already")
    known = _rules.get(AVERAGED + rule.kind)
    if known is not None and issubclass(known, rule):
        return known

    @dataclass(frozen=True)
    class Averaged(rule):  # type: ignore[misc, valid-type]
        kind: ClassVar[str] = AVERAGED + rule.kind
        counts_steps: ClassVar[bool] = True
        keeps_mean: ClassVar[bool] = True
        _: KW_ONLY
        horizon: float = 1000

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.horizon < 1 or self.horizon != int(self.horizon):
                raise ValueError(
                    f"{self.kind}: horizon must be a whole number of steps from 1 on, not {self.horizon!r}"
                )

        @classmethod
        def state_widths(cls, width: int) -> tuple[int, ...]:
            return (*rule.state_widths(width), width, 1)

        @classmethod
        def is_row_wise(cls) -> bool:
            return rule.is_row_wise()

        @staticmethod
        def update(
            grad: Tensor, weight: Tensor, state: Sequence[Tensor], hyper: Mapping[str, Tensor], step: Tensor
        ) -> tuple[Tensor, Sequence[Tensor]]:
            behind, last = state[-2:]
            if last.dtype.itemsize < 4:
                raise ValueError(
                    "the running mean of weights is not kept in half precision, whose numbers cannot count steps: "
                    "train these tables in fp32, and serve them in a precision"
                )
            change, own = rule.update(grad, weight, state[:-2], hyper, step)
            horizon = hyper["horizon"]
            behind = _since(last, step - 1, horizon) * behind + change
            return change, (*own, _since(step - 1, step, horizon) * behind, step.to(last.dtype).expand_as(last))

        @staticmethod
        def after_rounding(
            state: Sequence[Tensor], error: Tensor, hyper: Mapping[str, Tensor], step: Tensor
        ) -> Sequence[Tensor]:
            *before, behind, last = state
            own = rule.after_rounding(before, error, hyper, step)
            return (*own, behind + _since(step - 1, step, hyper["horizon"]) * error, last)

        @staticmethod
        def running_mean(weight: Tensor, state: Sequence[Tensor], hyper: Mapping[str, Tensor], step: Tensor) -> Tensor:
            behind, last = state[-2:]
            return weight + (_since(last, step, hyper["horizon"]) * behind).to(weight.dtype)

        def __reduce__(self) -> tuple[Any, tuple[Any]]:
            return optimizer_from_config, (self.to_dict(),)

    return Averaged


def _since(before: Tensor, now: Tensor, horizon: Tensor) -> Tensor:
    """How much of a mean at one step is left in that of another: the product of the β of all steps after it."""

    def log_share(step: Tensor) -> Tensor:
        step = step.double()
        early = step.clamp(max=horizon)
        return (horizon / (horizon + 1)).log() * (step - early) - early.log1p()

    return (log_share(now) - log_share(before)).exp().float()


_BUILT_IN: dict[str, type[FusedOptimizer]] = {c.kind: c for c in (SGD, RowWiseAdagrad, Adagrad, Adam)}


@cache
def _third_party() -> dict[str, type[FusedOptimizer]]:
    return load(GROUP, FusedOptimizer, _BUILT_IN)


def kinds() -> list[str]:
    """The names of all optimizers, those of other packages last."""
    return [*_BUILT_IN, *sorted(_third_party())]


def rule_of(kind: str) -> type[FusedOptimizer]:
    """The rule of this kind among all that are defined or registered.

    Raises:
        ValueError: where there is none.
    """
    if kind not in _rules:
        _third_party()
    if kind not in _rules and kind.startswith(AVERAGED):
        return _averaged_rule(rule_of(kind.removeprefix(AVERAGED)))
    if kind not in _rules:
        raise ValueError(f"unknown optimizer {kind!r}: those that are known are {', '.join(_rules)}")
    return _rules[kind]


def _known(kind: str) -> type[FusedOptimizer] | None:
    if kind.startswith(AVERAGED):
        rule = _known(kind.removeprefix(AVERAGED))
        return None if rule is None else _averaged_rule(rule)
    return _BUILT_IN.get(kind) or _third_party().get(kind)


def optimizer_from_config(config: str | dict[str, Any] | FusedOptimizer | None) -> FusedOptimizer | None:
    """``"adam"``, ``{"kind": "adam", "lr": 0.01}``, a config, or ``None`` (ordinary parameters).

    Raises:
        ValueError: naming the unknown optimizer or field, with those that exist.
    """
    if config is None or isinstance(config, FusedOptimizer):
        return config
    values = {"kind": config} if isinstance(config, str) else dict(config) if isinstance(config, dict) else {}
    kind = values.pop("kind", config)
    cls = _known(kind) if isinstance(kind, str) else None
    if cls is None:
        guess = did_you_mean(kind, kinds())
        raise ValueError(
            f"unknown optimizer {kind!r}{guess}: choose one of {', '.join(kinds())}, or None for torch.optim"
        )
    known = {field.name for field in fields(cls)}
    for name in values:
        if name not in known:
            raise ValueError(f"optimizer {kind} has no field '{name}'; it has {', '.join(sorted(known))}")
    return cls(**values)
