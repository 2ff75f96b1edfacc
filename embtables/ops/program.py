"""What a lookup is, as data: which rows an id has and how they become its vector.

A block that says so in its ``recipes`` is looked up by native code as a whole, addresses included. One that cannot is
looked up by its ``address`` and ``combine`` in PyTorch; the two have to mean the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Operation = Literal["concat", "sum", "mean", "mult", "alternatives"]
Address = Literal["row", "hash", "digit", "cut", "block", "below"]

_UNBOUNDED = 2**62
_OPERATIONS = {"concat": 0, "sum": 1, "mean": 2, "mult": 3, "alternatives": 4}
_ADDRESSES = {"row": 0, "hash": 1, "digit": 2, "cut": 3, "block": 4, "below": 0}
# How the ids of a bag become one vector: not at all, or so.
POOLING = {None: 0, "sum": 1, "mean": 2}
_POLICIES = {"error": 0, "hash": 1, "oov": 2}


class Piece(NamedTuple):
    """Where an id's scalars lie: in the weight of ``width`` columns, in a slab that begins at row ``start``.

    ``address``, of the id x (its rank, where the recipe has ``ranks``):

    - ``"row"``: row x;
    - ``"hash"``: row hash(x) of ``b`` rows, with the seed ``a``;
    - ``"digit"``: row ⌊x/a⌋ mod b;
    - ``"cut"``: row min(x, a);
    - ``"block"``: ``scalars`` of the ``b`` rows of a circular slab of width 1, from hash(x) on, with the seed ``a``;
    - ``"below"``: row x, if x < a and no piece before takes it (``alternatives``).

    ``scalars``: how many the vector takes, ``width`` by default; ``column``: the first one's place in a concatenation;
    ``sign_seed``: of a random sign, or ``None``; ``projection``: the extra [width, D] that the row is multiplied with.
    """

    width: int
    start: int
    address: Address = "row"
    a: int = 0
    b: int = 0
    scalars: int | None = None
    column: int = 0
    sign_seed: int | None = None
    projection: str | None = None


class Recipe(NamedTuple):
    """An id's vector: its pieces, joined, combined, or (``"alternatives"``) the one whose turn it is.

    ``ranks``: the code that maps ids to ranks, and where this table's begin in it.
    """

    operation: Operation
    pieces: Sequence[Piece]
    ranks: tuple[str, int] | None = None


class Entrance(NamedTuple):
    """How ids come to a lookup: the input's column, and the table's treatment of ids out of range and of padding."""

    column: int
    embedding_dim: int
    num_embeddings: int | None
    on_out_of_range: str
    seed: int
    padding_idx: int | None


class Program(NamedTuple):
    """All lookups of a module for the native code.

    ``words``: int64, what ``csrc/program.h`` describes; ``widths``, ``projections`` and ``codes``: which weights,
    extras and codes it numbers, in order; ``rows_per_example``: addresses of an example with one id a feature;
    ``rows_per_id``: the most that one id of a feature has.
    """

    words: Tensor
    widths: tuple[int, ...]
    projections: tuple[str, ...]
    codes: tuple[str, ...]
    rows_per_example: int
    rows_per_id: int


def compile_program(
    lookups: Sequence[tuple[Entrance, Recipe]],
    num_features: int,
    weights: dict[int, int],
    projections: dict[str, tuple[int, ...]],
    codes: Sequence[str],
) -> Program:
    """Writes the program of lookups, in the order of the outputs.

    Args:
        weights: rows of each weight, by its width.
        projections: shapes of the extras, by name.
        codes: names of the store's codes.
    """
    widths, extras, remaps = list(weights), list(projections), list(codes)
    lookup_words: list[int] = []
    piece_words: list[int] = []
    num_pieces = 0
    rows_of_feature = [0] * num_features
    for entrance, recipe in lookups:
        num_rows = 1 if recipe.operation == "alternatives" else len(recipe.pieces)
        rows_of_feature[entrance.column] += num_rows
        size = entrance.num_embeddings
        lookup_words += [
            entrance.column,
            _UNBOUNDED if size is None else size,
            -1 if size is None else _POLICIES[entrance.on_out_of_range],
            entrance.seed,
            -1 if entrance.padding_idx is None else entrance.padding_idx,
            int(entrance.padding_idx is not None),
            entrance.embedding_dim,
            _OPERATIONS[recipe.operation],
            num_pieces,
            len(recipe.pieces),
            num_rows,
            -1 if recipe.ranks is None else remaps.index(recipe.ranks[0]),
            0 if recipe.ranks is None else recipe.ranks[1],
        ]
        num_pieces += len(recipe.pieces)
        for piece in recipe.pieces:
            piece_words += [
                _ADDRESSES[piece.address],
                widths.index(piece.width),
                piece.start,
                piece.a,
                piece.b,
                piece.width if piece.scalars is None else piece.scalars,
                piece.column,
                int(piece.sign_seed is not None),
                piece.sign_seed or 0,
                -1 if piece.projection is None else extras.index(piece.projection),
            ]
    weight_words: list[int] = []
    start = 0
    for width, rows in [*weights.items(), (0, 0)]:
        weight_words += [width, start]
        start += rows
    projection_words = [n for shape in projections.values() for n in shape]
    counts = [num_features, len(lookups), num_pieces, len(widths), len(extras), len(remaps)]
    words = torch.tensor([*counts, *lookup_words, *piece_words, *weight_words, *projection_words], dtype=torch.int64)
    per_example = sum(1 if recipe.operation == "alternatives" else len(recipe.pieces) for _, recipe in lookups)
    return Program(words, tuple(widths), tuple(extras), tuple(remaps), per_example, max(rows_of_feature))


class Request(NamedTuple):
    """A program and what it reads and writes, as a rule the weights and state of a module.

    ``weights``, ``projections`` and ``codes``: as the program numbers them; ``states`` and ``projection_states``: two
    for each of those, empty where the rule has none; ``hyper`` and ``rule``: as in ``reference``.
    """

    words: Tensor
    weights: list[Tensor]
    projections: list[Tensor]
    codes: list[Tensor]
    states: list[Tensor]
    projection_states: list[Tensor]
    hyper: Tensor
    rule: str
