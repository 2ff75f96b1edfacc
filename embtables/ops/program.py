"""A program of lookups and the tensors that it reads and writes, as the operators take them.

``embtables.lookup.program`` writes programs; ``csrc/program.h`` says what their words mean.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNBOUNDED = 2**62
# How the ids of a bag become one vector: not at all, or so.
POOLING = {None: 0, "sum": 1, "mean": 2}
POLICIES = {"error": 0, "hash": 1, "oov": 2}
# How many words ``csrc/program.h`` has at the beginning, and for a lookup, a piece, a weight, a projection and a code.
HEADER_WORDS, LOOKUP_WORDS, PIECE_WORDS, WEIGHT_WORDS, PROJECTION_WORDS, CODE_WORDS = 7, 18, 17, 6, 3, 3
# How many tensors a weight or projection has for what an optimizer keeps of it.
STATES = 4
# The types of code buffers that native code reads.
CODE_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


class RowForm(NamedTuple):
    """How the rows of a weight are stored, for kernels.

    ``format``: as ``csrc/program.h`` numbers them; ``bits``: of a scalar, 0 where it is plain; ``share``: how many rows
    of a slab have their scales in common, 0 for all of them; ``together``: how many rows a unit holds.
    """

    format: int
    bits: int
    share: int
    together: int


PLAIN = RowForm(0, 0, 1, 1)
BF16 = RowForm(4, 16, 1, 1)


def values_dtype(weights: Sequence[Tensor], scales: Sequence[Tensor]) -> torch.dtype:
    """The type of the values of a program with these weights and scales: those in other formats are read as fp32."""
    return torch.float32 if scales else weights[0].dtype


class ProgramTensors(NamedTuple):
    """A program and what it reads and writes, as a rule the weights and state of a module, as they are now.

    ``weights``, ``projections`` and ``codes``: as the program numbers them; ``states`` and ``projection_states``:
    ``STATES`` for each of those, empty where the rule has none, or the projection is not trained; ``hyper`` and
    ``rule``: as in ``reference``;
    ``scales``: of each weight, empty where none stand outside of its rows, and no list at all where all weights are
    plain;
    ``strengths``: of each weight, float32, how strongly L2 pulls each row that is updated, or whose gradient is asked
    for, and no list at all where it pulls none;
    ``told``: what native code is told of all this, where that is known (``embtables.ops.native.told``).
    """

    words: Tensor
    weights: list[Tensor]
    projections: list[Tensor]
    codes: list[Tensor]
    states: list[Tensor]
    projection_states: list[Tensor]
    hyper: Tensor
    rule: str
    scales: Sequence[Tensor] = ()
    strengths: Sequence[Tensor] = ()
    told: array[int] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return values_dtype(self.weights, self.scales)

    def most_scalars(self) -> int:
        """The most dimensions of a vector of the program."""
        lookups = self.words[HEADER_WORDS : HEADER_WORDS + LOOKUP_WORDS * int(self.words[1])]
        return int(lookups.view(-1, LOOKUP_WORDS)[:, 6].max())

    def forms(self) -> list[Any]:
        """Types and shapes of what a step reads and writes, by which a backward knows the tensors again."""
        types = [self.weights[0].dtype, self.states[0].dtype]
        return [*types, *[tensor.shape for tensor in self.weights], *[tensor.shape for tensor in self.projections]]
