"""Recipes as native code takes them: checked, resolved to rows of weights, and written as one int64 tensor.

The words of the tensor are described in ``ops/csrc/program.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from embtables.formats import row_format, scales_name
from embtables.lookup.recipe import (
    BLOCKS,
    Address,
    Balanced,
    BalancedBlock,
    Capped,
    CircularBlock,
    Coded,
    Digit,
    Hashed,
    Listed,
    Range,
    Recipe,
    Row,
    SparseRow,
)
from embtables.lookup.sparse_rows import sparse_rows, stored_values
from embtables.lookup.store import Store
from embtables.lookup.stored_rows import StoredRows
from embtables.ops.program import CODE_DTYPES, POLICIES, UNBOUNDED

_Refuse: TypeAlias = Callable[[str], NoReturn]
_COMBINATIONS = {"concat": 0, "sum": 1, "mean": 2, "product": 3, "alternatives": 4, "sparse": 7}
_OF_LISTS = {"sum": 5, "mean": 6}
_ADDRESSES: dict[type, int] = {
    Row: 0,
    Range: 0,
    Hashed: 1,
    Digit: 2,
    Capped: 3,
    CircularBlock: 4,
    Coded: 5,
    Listed: 6,
    Balanced: 7,
    BalancedBlock: 8,
}
_SPARSE_FORMS = {"bitmap": 9, "compressed rows": 10, "entries": 11}


class InputSpec(NamedTuple):
    """How ids come to a lookup: the input's column, and what the table does with ids out of range and with padding."""

    feature: str
    table: str
    column: int
    embedding_dim: int
    num_embeddings: int | None
    on_out_of_range: str
    seed: int
    padding_idx: int | None

    @property
    def num_ids(self) -> int | None:
        """Ids are 0 … num_ids − 1, the one for all that are out of range among them; ``None``: any 64-bit integer."""
        return None if self.num_embeddings is None else self.num_embeddings + (self.on_out_of_range == "oov")


class ProgramWeight(NamedTuple):
    """What a program reads rows of: a weight, or the values of a sparse matrix.

    ``tensors``: its attribute, and behind it that of the scales outside of its rows, if any; ``rows``: how they lie.
    """

    tensors: tuple[str, ...]
    rows: StoredRows

    @property
    def name(self) -> str:
        """Its attribute."""
        return self.tensors[0]


class Program(NamedTuple):
    """The lookups of a module for native code.

    ``words``: int64, what ``csrc/program.h`` describes; ``weights``, ``projections`` and ``codes``: which weights,
    dense parameters and codes it numbers, in order; ``rows_per_example``: addresses of an example with one id per
    feature; ``rows_per_id``: the most that one id of a feature has.
    """

    words: Tensor
    weights: tuple[ProgramWeight, ...]
    projections: tuple[str, ...]
    codes: tuple[str, ...]
    rows_per_example: int
    rows_per_id: int


def is_native(recipe: Recipe, store: Store) -> bool:
    """Whether native code has what a recipe needs; PyTorch looks up the others."""
    if any(store.code(name).dtype not in CODE_DTYPES for name in recipe.codes()):
        return False
    stored = [store.stored_rows(store.weight_of(a.slab)) for a in recipe.all_addresses()]
    stored += [] if recipe.sparse is None else [_values_of(recipe.sparse, store).rows]
    if any(rows.form is None for rows in stored):
        return False
    if recipe.combine == "alternatives":
        return recipe.rest is None or is_native(recipe.rest, store)
    # Blocks begin anywhere in their slab and may go on at its beginning: no place for the rows of a projection.
    return recipe.projection is None or not any(isinstance(address, BLOCKS) for address in recipe.addresses)


