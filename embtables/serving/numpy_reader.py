"""Looks up served tables with NumPy alone: copy this one file to wherever they are served.

A served file is a safetensors file: eight bytes that say how long its header is, the header, which is JSON, and the
bytes of the tensors. The header's ``__metadata__`` holds JSON under ``embtables``: ``tables``, their configurations,
and ``lookups``, which says where the values of an id lie and how they become its vector. That is all that is read here,
so that this module is also the specification of what ``lookups`` means; ``docs/export.md`` says it in words.

Vectors are equal, bit for bit, to those of :class:`embtables.EmbeddingTables` on a CPU: every sum is added up from the
left to the right in float32, and no product is fused with a sum.

Example::

    tables = NumpyTables("tables.safetensors")
    tables.lookup("item", numpy.array([7, 8, 1]))                                   # [3, D]
    tables.pooled("item", numpy.array([7, 8, 1]), numpy.array([0, 2, 3]), "mean")   # [2, D]: of two bags of ids
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy

KEY = "embtables"
CHECKSUM, LOOKUPS, LOOKUPS_VERSION = "sha256", "lookups", 1
# The types of tensors by their names in safetensors: NumPy's, and their names in checksums. NumPy has no bfloat16: its
# numbers are the upper halves of those in float32, and are read as integers here.
_DTYPES = {
    "F64": ("<f8", "torch.float64"),
    "F32": ("<f4", "torch.float32"),
    "F16": ("<f2", "torch.float16"),
    "BF16": ("<i2", "torch.bfloat16"),
    "I64": ("<i8", "torch.int64"),
    "I32": ("<i4", "torch.int32"),
    "I16": ("<i2", "torch.int16"),
    "U8": ("u1", "torch.uint8"),
}
_WORDS = 8  # of a bitmap, for each entry of its directory


class File(NamedTuple):
    """A served file.

    ``described``: what it says of itself, from JSON; ``arrays``: its tensors by name; ``dtypes``: the names that
    safetensors has for their types.
    """

    described: dict[str, Any]
    arrays: dict[str, Any]
    dtypes: dict[str, str]

    def check(self) -> None:
        """Reads the whole file; raises ``ValueError`` where it does not match the checksum in it, if it has one."""
        tensors = ((name, _DTYPES[self.dtypes[name]][1], array) for name, array in self.arrays.items())
        if self.described.get(CHECKSUM, "") not in ("", checksum(self.described, tensors)):
            raise ValueError("its contents do not match its checksum: it is damaged")


def checksum(described: Mapping[str, Any], tensors: Iterable[tuple[str, str, Any]]) -> str:
    """Hexadecimal SHA-256 of what a file says of itself, but its checksum, and of its tensors.

    Args:
        described: from JSON, its entries in their order.
        tensors: the name, the type as PyTorch writes it, and the contiguous array of each.
    """
    digest = hashlib.sha256(json.dumps({k: v for k, v in described.items() if k != CHECKSUM}).encode())
    for name, dtype, array in sorted(tensors, key=lambda each: each[0]):
        digest.update(f"\n{name} {dtype} {list(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(numpy.uint8).data if array.size else b"")
    return digest.hexdigest()


def open_file(path: Path | str, mode: str = "r", key: str = KEY) -> File:
    """Maps a served file into memory; nothing but its header is read.

    Args:
        path: of the file. It may be replaced by another one later, but not be written over.
        mode: ``"r"`` for arrays that cannot be written, ``"c"`` for those of which each process has its own copy of
            what it writes. The file stays as it is.
        key: of what the file says of itself.

    Raises:
        OSError: where it cannot be opened.
        ValueError: saying what is wrong with it.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 10 <= start <= size:
            raise ValueError("its header is damaged or cut")
        try:
            header = json.loads(file.read(start - 8))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            dtypes = {name: str(entry["dtype"]) for name, entry in entries.items()}
            shapes = {name: tuple(map(_size, entry["shape"])) for name, entry in entries.items()}
            places = {name: tuple(map(_size, entry["data_offsets"])) for name, entry in entries.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError("its header is damaged") from None
        described = _described(header.get("__metadata__"), key)
        # An empty file cannot be mapped, but this one has a header.
        whole = numpy.memmap(file, numpy.uint8, mode)  # type: ignore[call-overload]
    said = start + max((place[-1] for place in places.values() if place), default=0)
    if said != size:
        raise ValueError(f"it has {size:,} bytes, but its header is of a file of {said:,}: it was cut or damaged")
    arrays, end = {}, 0
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        dtype = numpy.dtype(_DTYPES[dtypes[name]][0]) if dtypes[name] in _DTYPES else None
        if dtype is None:
            raise ValueError(f"its tensor '{name}' is of the type {dtypes[name]!r}, which no tables have")
        num_bytes = dtype.itemsize * math.prod(shapes[name])
        if place != (end, end + num_bytes):
            raise ValueError(f"its header is damaged: the tensor '{name}' is not where it should be")
        # Plain arrays, which unlike those of numpy.memmap cost nothing to take parts of.
        part = whole[start + end : start + end + num_bytes].view(numpy.ndarray)
        if (start + end) % dtype.itemsize:  # as no file that safetensors wrote is
            part = part.copy()
        arrays[name] = part.view(dtype).reshape(shapes[name])
        end += num_bytes
    if start + end != size:
        raise ValueError(
            f"it has {size:,} bytes, but its header is of a file of {start + end:,}: it was cut or damaged"
        )
    return File(described, arrays, dtypes)


def _size(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**60:
        raise TypeError
    return value


def _described(metadata: Any, key: str) -> dict[str, Any]:
    text = metadata.get(key) if isinstance(metadata, dict) else None
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except RecursionError:
        raise ValueError("the brackets of its plan are nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it holds no plan")
    return found


class _Stored:
    """What a file has stored, read row by row.

    ``xp`` is the library of arrays; that of PyTorch has the same names for all that is needed here.
    """

    xp: Any = numpy
    _arrays: Mapping[str, Any]
    _slabs: Mapping[str, Any]

    def _code(self, name: str, place: Any, column: int = 0) -> Any:
        """Integers of a buffer ``[n]`` or ``[n, columns]``."""
        code = self._arrays[name]
        return self.xp.asarray(code.reshape(code.shape[0], -1)[place, column], dtype=self.xp.int64)

    def _rows(self, name: str, rows: Any) -> Any:
        """Rows ``[N, width]`` of a slab in float32, counted from its first one."""
        return self._unpacked(self._slabs[name], rows)

    def _unpacked(self, slab: Mapping[str, Any], rows: Any) -> Any:
        xp, width, bits = self.xp, slab["width"], slab["bits"]
        stored = self._arrays[slab["weight"]]
        # The values of a sparse matrix are a list.
        stored = stored.reshape(len(stored), -1)
        if slab["kind"] == "floats":
            return self._floats(stored[slab["unit"] + rows])
        # Rows of one scalar share a byte, of which the first one has the lowest bits; others begin with a byte.
        together = 8 // bits if width == 1 else 1
        units = xp.asarray(stored[slab["unit"] + rows // together], dtype=xp.int32)
        if width == 1:
            fields = units >> xp.asarray(rows % together * bits, dtype=xp.int32)[:, None]
        else:
            columns = [units[:, j * bits // 8] >> j * bits % 8 for j in range(width)]
            fields = xp.stack(columns, 1)
        fields = fields & 2**bits - 1
        if slab["scales"] is None:
            # Behind the scalars of each row: bfloat16, the lower byte first.
            joined = units[:, -2 * slab["num_scales"] :: 2] | units[:, 1 - 2 * slab["num_scales"] :: 2] << 8
            scales = (joined << 16).view(xp.float32)
        else:
            share = slab["rows_per_scale"]  # 0: all rows of the slab
            scales = self._floats(self._arrays[slab["scales"]][slab["block"] + (rows // share if share else rows * 0)])
        if slab["kind"] == "integers":
            zero = 2.0 ** (bits - 1) - (0 if bits > 2 else 0.5)
            return (xp.asarray(fields, dtype=xp.float32) - zero) * scales
        signs = ((xp.asarray(fields >> j & 1, dtype=xp.float32) - 0.5) * scales[:, j, None] for j in range(bits))
        return reduce(lambda a, b: a + b, signs)

    def _floats(self, stored: Any) -> Any:
        """Numbers of any type in float32; 16-bit integers stand for bfloat16."""
        xp = self.xp
        if stored.dtype == xp.int16:
            return (xp.asarray(stored, dtype=xp.int32) << 16).view(xp.float32)
        return xp.asarray(stored, dtype=xp.float32)

    # ---- sparse matrices -------------------------------------------------------------------------------------------

    def _sparse(self, sparse: Mapping[str, Any], ranks: Any, dim: int) -> Any:
        """Rows ``[N, D]`` of a matrix of which some entries are stored, in the order of rows and columns."""
        xp, rows, form = self.xp, sparse["first"] + ranks, sparse["form"]
        vectors = xp.zeros((len(rows), dim), dtype=xp.float32)
        if form == "bitmap":
            self._set_bits(sparse, rows, vectors)
            return vectors
        if form == "compressed rows":
            start, end = self._code(sparse["pointers"], rows), self._code(sparse["pointers"], rows + 1)
        else:
            ids = self._arrays[sparse["ids"]]
            wanted = xp.asarray(rows, dtype=ids.dtype)
            start, end = xp.searchsorted(ids, wanted, side="left"), xp.searchsorted(ids, wanted, side="right")
        for number in range(int((end - start).max()) if len(rows) else 0):
            there = end - start > number
            place = start[there] + number
            vectors[there, self._code(sparse["columns"], place)] = self._unpacked(sparse["values"], place)[:, 0]
        return vectors

    def _set_bits(self, sparse: Mapping[str, Any], rows: Any, vectors: Any) -> None:
        """Entries that a bit of a bitmap says are there: the n-th bit that is set is that of value n."""
        xp, dim = self.xp, vectors.shape[1]
        bitmap, block = self._arrays[sparse["bitmap"]], rows * dim // (64 * _WORDS)
        position = self._code(sparse["directory"], block)  # bits that are set before the block
        within = rows * dim - block * (64 * _WORDS)
        for word in range(_WORDS):
            below = xp.clip(within - 64 * word, 0, 64)
            # Shifts stay below 64.
            mask = ~(xp.full_like(below, -1) << below // 2 << below - below // 2)
            position = position + _count(bitmap[block * _WORDS + word] & mask)
        for column in range(dim):
            bit = rows * dim + column
            there = bitmap[bit // 64] >> bit % 64 & 1 == 1
            vectors[there, column] = self._unpacked(sparse["values"], position[there])[:, 0]
            position = position + xp.asarray(there, dtype=xp.int64)


class NumpyTables(_Stored):
    """The tables of a served file, which stays mapped into memory: processes share what they read of it.

    Args:
        path: of the file.

    Attributes:
        tables: ``{name: configuration}``, as the fields of :class:`embtables.TableConfig`.

    Raises:
        OSError: where the file cannot be opened.
        ValueError: naming the file, where it holds no tables that can be looked up. Checksums are not looked at: a
            damaged number gives a wrong vector or an ``IndexError``.
    """

    def __init__(self, path: Path | str) -> None:
        try:
            described, arrays = self._open(path)
            lookups = described.get(LOOKUPS)
            if not isinstance(lookups, dict):
                raise ValueError("it was written before files said how they are looked up: load and save it again")
            if lookups.get("version") != LOOKUPS_VERSION:
                raise ValueError(
                    f"its lookups are of version {lookups.get('version')!r}, and this reads {LOOKUPS_VERSION}"
                )
            self.tables: dict[str, dict[str, Any]] = {table["name"]: table for table in described["tables"]}
            self._recipes, self._slabs = lookups["tables"], lookups["slabs"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no embedding tables that can be read: it lacks {error}") from None
        except ValueError as error:
            raise ValueError(f"{path} holds no embedding tables that can be read: {error}") from None
        self._arrays = arrays

    def _open(self, path: Path | str) -> tuple[dict[str, Any], Mapping[str, Any]]:
        file = open_file(path)
        return file.described, file.arrays

    # ---- looking up ------------------------------------------------------------------------------------------------

    def lookup(self, table: str, ids: Any) -> Any:
        """The vectors ``[N, D]`` in float32 of ids ``[N]``; those of padding are zeros.

        Raises:
            KeyError: for an unknown table.
            IndexError: for an id out of range, where the table refuses those.
            ValueError: for a table that a method's own code looks up, which is in no file.
        """
        xp, config, found = self.xp, self.tables[table], self._recipes[table]
        if found["recipe"] is None:
            raise ValueError(f"table '{table}' is looked up by its method's own code, which no file holds")
        ids = xp.asarray(ids, dtype=xp.int64)
        ids = self._in_range(ids, config, found["fold_seed"])
        vectors = self._vectors(found["recipe"], self._ranks(found["recipe"], ids), ids, config["embedding_dim"])
        if config["padding_idx"] is not None:
            vectors[ids == config["padding_idx"]] = 0
        return vectors

    def pooled(self, table: str, ids: Any, offsets: Any, pooling: str = "", weights: Any = None) -> Any:
        """The sum or mean of the vectors of each bag, ``[B, D]`` in float32; of an empty bag zeros.

        Args:
            table: its name.
            ids: ``[N]``, those of all bags one after another.
            offsets: ``[B + 1]``, where each bag begins, and where the last one ends.
            pooling: ``"sum"`` or ``"mean"``, by default the table's own. A mean is that of the ids that are no padding.
            weights: ``[N]``, a factor for each id.

        Raises:
            KeyError, IndexError, ValueError: as ``lookup``.
        """
        xp, config = self.xp, self.tables[table]
        ids, offsets = xp.asarray(ids, dtype=xp.int64), xp.asarray(offsets, dtype=xp.int64)
        vectors = self.lookup(table, ids)
        if weights is not None:
            vectors = vectors * xp.asarray(weights, dtype=xp.float32)[:, None]
        start, end = offsets[:-1], offsets[1:]
        sums = xp.zeros((len(start), config["embedding_dim"]), dtype=xp.float32)
        for number in range(int((end - start).max()) if len(start) else 0):
            there = end - start > number
            sums[there] = sums[there] + vectors[start[there] + number]
        if (pooling or config["pooling"]) == "sum":
            return sums
        counts = end - start
        if config["padding_idx"] is not None:
            before = xp.cumsum(xp.asarray(ids != config["padding_idx"], dtype=xp.int64), 0)
            before = xp.concatenate([xp.zeros(1, dtype=xp.int64), before])
            counts = before[end] - before[start]
        return sums / xp.asarray(xp.clip(counts, 1, None), dtype=xp.float32)[:, None]

    def _in_range(self, ids: Any, config: Mapping[str, Any], seed: int) -> Any:
        size, padding = config["num_embeddings"], config["padding_idx"]
        if size is None:
            return ids
        out = (ids < 0) | (ids >= size)
        if not bool(out.any()):
            return ids
        if config["on_out_of_range"] == "oov":
            return self.xp.where(out, size, ids)
        if config["on_out_of_range"] != "hash":
            raise IndexError(f"id {int(ids[out][0])} is out of range: table '{config['name']}' has ids 0 … {size - 1}")
        folded = _to_range(_mixed(ids ^ seed), size)
        if padding is not None:  # an id that means something must not become one that means nothing
            folded = self.xp.where(folded == padding, (folded + 1) % size, folded)
        return self.xp.where(out, folded, ids)

    def _ranks(self, recipe: Mapping[str, Any], ids: Any) -> Any:
        ranks = recipe["ranks"]
        return ids if ranks is None else self._code(ranks["code"], ranks["first"] + ids)

    # ---- combining -------------------------------------------------------------------------------------------------

    def _vectors(self, recipe: Mapping[str, Any], ranks: Any, ids: Any, dim: int) -> Any:
        """``[N, D]``; addresses are those of ``ranks``, signs those of ``ids``."""
        xp, combine, addresses = self.xp, recipe["combine"], recipe["addresses"]
        if combine == "alternatives":
            return self._alternatives(recipe, ranks, ids, dim)
        if combine == "sparse":
            return self._sparse(recipe["sparse"], ranks, dim)
        if not addresses:
            return xp.zeros((len(ids), dim), dtype=xp.float32)
        if addresses[0]["kind"] == "listed":
            vectors = self._list(addresses[0], ranks, combine)
        else:
            parts = [self._values(address, ranks, ids) for address in addresses]
            if combine == "concat":
                vectors = xp.concatenate([*parts, xp.zeros((len(ids), recipe["zeros"]), dtype=xp.float32)], 1)
            elif combine == "product":
                vectors = reduce(lambda a, b: a * b, parts)
            else:
                vectors = reduce(lambda a, b: a + b, parts)
                vectors = vectors / len(parts) if combine == "mean" else vectors
        for name in (recipe["inner"], recipe["projection"]):
            vectors = vectors if name is None else self._projected(vectors, name)
        if addresses[0]["kind"] == "listed":  # products with zeros may be −0
            vectors[self._bounds(addresses[0], ranks)[1] == 0] = 0
        return vectors

    def _projected(self, rows: Any, name: str) -> Any:
        """The products of rows ``[N, width]`` with a matrix ``[width, D]``."""
        matrix = self.xp.asarray(self._arrays[name], dtype=self.xp.float32)
        return reduce(lambda a, b: a + b, (rows[:, j, None] * matrix[j] for j in range(len(matrix))))

    def _alternatives(self, recipe: Mapping[str, Any], ranks: Any, ids: Any, dim: int) -> Any:
        vectors, first = self.xp.zeros((len(ids), dim), dtype=self.xp.float32), 0
        for address in recipe["addresses"]:
            rows = self._slabs[address["slab"]]["rows"]
            there = (ranks >= first) & (ranks < first + rows)
            found = self._rows(address["slab"], ranks[there] - first)
            vectors[there] = found if address["projection"] is None else self._projected(found, address["projection"])
            first += rows
        if recipe["rest"] is not None:
            there = ranks >= first
            vectors[there] = self._vectors(recipe["rest"], ranks[there] - first, ids[there], dim)
        return vectors

    def _bounds(self, address: Mapping[str, Any], ranks: Any) -> tuple[Any, Any]:
        """Where the list of each id begins, and how many rows it has."""
        place = address["first"] + ranks
        start = self._code(address["offsets"], place)
        return start, self.xp.clip(self._code(address["offsets"], place + 1) - start, 0, address["longest"])

    def _list(self, address: Mapping[str, Any], ranks: Any, combine: str) -> Any:
        """The sum or mean of the rows that each id has a list of."""
        xp, (start, lengths) = self.xp, self._bounds(address, ranks)
        vectors = xp.zeros((len(ranks), self._slabs[address["slab"]]["width"]), dtype=xp.float32)
        for number in range(int(lengths.max()) if len(ranks) else 0):
            there = lengths > number
            found = self._rows(address["slab"], self._code(address["values"], start[there] + number))
            vectors[there] = vectors[there] + found if number else found
        if combine == "sum":
            return vectors
        return vectors / xp.asarray(xp.clip(lengths, 1, None), dtype=xp.float32)[:, None]

    # ---- addresses -------------------------------------------------------------------------------------------------

    def _values(self, address: Mapping[str, Any], ranks: Any, ids: Any) -> Any:
        """The values ``[N, width]`` at an address, each times its sign."""
        xp, kind, slab = self.xp, address["kind"], address["slab"]
        size = self._slabs[slab]["rows"]
        if kind == "row":
            rows = address["first"] + ranks
        elif kind == "digit":
            rows = ranks // address["divisor"] % size
        elif kind == "capped":
            rows = xp.clip(ranks, None, size - 1)
        elif kind == "coded":
            rows = self._code(address["code"], address["first"] + ranks, address["column"])
        elif kind in ("hashed", "circular_block"):
            rows = _to_range(_mixed(ranks ^ address["seed"]), size)
        else:
            rows = self._balanced(address, ranks, size)
        if kind in ("circular_block", "balanced_block"):
            scalars = [self._rows(slab, (rows + offset) % size) for offset in range(address["scalars"])]
            values = xp.concatenate(scalars, 1)
        else:
            values = self._rows(slab, rows)
        if address.get("sign_seed") is None:
            return values
        positive = _mixed(ids ^ address["sign_seed"]) >> 62 & 1
        return values * xp.asarray(positive * 2 - 1, dtype=xp.float32)[:, None]

    def _balanced(self, address: Mapping[str, Any], ranks: Any, size: int) -> Any:
        """Ids lie side by side around a circle of ``size`` rows, each turn displaced by a fraction of the circle."""
        scalars = address.get("scalars", 1)
        number, place = ranks // (size // scalars), ranks % (size // scalars)
        fraction = number * address["turn"] + address["start"]
        if size < 2**31:
            displaced = (fraction >> 32 & 2**32 - 1) * size >> 32
        else:
            displaced = (fraction >> 2 & 2**62 - 1) % size
        return (place * scalars + displaced) % size


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _mixed(x: Any) -> Any:
    """The finalizer of splitmix64. Products of 64-bit integers wrap; a logical shift is a shift and a mask."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30 & 2**34 - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & 2**37 - 1)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & 2**33 - 1)


def _to_range(hashed: Any, size: int) -> Any:
    """⌊u · size / 2⁶²⌋ of the upper 62 bits u of a hash, in two exact steps; from 2³² on u mod size."""
    if size >= 2**32:
        return (hashed >> 2 & 2**62 - 1) % size
    high, low = hashed >> 33 & 2**31 - 1, hashed >> 2 & 2**31 - 1
    return (high * size + (low * size >> 31)) >> 31


def _count(words: Any) -> Any:
    """How many bits are set in each of 64: in pairs, nibbles and bytes, whose sum ends up in the top byte."""
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    return ((words + (words >> 4) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101) >> 56
