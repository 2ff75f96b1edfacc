"""What graphs hold instead of shapes that depend on data, which they cannot have; and what transforms ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(reason: str) -> Callable[[Function], Function]:
    """``torch.compiler.disable``, which takes two seconds to import, from the first call of the function on.

    It is what ``torch.optim`` does: the wrapper lies in a file of torch's that is never traced.

    Args:
        reason: why no graph can hold the function, for the error of ``fullgraph=True``.
    """

    def mark(function: Function) -> Function:
        called: Any = torch._compile._disable_dynamo(function)
        called._torchdynamo_disable, called._torchdynamo_disable_msg = True, reason
        return called

    return mark


def is_exporting() -> bool:
    """Whether ``torch.export`` is at work.

    ``torch.compiler.is_exporting()`` returns this flag, and inside ``torch.compile`` says so too before PyTorch 2.13.
    """
    return torch.compiler._is_exporting_flag


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or a forward-mode derivative is at work; graphs have none within them."""
    return not torch.compiler.is_compiling() and transforms()


def transforms() -> bool:
    """``is_transformed`` where no graph is made."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def intervals(ends: Tensor, size: int) -> Tensor:
    """The number of the interval ``[size]`` that each of the places 0 … size − 1 lies in.

    ``ends`` ``[n]``: where each interval ends, rising; an interval begins where the one before ends, and may be empty.
    Places behind the last one have the number n.
    """
    passed = torch.zeros(size + 1, dtype=torch.int64, device=ends.device)
    return passed.scatter_add(0, ends.long(), torch.ones_like(ends, dtype=torch.int64)).cumsum(0)[:size]


def beside(vectors: Tensor) -> Tensor:
    """``[B, L·D]`` from ``[L, B, D]``.

    A graph joins what it cut apart: whether the other way copies depends on whether B is 1, to which an exported graph
    would then be bound.
    """
    if torch.compiler.is_compiling():
        return torch.cat(vectors.unbind(), dim=1)
    return vectors.transpose(0, 1).flatten(1)


def bag_sums(vectors: Tensor, bags: Tensor, weights: Tensor | None) -> Tensor:
    """The sums ``[M, D]`` of the vectors ``[N, D]`` of each bag, whose offsets are ``bags`` ``[M + 1]``.

    ``weights`` ``[N]``: a factor for each vector. Exported graphs add with an operator that every runtime has: ONNX
    would take bags one by one, and none where there are none. So do transforms: ``F.embedding_bag`` has no
    forward-mode derivative.
    """
    if not (is_exporting() or is_transformed()):
        index = torch.arange(vectors.shape[0], device=vectors.device)
        return F.embedding_bag(index, vectors, bags, mode="sum", per_sample_weights=weights, include_last_offset=True)
    if weights is not None:
        vectors = vectors * weights.unsqueeze(-1)
    number, dim = bags.shape[0] - 1, vectors.shape[1]
    # One row more than there are bags, for ids behind the last one.
    bag = intervals(bags[1:], vectors.shape[0]).unsqueeze(-1).expand(-1, dim)
    return vectors.new_zeros(number + 1, dim).scatter_add(0, bag, vectors)[:number]


def number_below(ordered: Tensor, wanted: Tensor) -> Tensor:
    """How many elements of ``ordered`` ``[n]``, which never fall, are below each of ``wanted``: ``torch.searchsorted``.

    It bisects in operators that every runtime has.
    """
    size = ordered.shape[0]
    found = torch.zeros_like(wanted, dtype=torch.int64)
    for bit in reversed(range(size.bit_length())):
        further = found + (1 << bit)
        below = (further <= size) & (ordered[further.clamp(max=size) - 1] < wanted)
        found = torch.where(below, further, found)
    return found
