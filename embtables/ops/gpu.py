"""Kernels for GPUs that look up, pool, update and unpack rows, where there is Triton; they are in ``gpu_kernels``.

Neither Triton nor CUDA is touched before the first call with tensors on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from embtables.ops import reference
from embtables.ops.program import PLAIN, RowForm
from embtables.ops.reference import fused_lookup, of_each_id, update

_plain_update = update._init_fn
# The types of devices that these kernels work on.
registered: set[str] = set()


def register() -> bool:
    """Gives the operators their kernels for CUDA tensors; whether there are any.

    There are none where torch was built for the CPU alone, where Triton is missing, and with
    ``EMBTABLES_OPS=reference``: the reference operators then run on GPUs too.
    """
    built_for_gpus = torch.version.cuda is not None or torch.version.hip is not None
    if not built_for_gpus or importlib.util.find_spec("triton") is None:
        return False
    if os.environ.get("EMBTABLES_OPS") == "reference":
        return False
    register_for("cuda")
    return True


def register_for(device_type: str) -> None:
    """Gives the operators these kernels for one type of device: ``"cpu"`` under Triton's interpreter."""
    fused_lookup.register_kernel(device_type, _lookup)
    update.register_kernel(device_type, _update)
    reference.eager[device_type] = KERNELS
    registered.add(device_type)


def _gather(weight: Tensor, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    from embtables.ops import gpu_kernels

    return gpu_kernels.lookup(weight, index, dtype)


def _unpack(stored: Tensor, scales: Tensor | None, firsts: Tensor, index: Tensor, width: int, form: RowForm) -> Tensor:
    from embtables.ops import gpu_kernels

    return gpu_kernels.unpack(stored, scales, firsts, index, width, form)


def _bag_sums(*arguments: Any) -> Tensor:
    from embtables.ops import gpu_kernels

    return gpu_kernels.bag_sums(*arguments)


def _lookup(
    weight: Tensor,
    state: list[Tensor],
    index: Tensor,
    hook: Tensor,
    hyper: Tensor,
    rule: str,
    dtype: torch.dtype,
) -> Tensor:
    return _gather(weight, index, dtype)


def _update(
    weight: Tensor,
    state: list[Tensor],
    index: Tensor,
    grad: Tensor,
    hyper: Tensor,
    rule: str,
    bags: Tensor | None = None,
    factors: Tensor | None = None,
) -> None:
    from embtables.ops import gpu_kernels

    if rule in gpu_kernels.RULES:
        gpu_kernels.update_(weight, state, index, grad, hyper, rule, bags, factors)
        return
    if bags is not None:
        index, grad = of_each_id(index, grad, bags, factors)
    _plain_update(weight, state, index, grad, hyper, rule)


class _Rows(torch.autograd.Function):
    """Rows that are updated in backward, as by ``embtables::lookup``, or their sums by bag.

    ``hook`` only makes autograd call it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        state: list[Tensor],
        index: Tensor,
        hook: Tensor,
        hyper: Tensor,
        rule: str,
        dtype: torch.dtype,
        bags: Tensor | None,
        factors: Tensor | None,
    ) -> Tensor:
        # On ctx itself, for the reason that ``embtables::lookup`` has.
        ctx.given = weight, state, index, hyper, rule, bags, factors
        if bags is None:
            return _gather(weight, index, dtype)
        return _bag_sums(weight, None, None, index, bags, factors, dtype, weight.shape[1], PLAIN)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        weight, state, index, hyper, rule, bags, factors = ctx.given
        _update(weight, state, index, grad.contiguous(), hyper, rule, bags, factors)
        torch.autograd.graph.increment_version([weight, *state])
        return (None,) * 9


KERNELS = reference.Kernels(_gather, _Rows.apply, _unpack, _bag_sums)
