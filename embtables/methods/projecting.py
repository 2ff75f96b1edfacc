"""Projections of narrow rows, ``[width, D]``: how they begin, and how they are fitted to trained tables.

They stay as they began unless a method is told to train them. Rows that are looked up a few times an epoch do not keep
up with a projection that moves in every step, the less the wider they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from embtables.lookup.store import Store
from embtables.methods.base import Initializer, Method
from embtables.sizes.layout import Counts, Extra, Group, Layout

# Rows that are multiplied in float64 at once.
_CHUNK = 2**16


class ProjectingMethod(Method):
    """A method that may multiply narrow rows with projections.

    Args:
        train_projection: whether the projections are trained along with the rows.
    """

    # Older plans say by their layouts which projections are trained.
    later_fields: ClassVar[tuple[str, ...]] = (*Method.later_fields, "train_projection")
    train_projection: bool = False


def projection_name(group: Group, width: int, dim: int) -> str:
    """What a group calls the one projection of its rows of this width to this dimension."""
    return f"{group.name}/projection_{width}_{dim}"


def projection_of(group: Group, width: int, dim: int, *, trained: bool) -> Extra:
    """That projection, ``[width, dim]``."""
    return Extra(projection_name(group, width, dim), (width, dim), trained)


def orthogonal_rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random projection ``[width, D]`` whose rows are orthogonal and have the length √(D/width).

    What it makes of narrow rows has their standard deviation.
    """
    width, dim = shape
    gaussian = torch.randn(dim, width, generator=generator)
    return torch.linalg.qr(gaussian).Q.t() * sqrt(dim / width)


def initialize_projections(layout: Layout, store: Store, init: Initializer) -> None:
    """Makes every projection of a layout one of random orthogonal rows."""
    for extra in layout.training.extras:
        store.extra(extra.name).copy_(orthogonal_rows(extra.shape, init.generator(extra.name)))


class Narrowed(NamedTuple):
    """Narrow rows, where they lie, and what they are to hold: vectors ``[N, D]``, with the counts ``[N]`` of their ids.

    ``counts``: ``None`` where all ids count the same.
    """

    slab: Tensor
    places: Tensor | slice
    vectors: Tensor
    counts: Counts | None


def fit_projections(store: Store, narrowed: Mapping[str, Sequence[Narrowed]]) -> None:
    """Fits every projection, by its name, to all vectors that go through it, and the rows to it."""
    for name, parts in narrowed.items():
        projection = store.extra(name).detach()
        projection.copy_(principal_rows([(part.vectors, part.counts) for part in parts], len(projection)))
        for part in parts:
            part.slab[part.places] = narrow_rows(part.vectors, projection).to(part.slab)


def principal_rows(tables: Iterable[tuple[Tensor, Counts | None]], width: int) -> Tensor:
    """The projection P ``[width, D]`` onto which trained tables W ``[n, D]`` are projected with the least error.

    Its rows are orthogonal and have the length √(D/width): W ≈ ``narrow_rows(W, P)`` P. They are the first right
    singular vectors of the tables, one below the other, with the row of each id times the root of its count.

    Args:
        tables: each with the counts ``[n]`` of its ids, or ``None`` where all ids count the same.
        width: how many rows the projection has.
    """
    gram: Tensor | None = None
    for weight, counts in tables:
        # One occurrence more than was counted, so that ids which did not occur yet are not forgotten.
        shares = torch.ones(len(weight)) if counts is None else torch.from_numpy(counts[: len(weight)] + 1)
        for part, share in zip(weight.split(_CHUNK), shares.to(weight.device).split(_CHUNK)):
            rows = part.double()
            found = rows.t() @ (rows * share.unsqueeze(1))
            gram = found if gram is None else gram + found
    assert gram is not None
    # In ascending order of the singular values.
    axes = torch.linalg.eigh(gram).eigenvectors[:, -width:].flip(1)
    return (axes.t() * sqrt(gram.shape[0] / width)).float()


def narrow_rows(weight: Tensor, projection: Tensor) -> Tensor:
    """The rows ``[n, width]`` with which what ``principal_rows`` returned comes closest to ``weight`` ``[n, D]``."""
    return weight @ (projection.t() * (projection.shape[0] / projection.shape[1]))