def compile_program(
    lookups: Sequence[tuple[InputSpec, Recipe]], num_features: int, store: Store, block: Sequence[Recipe] = ()
) -> Program:
    """Writes the program of native recipes that ``check_recipe`` has passed, in the order of the outputs.

    ``block``: all recipes of the block that a view's one lookup belongs to; their dense parameters take part in its
    steps, as they do in PyTorch.
    """
    recipes = [*(recipe for _, recipe in lookups), *block]
    slabs = [address.slab for recipe in recipes for address in recipe.all_addresses()]
    # What the recipes read, and no more: other weights take no part in a step.
    weights = [name for name in store.weight_names if name in {store.weight_of(slab) for slab in slabs}]
    read = [_weight(name, store) for name in weights]
    # A sparse matrix is that of several tables; where each of them begins in it is no matter of its values.
    matrices = {recipe.sparse.matrix: recipe.sparse for recipe in recipes if recipe.sparse is not None}
    read += [_values_of(sparse, store) for sparse in matrices.values()]
    projections = [n for n in store.extra_shapes() if any(n in recipe.projections() for recipe in recipes)]
    codes = [n for n in store.code_names() if any(n in recipe.codes() for recipe in recipes)]
    lookup_words: list[int] = []
    piece_words: list[int] = []
    num_pieces = 0
    rows_of_feature = [0] * num_features
    # The rests of alternatives are lookups too, after those that have outputs.
    rests = [(spec, recipe.rest) for spec, recipe in lookups if recipe.rest is not None]
    next_rest = len(lookups)
    for number, (spec, recipe) in enumerate([*lookups, *rests]):
        operation, num_rows = _operation(recipe)
        alternatives = operation == _COMBINATIONS["alternatives"]
        if number < len(lookups):
            rows_of_feature[spec.column] += num_rows
        size, ranks = spec.num_embeddings, recipe.ranks
        pieces = _pieces(recipe, store)
        # An alternative has its projection with its piece.
        projection = None if alternatives else recipe.projection
        lookup_words += [
            spec.column,
            UNBOUNDED if size is None else size,
            -1 if size is None else POLICIES[spec.on_out_of_range],
            spec.seed,
            -1 if spec.padding_idx is None else spec.padding_idx,
            int(spec.padding_idx is not None),
            spec.embedding_dim,
            operation,
            num_pieces,
            len(pieces) + (recipe.sparse is not None),
            num_rows,
            -1 if ranks is None else codes.index(ranks.code),
            0 if ranks is None else ranks.first,
            _inner(spec, recipe, store),
            -1 if projection is None else projections.index(projection),
            -1 if recipe.rest is None else next_rest,
            -1 if recipe.inner is None else projections.index(recipe.inner),
            0 if recipe.inner is None else store.extra_shapes()[recipe.inner][1],
        ]
        next_rest += recipe.rest is not None
        num_pieces += len(pieces) + (recipe.sparse is not None)
        if recipe.sparse is not None:
            piece_words += _sparse_words(
                recipe.sparse, spec.embedding_dim, len(weights) + [*matrices].index(recipe.sparse.matrix), codes
            )
        column, before = 0, 0
        for address, rows in pieces:
            width, start = store.width(address.slab), store.start(address.slab)
            scalars = address.scalars if isinstance(address, BLOCKS) else width
            a, b, code, values, turn = 0, 0, -1, -1, 0
            if isinstance(address, Row):
                start, a = start + address.first, UNBOUNDED
            elif isinstance(address, Range):
                start, before = start - before, before + rows
                a = before
            elif isinstance(address, (Hashed, CircularBlock)):
                a, b = address.seed, rows
            elif isinstance(address, (Balanced, BalancedBlock)):
                a, b, turn = address.start, rows, address.turn
            elif isinstance(address, Digit):
                a, b = address.divisor, rows
            elif isinstance(address, Capped):
                a = rows - 1
            elif isinstance(address, Coded):
                a, b = address.first * _columns(store.code(address.code)) + address.column, rows
                code = codes.index(address.code)
            elif isinstance(address, Listed):
                a, b, code, values = address.first, rows, codes.index(address.offsets), codes.index(address.values)
            sign_seed = getattr(address, "sign_seed", None)
            own = address.projection if isinstance(address, Range) else recipe.projection if alternatives else None
            piece_words += [
                _ADDRESSES[type(address)],
                weights.index(store.weight_of(address.slab)),
                start,
                a,
                b,
                scalars,
                column,
                int(sign_seed is not None),
                sign_seed or 0,
                -1 if own is None else projections.index(own),
                code,
                values,
                store.start(address.slab),
                rows,
                *store.stored_rows(store.weight_of(address.slab)).place(store.start(address.slab)),
                turn,
            ]
            column += scalars if recipe.combine == "concat" else 0
    weight_words: list[int] = []
    start = 0
    for stored in (weight.rows for weight in read):
        assert stored.form is not None
        form = stored.form
        weight_words += [stored.width, start, form.format, form.bits, form.share, stored.unit_bytes]
        start += stored.rows[-1]
    weight_words += [0, start, 0, 0, 0, 0]
    shapes = store.extra_shapes()
    projection_words = [n for p in projections for n in (*shapes[p], int(store.is_trained(store.key(p))))]
    code_words = [
        word for code in map(store.code, codes) for word in (code.element_size(), _columns(code), code.numel())
    ]
    counts = [num_features, len(lookups), num_pieces, len(read), len(projections), len(codes), len(rests)]
    sections = [*counts, *lookup_words, *piece_words, *weight_words, *projection_words, *code_words]
    most, total = max(rows_of_feature, default=0), sum(rows_of_feature)
    words = torch.tensor(sections, dtype=torch.int64, device="cpu")
    return Program(words, tuple(read), tuple(projections), tuple(codes), total, most)


