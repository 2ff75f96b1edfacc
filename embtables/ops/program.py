"""What a lookup is, as data: which rows an id has and how they become its vector.

A block that says so in its ``recipes`` is looked up by native code as a whole, addresses included. One that cannot is
looked up by its ``address`` and ``combine`` in PyTorch; the two have to mean the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

Operation = Literal["concat", "sum", "mean", "mult", "alternatives"]
Address = Literal["row", "hash", "digit", "cut", "block", "below"]

UNBOUNDED = 2**62
_OPERATIONS = {"concat": 0, "sum": 1, "mean": 2, "mult": 3, "alternatives": 4}
_ADDRESSES = {"row": 0, "hash": 1, "digit": 2, "cut": 3, "block": 4, "below": 0}
# How the ids of a bag become one vector: not at all, or so.
POOLING = {None: 0, "sum": 1, "mean": 2}
POLICIES = {"error": 0, "hash": 1, "oov": 2}
# How many words ``csrc/program.h`` has for a lookup and for a piece.
LOOKUP_WORDS, PIECE_WORDS = 13, 10


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

    @property
    def num_rows(self) -> int:
        """Addresses of an id."""
        return 1 if self.operation == "alternatives" else len(self.pieces)


class Entrance(NamedTuple):
    """How ids come to a lookup: the input's column, and the table's treatment of ids out of range and of padding."""

    table: str
    column: int
    embedding_dim: int
    num_embeddings: int | None
    on_out_of_range: str
    seed: int
    padding_idx: int | None

    @property
    def num_ids(self) -> int | None:
        """Ids are 0 … num_ids - 1, the one for all that are out of range among them; ``None``: any 64-bit integer."""
        return None if self.num_embeddings is None else self.num_embeddings + (self.on_out_of_range == "oov")


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
    codes: Mapping[str, Tensor],
) -> Program:
    """Writes the program of lookups, in the order of the outputs.

    Args:
        weights: rows of each weight, by its width.
        projections: shapes of the extras, by name.
        codes: the store's, by name; what is in them does not matter.

    Raises:
        ValueError: naming the table, for a recipe that leads outside of a weight, a code or a vector.
    """
    for entrance, recipe in lookups:
        _check(entrance, recipe, weights, projections, codes)
    widths, extras, remaps = list(weights), list(projections), list(codes)
    lookup_words: list[int] = []
    piece_words: list[int] = []
    num_pieces = 0
    rows_of_feature = [0] * num_features
    for entrance, recipe in lookups:
        rows_of_feature[entrance.column] += recipe.num_rows
        size = entrance.num_embeddings
        lookup_words += [
            entrance.column,
            UNBOUNDED if size is None else size,
            -1 if size is None else POLICIES[entrance.on_out_of_range],
            entrance.seed,
            -1 if entrance.padding_idx is None else entrance.padding_idx,
            int(entrance.padding_idx is not None),
            entrance.embedding_dim,
            _OPERATIONS[recipe.operation],
            num_pieces,
            len(recipe.pieces),
            recipe.num_rows,
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
    return Program(words, tuple(widths), tuple(extras), tuple(remaps), sum(rows_of_feature), max(rows_of_feature))


# ---- what native code takes for granted ------------------------------------------------------------------------------


def _check(
    entrance: Entrance,
    recipe: Recipe,
    weights: Mapping[int, int],
    projections: Mapping[str, tuple[int, ...]],
    codes: Mapping[str, Tensor],
) -> None:
    """Raises ``ValueError`` where a lookup would read what is not its own, or mean another thing than it says."""

    def refuse(reason: str) -> NoReturn:
        raise ValueError(f"table '{entrance.table}': its recipe {reason}; mend what the block's recipes() returns")

    dim, num_ids, operation, pieces = entrance.embedding_dim, entrance.num_ids, recipe.operation, recipe.pieces
    if operation not in _OPERATIONS:
        refuse(f"has the operation {operation!r}, which is none of {', '.join(_OPERATIONS)}")
    least = {"sum": 0, "mult": 2}.get(operation, 1)
    if len(pieces) < least:
        refuse(f"({operation}) has {len(pieces)} pieces, and needs at least {least}")
    if recipe.ranks is not None:
        name, start = recipe.ranks
        if name not in codes or codes[name].dtype != torch.int32:
            refuse(f"takes ranks from '{name}', which is no code of int32")
        if num_ids is None or start < 0 or start + num_ids > codes[name].numel():
            refuse(f"takes ranks from '{name}', which has {codes[name].numel()} from {start} on, for {num_ids} ids")
    begin, column = 0, 0
    of_width: dict[int, str | None] = {}
    for number, piece in enumerate(pieces):
        place = f"has a piece (number {number}, {piece.address!r} of width {piece.width})"
        if piece.address not in _ADDRESSES:
            refuse(f"{place} whose address is none of {', '.join(_ADDRESSES)}")
        if (piece.address == "below") != (operation == "alternatives"):
            refuse(f'{place} in the operation "{operation}": "below" and "alternatives" belong together')
        if piece.width not in weights:
            refuse(f"{place}, but the slabs have the widths {', '.join(map(str, weights)) or 'none'}")
        if operation == "alternatives" and piece.a < begin:
            refuse(f"{place} for ids below {piece.a}, which the pieces before it have taken")
        first, last, begin = _rows(piece, num_ids, begin)
        if last is None:
            refuse(f"{place} whose rows have no end, since the table has no num_embeddings or b is below 1")
        if last > first and not 0 <= first < last <= weights[piece.width]:
            refuse(f"{place} with the rows {first} … {last - 1}, but there are {weights[piece.width]} of that width")
        scalars = piece.width if piece.scalars is None else piece.scalars
        if piece.address == "block":
            if operation != "concat" or piece.width != 1 or not 1 <= scalars <= piece.b:
                refuse(f"{place} of {scalars} scalars: blocks have width 1, at most b scalars, and are concatenated")
        elif scalars != piece.width:
            refuse(f"{place} of {scalars} scalars: only blocks have another number than their width")
        if operation == "concat" and piece.column != column:
            refuse(f"{place} for column {piece.column}, but the pieces before it end at column {column}")
        column += scalars
        if piece.sign_seed is not None and operation not in ("sum", "mean") and piece.address != "block":
            refuse(f"{place} with a sign, which sums, means and blocks alone have")
        if piece.projection is not None:
            if operation != "alternatives":
                refuse(f"{place} with a projection, which alternatives alone have")
            shape = projections.get(piece.projection)
            if shape is None or tuple(shape) != (piece.width, dim):
                refuse(f"{place} with the projection '{piece.projection}', which is no extra of [{piece.width}, {dim}]")
        elif operation != "concat" and scalars != dim:
            refuse(f"{place}, but its vectors have {dim} dimensions")
        if of_width.setdefault(piece.width, piece.projection) != piece.projection:
            refuse(f"{place} with another projection than the one of that width before it")
    if operation == "concat" and column != dim:
        refuse(f"has pieces of {column} scalars in all, but its vectors have {dim} dimensions")
    if operation == "alternatives" and (num_ids is None or begin < num_ids):
        refuse(f"has alternatives for the ids below {begin} alone, but the table has {num_ids}")


def _rows(piece: Piece, num_ids: int | None, begin: int) -> tuple[int, int | None, int]:
    """The first row of a piece, the one after its last (``None``: no end), and the first id left to the next one."""
    start, a, b = piece.start, piece.a, piece.b
    if piece.address in ("hash", "block", "digit"):
        return start, None if b < 1 or (piece.address == "digit" and a < 1) else start + b, begin
    if num_ids is None:
        return start, None, begin
    if piece.address == "below":
        end = max(begin, min(a, num_ids))
        return start + begin, start + end, end
    return start, start + (num_ids if piece.address == "row" else min(a + 1, num_ids)), begin


class ProgramTensors(NamedTuple):
    """A program and what it reads and writes, as a rule the weights and state of a module, as they are now.

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

    def most_scalars(self) -> int:
        """The most dimensions of a vector of the program."""
        num_lookups = int(self.words[1])
        return int(self.words[6 : 6 + LOOKUP_WORDS * num_lookups].view(-1, LOOKUP_WORDS)[:, 6].max())

    def forms(self) -> list[tuple[torch.dtype, torch.Size]]:
        """Type and shape of all tensors that a step reads or writes, by which a backward knows them again."""
        lists = (self.weights, self.projections, self.states, self.projection_states)
        return [(tensor.dtype, tensor.shape) for tensors in lists for tensor in tensors]
