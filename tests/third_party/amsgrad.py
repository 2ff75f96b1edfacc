"""AMSGrad with decoupled weight decay, as another package would write it: three state tensors, and it counts steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embtables.optimizers import FusedOptimizer


@dataclass(frozen=True)
class AMSGrad(FusedOptimizer):
    """Reddi et al., "On the Convergence of Adam and Beyond" (2018); ``decay`` as in Loshchilov & Hutter (2019)."""

    kind: ClassVar[str] = "amsgrad"
    counts_steps: ClassVar[bool] = True
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0

    @classmethod
    def state_widths(cls, width: int) -> tuple[int, ...]:
        return (width, width, width)

    @staticmethod
    def update(
        grad: Tensor, weight: Tensor, state: Sequence[Tensor], hyper: Mapping[str, Tensor], step: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        m = hyper["beta1"] * state[0] + (1 - hyper["beta1"]) * grad
        v = hyper["beta2"] * state[1] + (1 - hyper["beta2"]) * grad.square()
        most = torch.maximum(state[2], v)
        m_hat, v_hat = m / (1 - hyper["beta1"] ** step), most / (1 - hyper["beta2"] ** step)
        return hyper["lr"] * (m_hat / (v_hat.sqrt() + hyper["eps"]) + hyper["decay"] * weight), (m, v, most)
