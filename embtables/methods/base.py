"""What a method owes: sizes and bytes from a budget, and a recipe or a block that says how its tables are looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import Tensor, nn

from embtables.config import TableConfig
from embtables.formats import FP32, row_format
from embtables.hashing import seed_for
from embtables.lookup.block import Block
from embtables.lookup.recipe import Recipe
from embtables.lookup.store import Store
from embtables.optimizers import FusedOptimizer
from embtables.sizes.budget import keep_apart
from embtables.sizes.layout import FULL, Entry, Form, Group, Layout, Slab, owner_of

if TYPE_CHECKING:
    from embtables.lookup.engine import Touched


class Floor(NamedTuple):
    """The least bytes with which a method can store a group, and what sets them."""

    num_bytes: int
    why: str


class TableEntry(NamedTuple):
    """A table and how it is stored."""

    table: TableConfig
    entry: Entry


@dataclass(frozen=True)
class Initializer:
    """Standard deviations of outputs, and a generator for every tensor, keyed by its name.

    Args:
        std: of what several tables share: the root mean square of their own.
        seed: of the random numbers.
        own: of the outputs of each table, by its name.
    """

    std: float
    seed: int
    own: Mapping[str, float] = field(default_factory=dict)

    def std_of(self, name: str) -> float:
        """The standard deviation of the outputs that a slab is for, named as its table or ``table/…``."""
        owner = owner_of(name, self.own)
        return self.std if owner is None else self.own[owner]

    def generator(self, name: str) -> torch.Generator:
        """A generator of random numbers that depends on the seed and on the tensor's name alone."""
        return torch.Generator().manual_seed(seed_for(self.seed, "init", name) & (2**63 - 1))

    def uniform_(self, weight: Tensor, name: str, std: float, mean: float = 0.0) -> None:
        """Fills ``weight`` with mean ± √3·std, uniformly."""
        bound = sqrt(3.0) * std
        values = torch.empty(weight.shape).uniform_(mean - bound, mean + bound, generator=self.generator(name))
        weight.copy_(values)


class Stage(nn.Module):
    """What a method does over the course of training.

    ``listens_to`` holds the names of slabs whose rows' gradients the stage wants to hear. They are looked up in PyTorch
    then, not in native code, and compiled lookups run uncompiled.

    ``shows`` names tables of whose vectors lookups show the first columns alone, with zeros behind them that take no
    gradient: in training the first ``width`` columns, an integer on the CPU that ``step`` may change in place, and
    otherwise as many as ``shows`` says.
    """

    listens_to: tuple[str, ...] = ()
    shows: Mapping[str, int] = {}
    width: Tensor

    def step(self, touched: Touched) -> None:
        """Called once for each training step, when its ids are known to be good and before anything is read.

        ``touched.ids(table)`` and ``touched.rows(slab)`` say what the step looks up. The stage may change weights and
        codes.
        """
        raise NotImplementedError

    def hear(self, slab: str, rows: Tensor, grad: Tensor) -> None:
        """Called in the backward of every training lookup, before these rows are updated.

        Args:
            slab: one of ``listens_to``.
            rows: ``[U]``, the distinct rows that the lookup read, in ascending order, counted from the slab's first.
            grad: ``[U, width]``, the sum of each row's gradients, neither clipped nor regularized by the optimizer.
        """
        raise NotImplementedError

    def done(self) -> bool:
        """Whether what the stage does is over, so that a model's AUC will not fall and recover once more."""
        return True

    def state(self) -> dict[str, Tensor]:
        """Tensors that exact resume needs, to be filled in place."""
        raise NotImplementedError