def _weight(name: str, store: Store) -> ProgramWeight:
    scales = [] if store.scales(name) is None else [scales_name(name)]
    return ProgramWeight((name, *scales), store.stored_rows(name))


def _values_of(sparse: SparseRow, store: Store) -> ProgramWeight:
    names = [f"{sparse.matrix}/{name}" for name in ("values", "scales")]
    keys = [store.key(name) for name in names if name in store.code_names()]
    return ProgramWeight(tuple(keys), stored_values(row_format(sparse.format), sparse.entries))


def _sparse_words(sparse: SparseRow, dim: int, weight: int, codes: Sequence[str]) -> list[int]:
    """The words of the piece of a lookup of sparse rows."""
    where = [codes.index(name) for name in sparse.index()]
    kind = _SPARSE_FORMS[sparse.form]
    return [kind, weight, 0, sparse.first, 0, dim, 0, 0, 0, -1, *where, 0, sparse.entries, 0, 0, 0]


def _pieces(recipe: Recipe, store: Store) -> list[tuple[Address, int]]:
    """The addresses of a recipe, and how many rows each may read.

    Ranges of one projection whose plain rows lie one behind the other, as those of bands do that differ in what they
    are served in, are one piece: the fewer there are, the sooner it is known which of them an id belongs to.
    """
    found: list[tuple[Address, int]] = []
    for address in recipe.addresses:
        rows = store.rows(address.slab)
        if isinstance(address, Range) and found and _goes_on(*found[-1], address, store):
            found[-1] = found[-1][0], found[-1][1] + rows
        else:
            found.append((address, rows))
    return found


def _goes_on(before: Address, rows: int, after: Range, store: Store) -> bool:
    weight = store.weight_of(after.slab)
    return (
        isinstance(before, Range)
        and before.projection == after.projection
        and store.is_plain(weight)
        and store.weight_of(before.slab) == weight
        and store.start(before.slab) + rows == store.start(after.slab)
    )


def _operation(recipe: Recipe) -> tuple[int, int]:
    """The number of the operation that combines a recipe's values, and how many addresses an id has."""
    first = recipe.addresses[0] if recipe.addresses else None
    if isinstance(first, Listed):
        return _OF_LISTS[recipe.combine], first.longest
    # A projection of one row is an alternative that all ids have.
    projected = recipe.projection is not None and recipe.inner is None
    projects_a_row = projected and len(recipe.addresses) == 1 and isinstance(first, Row)
    if recipe.combine == "alternatives" or projects_a_row:
        return _COMBINATIONS["alternatives"], 1 if recipe.rest is None else max(1, _operation(recipe.rest)[1])
    return _COMBINATIONS[recipe.combine], 1 if recipe.sparse is not None else len(recipe.addresses)


def _inner(spec: InputSpec, recipe: Recipe, store: Store) -> int:
    """How many scalars a recipe's combination has; of alternatives as many as the vector."""
    first = recipe.inner or (None if _operation(recipe)[0] == _COMBINATIONS["alternatives"] else recipe.projection)
    return spec.embedding_dim - recipe.zeros if first is None else store.extra_shapes()[first][0]


def _columns(code: Tensor) -> int:
    """How many integers of a code buffer an id has."""
    return prod(code.shape[1:])


# ---- what lookups take for granted ---------------------------------------------------------------------------------


def check_recipe(spec: InputSpec, recipe: Recipe, store: Store) -> None:
    """Raises ``ValueError`` where a lookup would read what is not its own, or mean something else than it says."""

    def refuse(reason: str) -> NoReturn:
        raise ValueError(f"table '{spec.table}': its recipe {reason}; fix what recipe() of its method returns")

    _check(spec.embedding_dim, spec.num_ids, recipe, store, refuse)


