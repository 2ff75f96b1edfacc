"""The check for ids out of range, also where a compiled or exported graph cannot look at its data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor


def ranges(lookups: Iterable[tuple[str, str, int | None]]) -> str:
    """Feature, table and number of ids of each lookup, as JSON, for the errors below."""
    return json.dumps([*lookups])


def raise_for_ids(ids: Tensor, lookup: Tensor, wrong: Tensor, ranges: str) -> NoReturn:
    """``IndexError`` naming the first of ``ids`` that is ``wrong``.

    ``lookup``, which broadcasts to the shape of ``ids``, counts in ``ranges``, as that function writes
    them.
    """
    first = tuple(wrong.nonzero()[0].tolist())
    raise_for_id(int(ids[first]), int(lookup.expand_as(ids)[first]), ranges)


def raise_for_id(id: int, lookup: int, ranges: str) -> NoReturn:
    """``IndexError`` naming one id; ``ranges`` as above."""
    feature, table, size = json.loads(ranges)[lookup]
    raise IndexError(
        f"feature '{feature}' holds id {id}, but table '{table}' has the ids 0 … {size - 1}; "
        'to accept others give the table on_out_of_range="oov" or "hash"'
    )


@torch.library.custom_op("embtables::refuse_ids", mutates_args=())
def refuse_ids(ids: Tensor, lookup: Tensor, wrong: Tensor, ranges: str) -> Tensor:
    """A copy of ``ids``; ``IndexError`` where any is ``wrong``, as one operator that graphs do not look into."""
    if wrong.any():
        raise_for_ids(ids, lookup, wrong, ranges)
    return ids.clone()


@refuse_ids.register_fake
def _(ids: Tensor, lookup: Tensor, wrong: Tensor, ranges: str) -> Tensor:
    return torch.empty_like(ids)
