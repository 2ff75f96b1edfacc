"""The optimisers that can be fused into the tables' backward pass: small frozen configs.

Each names an update rule of ``embtables.ops`` and says what state a row of ``width`` weights needs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar


@dataclass(frozen=True)
class FusedOptimizer:
    """Common fields.

    ``lr``: the learning rate. ``l2``: weight decay, added to the gradient of touched rows. ``clip_row_norm``: the
    largest norm of a row's gradient, summed over the batch; a longer one is shortened to it, before ``l2`` is added. 0
    for none. A norm over all tables could only be known after all rows, when the first ones are updated already.
    """

    kind: ClassVar[str]
    lr: float = 0.01
    l2: float = 0.0
    clip_row_norm: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{type(self).__name__}.{field.name} must be a non-negative number, not {value!r}")

    def state_widths(self, width: int) -> tuple[int, ...]:
        """Width of each fp32 state tensor that goes with a slab of ``width`` columns."""
        raise NotImplementedError

    @property
    def counts_steps(self) -> bool:
        """Whether the rule needs the number of steps, one int64 for all tables."""
        return False

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class SGD(FusedOptimizer):
    """w ← w − lr·g."""

    kind: ClassVar[str] = "sgd"

    def state_widths(self, width: int) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class RowWiseAdagrad(FusedOptimizer):
    """s ← s + mean(g²) over the row; w ← w − lr·g / (√s + eps). One state scalar a row, as FBGEMM's."""

    kind: ClassVar[str] = "rowwise_adagrad"
    eps: float = 1e-8

    def state_widths(self, width: int) -> tuple[int, ...]:
        return (1,)


@dataclass(frozen=True)
class Adagrad(FusedOptimizer):
    """s ← s + g²; w ← w − lr·g / (√s + eps) (Duchi et al. 2011)."""

    kind: ClassVar[str] = "adagrad"
    eps: float = 1e-8

    def state_widths(self, width: int) -> tuple[int, ...]:
        return (width,)


@dataclass(frozen=True)
class Adam(FusedOptimizer):
    """Adam (Kingma & Ba 2015) whose moments move on touched rows only; the bias correction counts all steps.

    These are the semantics of ``torch.optim.SparseAdam``.
    """

    kind: ClassVar[str] = "adam"
    lr: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            if not getattr(self, name) < 1:
                raise ValueError(f"Adam.{name} must be below 1, not {getattr(self, name)!r}")

    def state_widths(self, width: int) -> tuple[int, ...]:
        return (width, width)

    @property
    def counts_steps(self) -> bool:
        return True


_KINDS: dict[str, type[FusedOptimizer]] = {c.kind: c for c in (SGD, RowWiseAdagrad, Adagrad, Adam)}


def optimizer_from_config(config: str | dict[str, Any] | FusedOptimizer | None) -> FusedOptimizer | None:
    """``"adam"``, ``{"kind": "adam", "lr": 0.01}``, a config, or ``None`` (ordinary parameters).

    Raises:
        ValueError: naming the unknown optimiser or field, with those that exist.
    """
    if config is None or isinstance(config, FusedOptimizer):
        return config
    values = {"kind": config} if isinstance(config, str) else dict(config) if isinstance(config, dict) else {}
    kind = values.pop("kind", config)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"unknown optimizer {kind!r}: choose one of {', '.join(_KINDS)}, or None for torch.optim")
    known = {field.name for field in fields(_KINDS[kind])}
    for name in values:
        if name not in known:
            raise ValueError(f"optimizer {kind} has no field '{name}'; it has {', '.join(sorted(known))}")
    return replace(_KINDS[kind](), **values)
