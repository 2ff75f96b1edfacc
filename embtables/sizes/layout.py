"""What a plan allocates, as plain data: slabs, extras and codes, and how each table finds its values in them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from embtables.config import TableConfig
from embtables.formats import BF16, DTYPES, FP32, RowFormat, row_format

Kind = Literal["weights", "codes", "index", "scales", "padding"]
Counts = npt.NDArray[np.int64]
T = TypeVar("T")


# Addresses and sizes in bytes are int64.
_MOST = 2**62


def _check_sizes(name: object, *sizes: object) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a part of the storage is named {name!r}")
    whole = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool) and size >= 0]
    if len(whole) < len(sizes) or prod(whole) * 8 >= _MOST:
        raise ValueError(f"'{name}' has the shape {list(sizes)}, which cannot be allocated")


@dataclass(frozen=True)
class Slab:
    """Rows of parameters that are gathered by index: ``[rows, width]``.

    ``format`` names the row format (``embtables.formats``) that they are stored in.
    """

    name: str
    rows: int
    width: int
    format: str = FP32.name

    @property
    def num_bytes(self) -> int:
        return row_format(self.format).slab_bytes(self.rows, self.width)

    @property
    def scale_bytes(self) -> int:
        """Those of ``num_bytes`` that are scales."""
        return row_format(self.format).scale_bytes(self.rows, self.width)

    def check(self) -> None:
        """Raises ``ValueError`` unless this can be allocated."""
        row_format(self.format)
        _check_sizes(self.name, self.rows, self.width)


@dataclass(frozen=True)
class Extra:
    """A small dense fp32 tensor, used whole in every step: a projection, a layer of an MLP, a codebook.

    ``trained``: whether steps change it: a parameter; else a buffer without gradient or optimizer state.
    """

    name: str
    shape: tuple[int, ...]
    trained: bool = True

    @property
    def num_bytes(self) -> int:
        return FP32.slab_bytes(1, prod(self.shape))

    def check(self) -> None:
        """Raises ``ValueError`` unless this can be allocated."""
        _check_sizes(self.name, *self.shape)
        if not isinstance(self.trained, bool):
            raise ValueError(f"'{self.name}' is trained or not, True or False, not {self.trained!r}")


@dataclass(frozen=True)
class Code:
    """A buffer that is not trained by gradients: a remap, learned codes, the values of a pruned table."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind

    @property
    def num_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize * prod(self.shape)

    def check(self) -> None:
        """Raises ``ValueError`` unless this can be allocated."""
        _check_sizes(self.name, *self.shape)
        if self.dtype not in DTYPES or self.kind not in get_args(Kind):
            raise ValueError(f"'{self.name}' is stored as {self.dtype!r} of kind {self.kind!r}, which there is not")