def _check(dim: int, num_ids: int | None, recipe: Recipe, store: Store, refuse: _Refuse) -> None:
    combine, addresses, extras = recipe.combine, recipe.addresses, store.extra_shapes()
    if combine not in _COMBINATIONS:
        refuse(f"has the combination {combine!r}, which is not one of {', '.join(_COMBINATIONS)}")
    if combine == "sparse" or recipe.sparse is not None:
        return _check_sparse(dim, num_ids, recipe, store, refuse)
    least = {"sum": 0, "product": 2}.get(combine, 1)
    if len(addresses) < least:
        refuse(f"({combine}) has {len(addresses)} addresses, and needs at least {least}")
    for address in addresses:
        if not isinstance(address, Address):
            refuse(f"has {address!r} among its addresses, which is not an address")
        if not store.has_slab(address.slab):
            refuse(f"reads the slab '{address.slab}', which its layout does not have")
    own = replace(recipe, rest=None)
    _check_codes(own, num_ids, store, refuse)
    for name in own.projections():
        if name not in extras or len(extras[name]) != 2:
            refuse(f"takes the projection '{name}', which is not an extra [width, D] of its layout")
    for address in addresses:
        _check_address(address, recipe, num_ids, store, refuse)
    if combine == "alternatives":
        _check_alternatives(dim, num_ids, recipe, store, refuse)
    elif recipe.rest is not None:
        refuse(f'({combine}) has a rest, which only "alternatives" have')
    else:
        _check_widths(dim, recipe, store, refuse)


def _check_sparse(dim: int, num_ids: int | None, recipe: Recipe, store: Store, refuse: _Refuse) -> None:
    sparse = recipe.sparse
    if sparse is None or recipe != Recipe("sparse", sparse=sparse):
        refuse('has a row of a sparse matrix beside something else: it stands alone, in the combination "sparse"')
    rows = sparse_rows(sparse, store, dim).num_rows()
    if num_ids is None or sparse.first < 0 or sparse.first + num_ids > rows:
        refuse(f"reads '{sparse.matrix}' from row {sparse.first} on for {num_ids} ids, but it has {rows} rows")


def _check_rest(dim: int, num_ids: int, recipe: Recipe, rest: Recipe, store: Store, refuse: _Refuse) -> None:
    """``num_ids``: those that the alternatives of ``recipe`` leave over."""
    if num_ids < 1:
        refuse("has a rest, but its alternatives hold all ids")
    if rest.combine == "alternatives" or rest.rest is not None:
        refuse("has a rest that has alternatives itself")
    if rest.sparse is not None:
        refuse("has a rest that is a row of a sparse matrix, which stands alone")
    if rest.ranks is not None:
        refuse("has a rest with ranks of its own, but it counts from the last rank of the alternatives on")
    if any(isinstance(address, Listed) for address in rest.addresses):
        refuse("has a rest of lists, which stand alone")
    shared = {a.slab for a in recipe.addresses} & {a.slab for a in rest.addresses}
    if shared:
        refuse(f"has an alternative and a rest that both read the slab '{min(shared)}'")
    _check(dim, num_ids, rest, store, lambda reason: refuse(f"has a rest, and that one {reason}"))


def _check_codes(recipe: Recipe, num_ids: int | None, store: Store, refuse: _Refuse) -> None:
    for name in recipe.codes():
        if name not in store.code_names():
            refuse(f"reads the code '{name}', which its layout does not have")
        if store.code(name).is_floating_point():
            refuse(f"reads the code '{name}', which is not a buffer of integers")
    flat = [] if recipe.ranks is None else [recipe.ranks.code]
    flat += [name for a in recipe.addresses if isinstance(a, Listed) for name in (a.offsets, a.values)]
    for name in flat:
        if _columns(store.code(name)) != 1:
            refuse(f"reads the code '{name}' as one integer per entry, but it has {_columns(store.code(name))}")
    needed: list[tuple[str, int, int]] = []  # name, first element, how many more than one per id
    if recipe.ranks is not None:
        needed.append((recipe.ranks.code, recipe.ranks.first, 0))
    for address in recipe.addresses:
        if isinstance(address, Coded):
            needed.append((address.code, address.first, 0))
            columns = _columns(store.code(address.code))
            if not 0 <= address.column < columns:
                refuse(f"reads column {address.column} of the code '{address.code}', which has {columns}")
        elif isinstance(address, Listed):
            needed.append((address.offsets, address.first, 1))
    for name, first, more in needed:
        length = store.code(name).shape[0]
        if num_ids is None or first < 0 or first + num_ids + more > length:
            refuse(f"reads the code '{name}' from {first} on for {num_ids} ids, but it has {length} entries")


