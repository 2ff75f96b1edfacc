"""The rows of a sparse matrix, of which the largest entries alone are stored: how they are read and written."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from embtables.formats import DTYPES, FP32, RowFormat, row_format
from embtables.lookup.graphs import number_below
from embtables.lookup.recipe import SparseRow
from embtables.lookup.store import Store
from embtables.lookup.stored_rows import StoredRows

WORDS = 8  # int64 words of the bitmap for each entry of its directory
_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def stored_values(rows_in: RowFormat, number: int) -> StoredRows:
    """How so many values lie in a format, as rows of one scalar each."""
    values = StoredRows(rows_in, 1)
    values.add(number)
    return values


class SparseRows:
    """Values in the order of rows and columns; a form says where those of a row begin and in which columns they are.

    Args:
        sparse: which matrix, and how its entries are stored.
        store: where its codes are.
        embedding_dim: its columns.

    Raises:
        ValueError: for codes that no such matrix has.
    """

    def __init__(self, sparse: SparseRow, store: Store, embedding_dim: int) -> None:
        self.name, self.num_values = sparse.matrix, sparse.entries
        self.store, self.embedding_dim = store, embedding_dim
        self.values = stored_values(row_format(sparse.format), self.num_values)
        stored, scales = self.values.empty("meta")
        self._expect("values", (stored.shape[0],), stored.dtype)
        if scales is not None:
            self._expect("scales", tuple(scales.shape), scales.dtype)
        self.check_index()

    def _expect(self, name: str, shape: tuple[int, ...] | None, *dtypes: torch.dtype) -> None:
        """``shape``: ``None`` for any of one dimension."""
        found = self.code(name) if f"{self.name}/{name}" in self.store.code_names() else torch.empty(())
        # Numbers in fp32 may have been cast with the tables.
        same = found.dtype in dtypes or (found.is_floating_point() and DTYPES[FP32.dtype] in dtypes)
        if not same or (found.ndim != 1 if shape is None else found.shape != shape):
            raise ValueError(
                f"'{self.name}' has {self.num_values:,} entries in {self.values.format.name}, but '{self.name}/{name}' "
                "is of another shape or type: the plan is damaged"
            )

    def check_index(self) -> None:
        """Raises ``ValueError`` where the codes beside the values are not as many as the form needs, or no integers."""
        raise NotImplementedError

    def num_rows(self) -> float:
        """How many rows the codes have places for."""
        raise NotImplementedError

    def code(self, name: str) -> Tensor:
        return self.store.code(f"{self.name}/{name}")

    def decode(self, rows: Tensor) -> Tensor:
        """Vectors ``[..., D]`` of rows ``[...]``."""
        raise NotImplementedError

    def value(self, position: Tensor) -> Tensor:
        """The values at positions of any shape."""
        scales = self.code("scales") if self.values.format.scales else None
        found = self.values.read(self.code("values").unsqueeze(1), scales, position.reshape(-1))
        return found.to(self.store.dtype).view(position.shape)

    def place(self, start: Tensor, counts: Tensor, row: Tensor, column: Tensor | None) -> Tensor:
        """Vectors ``[n, D]`` from ``counts`` entries from ``start`` on [n]; of each entry its row, 0 … n−1, and column.

        The work is that of the entries found, not of n·D.
        """
        position = (start - counts.cumsum(0) + counts)[row] + torch.arange(row.numel(), device=row.device)
        column = self.code("columns")[position].long() if column is None else column
        values = self.value(position)
        vectors = values.new_zeros(start.numel(), self.embedding_dim)
        vectors.view(-1)[row * self.embedding_dim + column] = values
        return vectors

    def check_codes(self, given: Callable[[str], Tensor | None]) -> None:
        """As ``Block.check_codes``."""
        columns = given(f"{self.name}/columns")
        if columns is not None:
            _check_range(f"{self.name}/columns", columns, self.embedding_dim)

    def write_values(self, values: Tensor) -> None:
        """Stores all values ``[K]``."""
        scales = self.code("scales") if self.values.format.scales else None
        self.values.write(self.code("values").unsqueeze(1), scales, 0, values.unsqueeze(1))

    def write(self, chunk: slice, start: int, mask: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Notes where the entries ``chunk`` are: in a mask of the flat table from ``start``, or by row and column."""
        raise NotImplementedError

    def finish(self) -> None:
        """Called after the last ``write``."""


