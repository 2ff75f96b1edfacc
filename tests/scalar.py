"""Every method's lookup once more: one id at a time, with Python's integers and floats, from the published formulas.

Nothing here is taken from the package but what a plan says about sizes; it is what tests compare with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import prod

from packed_rows import slab_of
from torch import Tensor

from embtables import EmbeddingTables

MASK = 2**64 - 1


def mix64(x: int) -> int:
    """splitmix64's output for the state before ``x``."""
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def bucket(hashed: int, size: int) -> int:
    """The upper 62 bits as a fraction of ``size``; above 2**32 modulo."""
    upper = hashed >> 2
    return upper * size >> 62 if size < 2**32 else upper % size


def seed_of(hash_seed: int, *key: str | int) -> int:
    text = "\x1f".join(map(str, (hash_seed, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def sign_of(x: int, seed: int) -> float:
    return 1.0 if mix64((x ^ seed) & MASK) >> 62 & 1 else -1.0


def hash_address(x: int, hash_seed: int, table: str, lookup: int, size: int) -> int:
    return bucket(mix64((x ^ seed_of(hash_seed, table, "row", lookup)) & MASK), size)


GOLDEN_SECTION = 0x9E3779B97F4A7C15  # of 2**64


def turn_of(hash_seed: int, table: str, lookup: int) -> int:
    return (seed_of(hash_seed, table, "turn") + lookup * GOLDEN_SECTION) & MASK


def balanced_row(x: int, start: int, turn: int, size: int, scalars: int = 1) -> int:
    """The first row of id x, ids being laid side by side in turns of a circle of ``size`` rows."""
    number, place = divmod(x, size // scalars)
    fraction = (start + number * turn) & MASK
    displaced = (fraction >> 32) * size >> 32 if size < 2**31 else (fraction >> 2) % size
    return (place * scalars + displaced) % size


def balanced_address(x: int, hash_seed: int, table: str, lookup: int, size: int, scalars: int = 1) -> int:
    start, turn = seed_of(hash_seed, table, "row", lookup), turn_of(hash_seed, table, lookup)
    return balanced_row(x, start, turn, size, scalars)


def vector(
    tables: EmbeddingTables,
    name: str,
    x: int,
    counts: Sequence[int] | None = None,
    slabs: dict[str, Tensor] | None = None,
) -> list[float]:
    """The vector of one id of a table, from the weights that ``tables`` holds and the sizes in its plan.

    ``counts`` are the frequencies that the plan was made with, for methods that go by rank; ``slabs``: those that have
    been read already, where several vectors are asked for.
    """
    slabs = {} if slabs is None else slabs
    solved = tables.plan
    g = next(g for g in solved.groups if any(t.name == name for t in g.group.tables))
    dim = next(t.embedding_dim for t in g.group.tables if t.name == name)
    entry, method, seed = g.layout.entries[name], g.method, solved.hash_seed
    variant, asked = entry.variant, x

    def stored(slab: str) -> Tensor:
        if slab not in slabs:
            slabs[slab] = slab_of(tables, slab)
        return slabs[slab]

    def row(slab: str, index: int) -> list[float]:
        return [float(v) for v in stored(slab)[index]]

    if method.kind == "hot_cold" and variant != "full":
        x = rank_of(x, counts if "ranks_from" in entry.values else None)
        hot, method, variant = entry.values["hot_rows"], method.cold, variant.removeprefix("hot, cold ")  # type: ignore[attr-defined]
        if x < hot:
            return row(f"{name}/hot", x)
        x -= hot
    config, kind = method.model_dump(), method.kind
    if variant == "full":
        return row(name, x)
    size = entry.values.get("rows")

    def address(lookup: int, rows: int, scalars: int = 1) -> int:
        """Where the values of one lookup begin."""
        if entry.values.get("addressing") == "balanced":
            return balanced_address(x, seed, name, lookup, rows, scalars)
        return hash_address(x, seed, name, lookup, rows)

    if kind == "hash":
        return row(name, address(0, size))
    if kind == "multi_hash":
        lookups = range(config["num_hashes"])
        addresses = [address(j, size) for j in lookups]
        if config["operation"] == "concat":
            return [v for j in lookups for v in row(f"{name}/{j}", addresses[j])]
        signs = [sign_of(asked, seed_of(seed, name, "sign", j)) if config["signs"] else 1.0 for j in lookups]
        total = [sum(s * v for s, v in zip(signs, column)) for column in zip(*(row(name, a) for a in addresses))]
        return [v / len(lookups) for v in total] if config["operation"] == "mean" else total
    if kind == "unified":
        rows, width = stored(g.group.name).shape
        return [v for j in range(dim // width) for v in row(g.group.name, address(j, rows))]
    if kind == "robe":
        array = stored(g.group.name).flatten()
        found = []
        for coordinate in range(dim):
            block, offset = divmod(coordinate, config["block_size"])
            scalars = min(config["block_size"], dim - block * config["block_size"])
            place = (address(block, len(array), scalars) + offset) % len(array)
            sign = sign_of(asked, seed_of(seed, name, "sign", block)) if config["signs"] else 1.0
            found.append(sign * float(array[place]))
        return found
    if kind == "compositional":
        parts, quotient = [], x
        default = "chinese_remainder" if config["operation"] == "concat" else "quotient_remainder"
        for j, radix in enumerate(size):
            parts.append(row(f"{name}/{j}", quotient % radix))
            if (config["radices"] or default) == "quotient_remainder":
                quotient //= radix
        if config["operation"] == "concat":
            return [v for part in parts for v in part]
        return [sum(c) if config["operation"] == "add" else prod(c) for c in zip(*parts)]
    if kind in ("mixed_dimension", "banded"):
        rank, block = rank_of(x, counts if "by_rank" in variant else None), 0
        while block < len(size) and rank >= size[block]:
            rank, block = rank - size[block], block + 1
        if block == len(size):
            return [0.0] * dim
        width = entry.values["widths"][block]
        narrow = row(f"{name}/{block}", rank)
        if width == dim:
            return narrow
        projection = tables.store.extra(f"{g.group.name}/projection_{width}_{dim}").tolist()
        return [sum(narrow[i] * projection[i][c] for i in range(width)) for c in range(dim)]
    if kind == "fewer_dimensions":
        width, narrow = entry.values["width"], row(name, x)
        if not config["projection"]:
            return narrow + [0.0] * (dim - width)
        projection = tables.store.extra(f"{g.group.name}/projection_{width}_{dim}").tolist()
        return [sum(narrow[i] * projection[i][c] for i in range(width)) for c in range(dim)]
    if kind == "matryoshka":
        return row(name, x)[: entry.values["width"]] + [0.0] * (dim - entry.values["width"])
    if kind == "low_rank":
        found = row(f"{name}/rows", x)
        # Folded already, where it is served.
        factors = [extra for extra in (f"{name}/fold", f"{name}/basis") if extra in tables.store.extra_shapes()]
        for matrix in (tables.store.extra(factor).tolist() for factor in factors):
            found = [sum(v * line[c] for v, line in zip(found, matrix)) for c in range(len(matrix[0]))]
        return found
    if kind == "frequency_cutoff":
        return row(name, min(rank_of(x, counts if "by_rank" in variant else None), entry.values["own_rows"]))
    if kind == "drop_feature":
        return [0.0] * dim
    raise NotImplementedError(kind)


def rank_of(x: int, counts: Sequence[int] | None) -> int:
    """How many ids are more frequent; of equals the smaller id comes first. Without counts ids are ranks."""
    if counts is None:
        return x
    return sum(c > counts[x] or (c == counts[x] and i < x) for i, c in enumerate(counts))
