"""Inputs for the tests of the torchrec face."""

from __future__ import annotations

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def jagged(
    rows: dict[str, int], batch: int, seed: int, *, dtype: torch.dtype = torch.int64, weighted: bool = False
) -> KeyedJaggedTensor:
    """Bags of 0 to 4 ids for each feature, whose keys stand in the order of ``rows``."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (len(rows) * batch,), generator=generator)
    counts = lengths.view(len(rows), batch).sum(1).tolist()
    values = torch.cat([torch.randint(n, (c,), generator=generator) for n, c in zip(rows.values(), counts)])
    weights = torch.randint(1, 17, (values.numel(),), generator=generator) / 16 if weighted else None
    return KeyedJaggedTensor(list(rows), values.to(dtype), weights, lengths=lengths)