class Method(BaseModel):
    """How tables are stored: a small frozen config, pure data and arithmetic.

    A subclass in a file of its own, or in another package under the entry-point group ``embtables.methods``, is all
    that a new method takes.

    Args:
        precision: what rows are served in, as ``plan`` takes it; ``None`` for what the plan says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str]
    needs_budget: ClassVar[bool] = True
    # Whether ``plan`` puts another method in its place.
    chooses: ClassVar[bool] = False
    # The values of entries that the served form alone depends on: plans that differ in no others train alike.
    served_values: ClassVar[tuple[str, ...]] = ()
    # Fields that older plans do not know: left unsaid at their defaults, since plans are known by what they say.
    later_fields: ClassVar[tuple[str, ...]] = ("precision",)
    precision: str | None = None

    @field_validator("precision")
    @classmethod
    def _check_precision(cls, precision: str | None) -> str | None:
        if precision is not None:
            row_format(precision)
        return precision

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(self._explain(error)) from None

    def _explain(self, error: ValidationError) -> str:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            own = [name for name in type(self).model_fields if name not in Method.model_fields]
            fields = ", ".join([*own, *Method.model_fields])
            return f"method {self.kind} has no field '{name}'; its fields: {fields}"
        reason = first["msg"].removeprefix("Value error, ")
        if not name:
            return f"method {self.kind}: {reason}"
        given = repr(first["input"])
        return f"method {self.kind}, field '{name}': {reason}" + ("" if given in reason else f", not {given}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the kind and the fields, as ``from_config`` takes them."""
        fields = type(self).model_fields
        unsaid = {name for name in self.later_fields if getattr(self, name) == fields[name].default}
        return {"kind": self.kind, **self.model_dump(mode="json", exclude=unsaid)}

    def with_precision(self, precision: str | None) -> Method:
        """This method in a precision, where it says none itself."""
        if precision is None or self.precision is not None or row_format(precision) == FP32:
            return self
        return self.model_copy(update={"precision": precision})

    # ---- sizes ---------------------------------------------------------------------------------------------------

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        """Raises ``ValueError`` where the method cannot serve these tables or this optimizer."""
        for table in group.tables:
            if table.num_embeddings is None:
                raise ValueError(
                    f"table '{table.name}': method {self.kind} needs num_embeddings; hash and the like do not"
                )

    def floor(self, group: Group) -> Floor:
        """The least feasible bytes of the served form."""
        raise NotImplementedError

    def ceiling(self, group: Group) -> int | None:
        """The most bytes that it can use: those of the full tables; ``None`` where they have no end."""
        return None if any(table.rows is None for table in group.tables) else group.full_bytes

    def fit(self, group: Group, limit: int) -> Layout:
        """The largest layout within ``limit`` bytes of the served form, which is at least the floor."""
        raise NotImplementedError

    def fixed_codes(self, layout: Layout) -> tuple[str, ...]:
        """Names of codes that follow from the frequencies given to ``plan``, such as the rank of every id."""
        return ()

    def make_fixed_codes(self, layout: Layout, group: Group) -> dict[str, Any]:
        """Those codes, as numpy arrays."""
        return {}

    def for_training(self, num_steps: int) -> Method:
        """This method with what depends on the length of training settled; itself by default."""
        return self

    # ---- the module ----------------------------------------------------------------------------------------------

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        """How one table (never one of the variant ``"full"``) is looked up: pure data.

        A method that no recipe can say overrides ``block`` instead.
        """
        raise NotImplementedError(f"method {self.kind} has neither recipe() nor block()")

    def block(self, entries: Sequence[TableEntry], group: Group, store: Store) -> Block | None:
        """The lookup of tables of one variant and dimension, for methods that no recipe can say.

        ``None``: each table is looked up by its recipe.
        """
        return None

    def served_recipe(self, entry: TableEntry, group: Group) -> Recipe:
        """How the served form of the table is looked up; the same by default."""
        return self.recipe(entry, group)

    def served_block(self, entries: Sequence[TableEntry], group: Group, store: Store) -> Block | None:
        """The lookup in the form that is served; the same by default."""
        return self.block(entries, group, store)

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        """Fills the trained form's tensors so that every output has mean 0 and its table's standard deviation."""
        for slab in layout.training.slabs:
            self.initialize_slab(slab, store, init)

    def initialize_slab(self, slab: Slab, store: Store, init: Initializer) -> None:
        """Fills one slab uniformly, about 0, with the standard deviation that its table's outputs have."""
        init.uniform_(store.slab(slab.name), slab.name, init.std_of(slab.name))

    def keep(self, layout: Layout, group: Group, store: Store, weights: Mapping[str, Tensor]) -> list[str]:
        """Takes over trained full tables, ``[num_embeddings, D]`` by name, where the trained form has room for them.

        By default that is where a table is kept in full. Returns the names of those taken over.
        """
        kept = [name for name in weights if layout.entries[name].variant == FULL]
        for name in kept:
            store.slab(name)[: len(weights[name])] = weights[name]
        return kept

    def serve(self, layout: Layout, group: Group, trained: Store, served: Store) -> None:
        """Fills the served form from the trained one. By default they are the same tensors."""
        for slab in layout.serving.slabs:
            served.write_slab(slab.name, trained.slab(slab.name))
        for extra in layout.serving.extras:
            served.extra(extra.name).copy_(trained.extra(extra.name).detach())
        for code in layout.serving.codes:
            served.code(code.name).copy_(trained.code(code.name))

    def stage(self, layout: Layout, group: Group, store: Store) -> Stage | None:
        """What happens over the course of training, where anything does."""
        return None


def chunk_widths(embedding_dim: int, chunks: int) -> list[int]:
    """The widths of the chunks that an embedding is cut into, as equal as can be.

    ``chunk_widths(10, 4)`` is ``[3, 3, 2, 2]``.
    """
    return [embedding_dim // chunks + (j < embedding_dim % chunks) for j in range(chunks)]


def full_layout(group: Group) -> Layout:
    """The layout in which all tables of a group are stored in full."""
    pairs = {table.name: full_entry(group, table) for table in group.tables}
    form = Form(slabs=tuple(slab for _, slab in pairs.values()))
    return Layout.of({name: entry for name, (entry, _) in pairs.items()}, form)


def shared_layout(
    group: Group, limit: int, width: int, least_rows: int, entry: Callable[[TableConfig], Entry]
) -> Layout:
    """The layout of a group whose tables share one slab, but for those that ``keep_apart`` stores in full.

    The slab has the name of the group, and as many rows as fit in what the tables in full leave of the budget.

    Args:
        limit: the bytes of the whole group.
        width: the number of columns of the shared slab.
        least_rows: the number of rows that it has in any case.
        entry: gives the entry of a table that shares the slab.
    """
    apart, left = keep_apart(group, limit, reserve=group.format.slab_bytes(least_rows, width))
    pairs = {table.name: full_entry(group, table) for table in apart}
    slabs = [slab for _, slab in pairs.values()]
    if len(apart) < len(group.tables):
        slabs.append(group.slab(group.name, group.format.rows_within(left, width), width))
    entries = {t.name: pairs[t.name][0] if t.name in pairs else entry(t) for t in group.tables}
    return Layout.of(entries, Form(slabs=tuple(slabs)))


def full_entry(group: Group, table: TableConfig) -> tuple[Entry, Slab]:
    """What a layout holds of a table that is stored in full: its entry, and a slab of its own under its name."""
    assert table.rows is not None
    return Entry(FULL, {"rows": table.rows}), group.slab(table.name, table.rows, table.embedding_dim)