class _Bitmap(SparseRows):
    """A bit per entry of the full table, and how many of them are set before each block of 8 words."""

    def check_index(self) -> None:
        self._expect("directory", None, *_INTEGERS)
        self._expect("bitmap", (len(self.code("directory")) * WORDS,), torch.int64)

    def num_rows(self) -> float:
        return 64 * len(self.code("bitmap")) // self.embedding_dim

    def decode(self, rows: Tensor) -> Tensor:
        first = rows.reshape(-1) * self.embedding_dim
        bits = self._bits(first)
        if torch.compiler.is_compiling():  # how many bits are set depends on data
            position = self._set_before(first).unsqueeze(1) + bits.cumsum(1) - bits
            vectors = torch.where(bits > 0, self.value(position.clamp(max=self.num_values - 1)), 0)
        else:
            row, column = bits.nonzero(as_tuple=True)
            vectors = self.place(self._set_before(first), bits.sum(1), row, column)
        return vectors.view(*rows.shape, self.embedding_dim)

    def _bits(self, first: Tensor) -> Tensor:
        """The bits ``[n, D]`` that begin at ``first`` [n]."""
        bitmap = self.code("bitmap")
        number = -(-self.embedding_dim // 64)
        word = (first >> 6).unsqueeze(1) + torch.arange(number + 1, device=first.device)
        words = bitmap[word.clamp(max=len(bitmap) - 1)]
        # Aligned with the row: the upper bits of a word and the lower ones of the next. Shifts stay below 64.
        # Shifts by tensors are named, since ONNX has no such operator for >> and <<.
        shift = (first & 63).unsqueeze(1)
        upper = torch.bitwise_right_shift(words[:, :-1], shift) & ~(-1 << (63 - shift) << 1)
        aligned = upper | (torch.bitwise_left_shift(words[:, 1:], 63 - shift) << 1)
        places = torch.arange(min(64, self.embedding_dim), device=first.device)
        bits = torch.bitwise_right_shift(aligned.unsqueeze(2), places) & 1
        return bits.flatten(1)[:, : self.embedding_dim]

    def _set_before(self, bit: Tensor) -> Tensor:
        """How many bits are set before ``bit`` [n]."""
        block = bit // (64 * WORDS)
        words = self.code("bitmap").view(-1, WORDS).index_select(0, block)
        starts = 64 * torch.arange(WORDS, device=bit.device)
        before = ((bit - 64 * WORDS * block).unsqueeze(1) - starts).clamp(0, 64)
        half = before >> 1
        below = words & ~torch.bitwise_left_shift(-1 << half, before - half)
        return self.code("directory").index_select(0, block) + _count_bits(below).sum(1)

    def check_codes(self, given: Callable[[str], Tensor | None]) -> None:
        """The directory follows from the bitmap, and the bits are as many as the values."""
        bitmap, directory = given(f"{self.name}/bitmap"), given(f"{self.name}/directory")
        if bitmap is None or directory is None:
            return
        counts = _count_bits(bitmap).view(-1, WORDS).sum(1)
        ends = counts.cumsum(0)
        if int(ends[-1]) != self.num_values or not torch.equal(ends - counts, directory.long()):
            raise ValueError(
                f"'{self.name}/bitmap' and '{self.name}/directory' do not say where {self.num_values:,} "
                "values are: the file or state dict is damaged"
            )

    def write(self, chunk: slice, start: int, mask: Tensor, rows: Tensor, columns: Tensor) -> None:
        size = 64 * WORDS
        bits = F.pad(mask.long(), (0, -mask.numel() % size)).view(-1, 64)
        words = (bits << torch.arange(64, device=mask.device)).sum(1)
        self.code("bitmap")[start // 64 : start // 64 + len(words)] = words
        counts = bits.view(-1, size).sum(1)
        directory = self.code("directory")[start // size : start // size + len(counts)]
        directory.copy_(chunk.start + counts.cumsum(0) - counts)


class _CompressedRows(SparseRows):
    """The column of every entry, and where each row's entries begin."""

    def check_index(self) -> None:
        self._expect("columns", (self.num_values,), *_INTEGERS)
        self._expect("pointers", None, *_INTEGERS)

    def num_rows(self) -> float:
        return len(self.code("pointers")) - 1

    def check_codes(self, given: Callable[[str], Tensor | None]) -> None:
        super().check_codes(given)
        pointers = given(f"{self.name}/pointers")
        if pointers is None:
            return
        _check_sorted(f"{self.name}/pointers", pointers)
        if int(pointers[0]) != 0 or int(pointers[-1]) != self.num_values:
            raise ValueError(
                f"'{self.name}/pointers' goes from {int(pointers[0])} to {int(pointers[-1])}, but there are "
                f"{self.num_values} values: the file or state dict is damaged"
            )

    def decode(self, rows: Tensor) -> Tensor:
        pointers, flat = self.code("pointers"), rows.reshape(-1)
        return self.between(pointers[flat].long(), pointers[flat + 1].long()).view(*rows.shape, self.embedding_dim)

    def between(self, start: Tensor, end: Tensor) -> Tensor:
        """Vectors ``[n, D]`` from the entries ``start`` to ``end`` [n] of each row."""
        if torch.compiler.is_compiling():
            return self._place_at_most_all(start, end)
        return self.place(start, end - start, torch.repeat_interleave(end - start), None)

    def _place_at_most_all(self, start: Tensor, end: Tensor) -> Tensor:
        """``between`` for graphs, where all rows have to be as long as the longest that there can be: n·D places."""
        dim = self.embedding_dim
        position = start.unsqueeze(1) + torch.arange(dim, device=start.device)
        there = position < end.unsqueeze(1)
        position = torch.where(there, position, 0)
        # Places behind the end of a row go to a column of their own, which is cut off.
        column = torch.where(there, self.code("columns")[position].long(), dim)
        values = self.value(position)
        return values.new_zeros(start.shape[0], dim + 1).scatter(1, column, values)[:, :dim]

    def write(self, chunk: slice, start: int, mask: Tensor, rows: Tensor, columns: Tensor) -> None:
        own, pointers = self.code("columns"), self.code("pointers")
        own[chunk] = columns.to(own.dtype)
        if rows.numel():
            counts = torch.bincount(rows - rows[0])
            first = int(rows[0]) + 1
            pointers[first : first + len(counts)] += counts.to(pointers.dtype)

    def finish(self) -> None:
        pointers = self.code("pointers")
        pointers.copy_(pointers.cumsum(0))


class _Entries(_CompressedRows):
    """Sorted entries, each with its row and column; a row's are found by bisection."""

    def check_index(self) -> None:
        self._expect("columns", (self.num_values,), *_INTEGERS)
        self._expect("ids", (self.num_values,), *_INTEGERS)

    def num_rows(self) -> float:
        return inf  # one that has no entry is zero

    def check_codes(self, given: Callable[[str], Tensor | None]) -> None:
        SparseRows.check_codes(self, given)
        ids = given(f"{self.name}/ids")
        if ids is not None:
            _check_sorted(f"{self.name}/ids", ids)

    def decode(self, rows: Tensor) -> Tensor:
        ids = self.code("ids")
        wanted = rows.reshape(-1).to(ids.dtype)
        if torch.compiler.is_compiling():
            found = self.between(number_below(ids, wanted), number_below(ids, wanted + 1))
        else:
            found = self.between(torch.searchsorted(ids, wanted), torch.searchsorted(ids, wanted, right=True))
        return found.view(*rows.shape, self.embedding_dim)

    def write(self, chunk: slice, start: int, mask: Tensor, rows: Tensor, columns: Tensor) -> None:
        for name, each in (("columns", columns), ("ids", rows)):
            code = self.code(name)
            code[chunk] = each.to(code.dtype)

    def finish(self) -> None:
        pass


_FORMS: dict[str, type[SparseRows]] = {
    "bitmap": _Bitmap,
    "compressed rows": _CompressedRows,
    "entries": _Entries,
}


def sparse_rows(sparse: SparseRow, store: Store, embedding_dim: int) -> SparseRows:
    """The rows of a matrix in the form that they are stored in, as ``SparseRows``."""
    if sparse.form not in _FORMS:
        raise ValueError(f"'{sparse.matrix}' is stored as {sparse.form!r}, which there is not: the plan is damaged")
    return _FORMS[sparse.form](sparse, store, embedding_dim)


def _check_range(name: str, codes: Tensor, end: int) -> None:
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < end:
        raise ValueError(
            f"'{name}' holds {int(codes.min())} … {int(codes.max())}, but there are only 0 … {end - 1}: "
            "the file or state dict is damaged"
        )


def _check_sorted(name: str, codes: Tensor) -> None:
    if codes.numel() and (int(codes[0]) < 0 or bool((codes[1:] < codes[:-1]).any())):
        raise ValueError(f"'{name}' does not rise: the file or state dict is damaged")


# SWAR counts of bits: pairs, nibbles, bytes; their sum ends up in the top byte.
_PAIRS, _NIBBLES, _BYTES, _ONES = 0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101


def _count_bits(words: Tensor) -> Tensor:
    """Bits set in each int64; the masks clear what an arithmetic shift brings in."""
    words = words - (words >> 1 & _PAIRS)
    words = (words & _NIBBLES) + (words >> 2 & _NIBBLES)
    return ((words + (words >> 4) & _BYTES) * _ONES) >> 56
