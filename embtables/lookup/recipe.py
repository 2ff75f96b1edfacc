"""What a lookup is, said once and as data: where the values of an id lie, and how they become its vector.

A method gives one ``Recipe`` for each of its tables. The lookup in PyTorch, the native program and the collisions of
ids all follow from it, so that none of them can contradict another. A recipe names slabs, codes and dense parameters;
it holds no tensors and knows nothing of features or batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

Combination = Literal["concat", "sum", "mean", "product", "alternatives", "sparse"]


@dataclass(frozen=True)
class Row:
    """Id x has row ``first + x`` of the slab."""

    slab: str
    first: int = 0


@dataclass(frozen=True)
class Hashed:
    """Id x has row h(x) of the slab, with h a seeded hash to all of its rows (``embtables.hashing.hash_ids``).

    ``sign_seed``: seed of a random sign that the row is multiplied with; ``None``: no sign.
    """

    slab: str
    seed: int
    sign_seed: int | None = None


@dataclass(frozen=True)
class Balanced:
    """Id x has a row of the slab that as many ids have as any other, or one fewer (``embtables.hashing.balanced_ids``).

    A slab of m rows is dealt out to m ids after the other: ids 0 … m − 1 have a row each, and so have the next m, which
    begin at another row. It is for tables with a vocabulary, whose ids are numbers from 0 on.

    ``start`` and ``turn``: signed 64-bit fractions of the slab, where the first m ids begin, and how much further each
    m ids begin than those before; ``seed_for`` and ``turn_for`` of ``embtables.hashing`` give them. ``sign_seed``: as
    in ``Hashed``.
    """

    slab: str
    start: int
    turn: int
    sign_seed: int | None = None


@dataclass(frozen=True)
class Digit:
    """Id x has row ⌊x/divisor⌋ mod m of the slab, which has m rows: one digit of x in a mixed radix."""

    slab: str
    divisor: int = 1


@dataclass(frozen=True)
class Capped:
    """Id x has row min(x, m − 1) of the slab, which has m rows: the last row is shared by all ids from m − 1 on."""

    slab: str


@dataclass(frozen=True)
class CircularBlock:
    """Id x has ``scalars`` consecutive rows of a slab of width 1, from row h(x) on; the slab begins again at its end.

    ``seed`` and ``sign_seed``: as in ``Hashed``.
    """

    slab: str
    seed: int
    scalars: int
    sign_seed: int | None = None


@dataclass(frozen=True)
class BalancedBlock:
    """Id x has ``scalars`` consecutive rows of a slab of width 1, which begins again at its end.

    As many ids as fit side by side have rows of their own, and so have as many again that begin at another row.
    ``start``, ``turn`` and ``sign_seed``: as in ``Balanced``.
    """

    slab: str
    start: int
    turn: int
    scalars: int
    sign_seed: int | None = None


@dataclass(frozen=True)
class Coded:
    """Id x has the row of the slab that a code buffer names: ``code[first + x, column]``.

    The buffer is ``[ids, k]``, or ``[ids]`` for k = 1, of any integer type.
    """

    slab: str
    code: str
    column: int = 0
    first: int = 0


@dataclass(frozen=True)
class Listed:
    """Id x has a list of rows of the slab: ``values[offsets[first + x] : offsets[first + x + 1]]``.

    ``offsets`` ``[ids + 1]`` and ``values`` are code buffers of any integer type. ``longest``: the most rows that any
    id has; further ones would not be read. A list stands alone in its recipe, which sums or averages it.
    """

    slab: str
    offsets: str
    values: str
    longest: int
    first: int = 0


@dataclass(frozen=True)
class Range:
    """One of several alternatives: the slab's rows belong to the ids that follow those of the alternatives before.

    The first alternative has the ids from 0 on, and each as many as its slab has rows. ``projection``: a dense
    parameter ``[width, D]`` that the row is multiplied with; ``None`` where the width is D.
    """

    slab: str
    projection: str | None = None


# The addresses of several scalars of a slab of width 1.
BLOCKS = (CircularBlock, BalancedBlock)

Address: TypeAlias = Row | Hashed | Balanced | Digit | Capped | CircularBlock | BalancedBlock | Coded | Listed | Range


class Ranks(NamedTuple):
    """A code buffer that maps ids to ranks, and the place in it where those of a table begin."""

    code: str
    first: int = 0


@dataclass(frozen=True)
class SparseRow:
    """Id x has row ``first + x`` of a sparse matrix, which has D columns and stores some of its entries alone.

    Its codes have the names ``matrix/values`` and so on. The values lie in the order of rows and columns, as rows of
    one scalar each in the row format ``format``, with ``scales`` where that has any. ``form`` says how those of a row
    are found:

    - ``"bitmap"``: ``bitmap`` has a bit for every entry of the matrix, and ``directory`` how many of them are set
      before each 8 words;
    - ``"compressed rows"``: ``columns`` has the column of each value, and ``pointers`` where the values of each row
      begin, and where the last one ends;
    - ``"entries"``: ``columns`` and ``ids`` have the column and the row of each value.

    ``entries``: how many values there are.
    """

    matrix: str
    form: str
    entries: int
    format: str
    first: int = 0

    def index(self) -> tuple[str, str]:
        """The codes that say where the values belong, in the order of the words of a program."""
        names = {
            "bitmap": ("bitmap", "directory"),
            "compressed rows": ("columns", "pointers"),
            "entries": ("columns", "ids"),
        }
        first, second = names[self.form]
        return f"{self.matrix}/{first}", f"{self.matrix}/{second}"


@dataclass(frozen=True)
class Recipe:
    """The vector of an id: the values at its ``addresses``, combined.

    Args:
        combine: ``"concat"`` joins the values in order; ``"sum"``, ``"mean"`` and ``"product"`` take values of one
            width; ``"alternatives"`` takes the one value whose ``Range`` holds the id. A sum of nothing is zero.
            ``"sparse"`` has no addresses, and nothing else but ``sparse``.
        addresses: where the values lie.
        ranks: a remap from id to rank; the addresses are then those of the rank. Signs stay those of the id.
        projection: a dense parameter ``[width, D]`` that the combined vector is multiplied with.
        zeros: how many zeros follow the values that are joined, which are that many fewer than D.
        rest: of alternatives: the recipe of the ids that no ``Range`` holds. Its addresses are those of the id (or
            rank) less the number of ids that the ranges hold, its signs those of the id. It is neither alternatives nor
            a list, has no ``ranks`` of its own, and reads other slabs than the ranges do.
        inner: a dense parameter ``[width, width of the projection]`` that the combined vector is multiplied with first.
        sparse: the row of a sparse matrix that the vector is; what is trained has none.
    """

    combine: Combination
    addresses: tuple[Address, ...] = ()
    ranks: Ranks | None = None
    projection: str | None = None
    zeros: int = 0
    rest: Recipe | None = None
    inner: str | None = None
    sparse: SparseRow | None = None

    def all_addresses(self) -> tuple[Address, ...]:
        """Its addresses, and those of the rest."""
        return self.addresses if self.rest is None else (*self.addresses, *self.rest.addresses)

    def codes(self) -> tuple[str, ...]:
        """The buffers of integers that it reads."""
        named = [self.ranks.code] if self.ranks is not None else []
        named += [] if self.sparse is None else self.sparse.index()
        for address in self.all_addresses():
            if isinstance(address, Coded):
                named.append(address.code)
            elif isinstance(address, Listed):
                named += [address.offsets, address.values]
        return tuple(dict.fromkeys(named))

    def projections(self) -> tuple[str, ...]:
        """The dense parameters that it reads."""
        named = [a.projection for a in self.addresses if isinstance(a, Range)]
        named += [self.inner, self.projection]
        named += [] if self.rest is None else [self.rest.inner, self.rest.projection]
        return tuple(dict.fromkeys(name for name in named if name is not None))


def concat(*addresses: Address, ranks: Ranks | None = None, projection: str | None = None, zeros: int = 0) -> Recipe:
    """The recipe of a vector that is put together from the values at these addresses, one after another.

    With a single address the vector is the value that stands there. ``ranks``, ``projection`` and ``zeros`` are as in
    ``Recipe``.
    """
    return Recipe("concat", addresses, ranks, projection, zeros)