def _check_address(address: Address, recipe: Recipe, num_ids: int | None, store: Store, refuse: _Refuse) -> None:
    combine, kind = recipe.combine, type(address).__name__
    place = f"has the address {kind} of slab '{address.slab}'"
    rows, width = store.rows(address.slab), store.width(address.slab)
    if isinstance(address, Range) != (combine == "alternatives"):
        refuse(f'{place} in the combination "{combine}": Range and "alternatives" belong together')
    if rows < 1:
        refuse(f"{place}, which has no rows")
    if num_ids is None and not isinstance(address, (Hashed, Digit, CircularBlock)):
        refuse(f"{place}, but the table has no num_embeddings")
    if isinstance(address, Row) and num_ids is not None and not 0 <= address.first <= rows - num_ids:
        refuse(f"{place} from row {address.first} on for {num_ids} ids, but the slab has {rows} rows")
    if isinstance(address, Digit) and address.divisor < 1:
        refuse(f"{place} with the divisor {address.divisor}, which is below 1")
    if isinstance(address, BLOCKS):
        if combine != "concat" or width != 1 or not 1 <= address.scalars <= rows:
            refuse(
                f"{place} of {address.scalars} scalars: blocks are joined, of a slab of width 1, and at most all of it"
            )
    if isinstance(address, Listed) and (combine not in ("sum", "mean") or len(recipe.addresses) > 1):
        refuse(f"{place}: a list stands alone in its recipe, which sums or averages it")
    if isinstance(address, Listed) and address.longest < 1:
        refuse(f"{place} of at most {address.longest} rows")
    signed = getattr(address, "sign_seed", None) is not None
    if signed and combine not in ("sum", "mean") and not isinstance(address, BLOCKS):
        refuse(f"{place} with a sign, which only sums, means and blocks have")


def _check_alternatives(dim: int, num_ids: int | None, recipe: Recipe, store: Store, refuse: _Refuse) -> None:
    extras, held = store.extra_shapes(), sum(store.rows(a.slab) for a in recipe.addresses)
    if num_ids is None or (held < num_ids and recipe.rest is None):
        refuse(f"has alternatives for the ids below {held} only, but the table has {num_ids}")
    of_width: dict[int, str | None] = {}
    for address in recipe.addresses:
        assert isinstance(address, Range)
        width = store.width(address.slab)
        if of_width.setdefault(width, address.projection) != address.projection:
            refuse(f"has two alternatives of width {width} with different projections")
        if width != dim if address.projection is None else extras[address.projection] != (width, dim):
            shape = "" if address.projection is None else f" and a projection {list(extras[address.projection])}"
            refuse(f"has an alternative of width {width}{shape}, but its vectors have {dim} dimensions")
    if recipe.projection is not None:
        refuse("has a projection beside those of its alternatives")
    if recipe.zeros:
        refuse("has zeros behind its alternatives: zeros follow values that are joined")
    if recipe.inner is not None:
        refuse("has an inner projection, which only values that go on to another one have")
    slabs = [address.slab for address in recipe.addresses]
    for slab in slabs:
        if slabs.count(slab) > 1:
            refuse(f"has two alternatives of the slab '{slab}'")
    if recipe.rest is not None:
        _check_rest(dim, num_ids - held, recipe, recipe.rest, store, refuse)


def _check_widths(dim: int, recipe: Recipe, store: Store, refuse: _Refuse) -> None:
    extras = store.extra_shapes()
    widths = [a.scalars if isinstance(a, BLOCKS) else store.width(a.slab) for a in recipe.addresses]
    if recipe.combine != "concat" and len(set(widths)) > 1:
        refuse(f"({recipe.combine}) has values of different widths: {', '.join(map(str, widths))}")
    if recipe.zeros and (recipe.combine != "concat" or recipe.projection is not None):
        refuse("has zeros, which follow values that are joined, and no projection")
    inner = sum(widths) if recipe.combine == "concat" else widths[0] if widths else dim
    if recipe.inner is not None:
        if recipe.projection is None:
            refuse("has an inner projection, which only values that go on to another one have")
        if extras[recipe.inner][0] != inner:
            refuse(f"has {inner} scalars and an inner projection {list(extras[recipe.inner])}")
        inner = extras[recipe.inner][1]
    if recipe.projection is None and (recipe.zeros < 0 or inner + recipe.zeros != dim):
        zeros = f" and {recipe.zeros} zeros" if recipe.zeros else ""
        refuse(f"has {inner} scalars in all{zeros}, but its vectors have {dim} dimensions")
    if recipe.projection is not None and extras[recipe.projection] != (inner, dim):
        refuse(f"has {inner} scalars and a projection {list(extras[recipe.projection])}, but its vectors have {dim}")
