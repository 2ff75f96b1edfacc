"""Stochastic rounding to bfloat16: to one of the two neighbors of a number, with probabilities that keep its mean.

The probability of a neighbor is the share of the step between the two that lies beyond the number on the other side, so
that what is smaller than half a step is not lost, but kept in one of many updates.

Gupta et al., "Deep Learning with Limited Numerical Precision", ICML 2015.

The random bits are a function of the step's number and of where a scalar lies, and of nothing else: they are the same
in PyTorch, native code (``csrc/rounding.h``) and Triton (``gpu_kernels``), for any number of threads, and after a
checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embtables.hashing import mix

# The bits that bfloat16 has not of a float32, which are random.
_BITS = 16
_BELOW = 2**_BITS - 1


def stream(step: Tensor | int, width: int) -> Tensor:
    """The int64 from which all random bits of one step follow, for the weight of this width."""
    step = step if isinstance(step, Tensor) else torch.tensor(step)
    return mix(mix(step) ^ width)


def random_bits(step: Tensor, rows: Tensor, width: int) -> Tensor:
    """Random int32 from 0 to 2**16 − 1, ``[N, width]``, for the rows ``rows`` ``[N]`` of a weight in one step.

    Scalars are counted through the weight, row by row. Four of them, from a multiple of four on, have one hash of 64
    bits in common, the first of them its lowest bits.
    """
    place = rows.unsqueeze(1) * width + torch.arange(width, device=rows.device)
    hashed = mix(stream(step, width) + (place >> 2))
    return (hashed >> (place & 3) * _BITS & _BELOW).int()


def rounded(values: Tensor, random: Tensor) -> Tensor:
    """float32 ``values`` in bfloat16, given random bits for each; what bfloat16 holds, infinity and NaN stay."""
    bits = values.view(torch.int32)
    # Truncated after the sum, whose carry leads to the neighbor that is farther from 0.
    moved = (bits + random & ~_BELOW).view(torch.float32)
    return torch.where(values.isnan(), values, moved).bfloat16()