@dataclass(frozen=True)
class Form:
    """All tensors that one form of a group's storage (trained or served) consists of."""

    slabs: tuple[Slab, ...] = ()
    extras: tuple[Extra, ...] = ()
    codes: tuple[Code, ...] = ()

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of ``weights``, ``codes``, ``index``, …; kinds that are absent are left out."""
        result: dict[str, int] = {}
        for kind, num_bytes in self._sizes():
            result[kind] = result.get(kind, 0) + num_bytes
        return {kind: num_bytes for kind, num_bytes in result.items() if num_bytes}

    def bytes_by_table(self, names: Sequence[str]) -> tuple[dict[str, int], int]:
        """The bytes of what is named after each of these tables, and of what they share."""
        own, shared = dict.fromkeys(names, 0), 0
        for item in self.items():
            owner = owner_of(item.name, own)
            if owner is None:
                shared += item.num_bytes
            else:
                own[owner] += item.num_bytes
        return own, shared

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self._sizes())

    def items(self) -> list[Slab | Extra | Code]:
        """All tensors: the slabs, then the extras, then the codes."""
        return [*self.slabs, *self.extras, *self.codes]

    def _sizes(self) -> Iterator[tuple[str, int]]:
        for slab in self.slabs:
            yield "weights", slab.num_bytes - slab.scale_bytes
            yield "scales", slab.scale_bytes
        yield from (("weights", extra.num_bytes) for extra in self.extras)
        yield from ((code.kind, code.num_bytes) for code in self.codes)

    def rounds_stochastically(self) -> bool:
        """Whether updates of some slabs are rounded stochastically: those that are trained in 16 bits."""
        return any(slab.format == BF16.name for slab in self.slabs)

    def in_format(self, name: str) -> Form:
        """The form with all slabs in one row format; extras and codes stay what they are."""
        return replace(self, slabs=tuple(replace(slab, format=name) for slab in self.slabs))

    def to_dict(self) -> dict[str, Any]:
        """Plain data. What plans did not say before there was a choice is left out: fp32 slabs, trained extras."""
        data = asdict(self)
        for slab in data["slabs"]:
            if slab["format"] == FP32.name:
                del slab["format"]
        for extra in data["extras"]:
            if extra["trained"]:
                del extra["trained"]
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Form:
        """The form that ``to_dict`` described.

        Raises:
            ValueError: where a part of it cannot be allocated, or is named twice.
        """
        form = Form(
            tuple(Slab(**s) for s in data["slabs"]),
            tuple(Extra(**(e | {"shape": tuple(e["shape"])})) for e in data["extras"]),
            tuple(Code(**(c | {"shape": tuple(c["shape"])})) for c in data["codes"]),
        )
        for item in form.items():
            item.check()
        names = [item.name for item in form.items()]
        if len(set(names)) < len(names):
            raise ValueError("two parts of the storage have one name")
        if set(data) != {"slabs", "extras", "codes"}:
            raise ValueError(f"a form has slabs, extras and codes, not {', '.join(map(str, data))}")
        return form


FULL = "full"


@dataclass(frozen=True)
class Entry:
    """How one table is stored. Tables of one variant and dimension are looked up together.

    ``variant`` is ``"full"`` (a slab under the table's own name, whatever the method) or a word of the method's own;
    ``values`` are its sizes, e.g. ``{"rows": 1000}``: integers, lists of integers or words, nothing else.
    """

    variant: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def check(self, table: str) -> None:
        """Raises ``ValueError`` unless this says of a table how it is stored."""
        if not isinstance(self.variant, str) or not isinstance(self.values, dict):
            raise ValueError(f"table '{table}' has an entry that does not say how it is stored")
        for name, value in self.values.items():
            parts = value if isinstance(value, list) else [value]
            if not all(isinstance(part, str) or (isinstance(part, int) and 0 <= part < _MOST) for part in parts):
                raise ValueError(f"table '{table}' has the entry '{name}' {value!r}, which is neither sizes nor a word")


@dataclass(frozen=True)
class Layout:
    """A group solved into exact sizes: an entry per table, the form that is trained and the form that is served."""

    entries: Mapping[str, Entry]
    training: Form
    serving: Form

    @staticmethod
    def of(entries: Mapping[str, Entry], form: Form) -> Layout:
        """The usual case: what is trained is what is served, but for the format of its rows."""
        return Layout(entries, form.in_format(FP32.name), form)

    def trained_in(self, name: str) -> Layout:
        """The layout with the slabs that are trained in another row format; methods make layouts that train in fp32."""
        return replace(self, training=self.training.in_format(name))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. The served form is left out where it is the trained one."""
        data: dict[str, Any] = {
            "entries": {name: asdict(entry) for name, entry in self.entries.items()},
            "training": self.training.to_dict(),
        }
        return data if self.serving == self.training else data | {"serving": self.serving.to_dict()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Layout:
        """The layout that ``to_dict`` described.

        Raises:
            ValueError: where a part of it cannot be allocated, or an entry says something else than sizes.
        """
        training = Form.from_dict(data["training"])
        serving = Form.from_dict(data["serving"]) if "serving" in data else training
        entries = {name: Entry(**e) for name, e in data["entries"].items()}
        for name, entry in entries.items():
            entry.check(name)
        return Layout(entries, training, serving)


@dataclass(frozen=True)
class Group:
    """The tables that one entry of ``method`` covers, with the counts of their ids where they are known.

    ``format`` is what the rows of their slabs look like: a method takes its slabs from ``slab``, and computes its sizes
    with ``format.slab_bytes``.
    """

    name: str
    tables: tuple[TableConfig, ...]
    counts: tuple[Counts | None, ...] = field(compare=False)
    hash_seed: int
    format: RowFormat = FP32
    _found: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def once(self, name: str, find: Callable[[], T]) -> T:
        """What ``find`` returns, which is called the first time alone: plans ask for the same things again and again.

        Args:
            name: of what is found, with all that it depends on beside the group.
        """
        if name not in self._found:
            self._found[name] = find()
        found: T = self._found[name]
        return found

    def slab(self, name: str, rows: int, width: int) -> Slab:
        """A slab in the group's format."""
        return Slab(name, rows, width, self.format.name)

    def rows_bytes(self, rows: Counts | int) -> Counts:
        """Bytes of so many rows of ``embedding_dim`` scalars, for each table."""
        return self.format.slab_bytes(rows * np.ones_like(self.dims), self.dims)

    def table_bytes(self, table: TableConfig) -> int | None:
        """Bytes of a table kept in full, in the group's format; ``None`` where the number of ids is unknown."""
        return None if table.rows is None else self.format.slab_bytes(table.rows, table.embedding_dim)

    @property
    def full_bytes(self) -> int:
        """Bytes of the full tables in the group's format, those of unknown size left out."""
        return sum(self.table_bytes(t) or 0 for t in self.tables)

    @property
    def num_rows(self) -> Counts:
        """Rows of each full table; 2**40 where the number of ids is unknown."""
        return self.once("num_rows", lambda: _constant([t.rows or 2**40 for t in self.tables]))

    @property
    def dims(self) -> Counts:
        """Columns of each table."""
        return self.once("dims", lambda: _constant([t.embedding_dim for t in self.tables]))


def _constant(values: list[int]) -> Counts:
    array = np.array(values, dtype=np.int64)
    array.setflags(write=False)
    return array


def owner_of(item: str, tables: Container[str]) -> str | None:
    """The table that a slab, extra or code is named after; ``None`` for what a group shares."""
    while item not in tables:
        item, slash, _ = item.rpartition("/")
        if not slash:
            return None
    return item
