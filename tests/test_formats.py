"""Sizes follow from the row format alone: the methods are fitted to formats that they have never heard of."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import pytest
import torch
from core_cases import all_methods, counted_bytes, falling_counts, in_turn, method_id, projects, shuffled_counts

from embtables import Plan, TableConfig, plan
from embtables.formats import FORMATS, FP32, RowFormat, row_format
from embtables.lookup.store import Store
from embtables.methods import Method, from_config
from embtables.sizes.layout import Form, Group, Layout, Slab

Expected: TypeAlias = Callable[[int, int], int]


def packed(bits: int, scales: int = 1, share: int | None = None) -> Expected:
    """The bytes of packed rows, written out once more; ``share`` 0: one scale for all."""

    def expected(rows: int, width: int) -> int:
        weights = (rows * bits + 7) // 8 if width == 1 else rows * ((width * bits + 7) // 8)
        own = (width * bits + 7) // 8 >= 8 * scales
        together = share if share is not None else 1 if own else 64
        return weights + 2 * scales * ((rows + together - 1) // together if together else min(rows, 1))

    return expected


# Each with its bytes, written out once more.
EXPECTED: list[tuple[RowFormat, Expected]] = [
    (row_format("fp32"), lambda rows, width: 4 * rows * width),
    (row_format("fp16"), lambda rows, width: 2 * rows * width),
    (row_format("bf16"), lambda rows, width: 2 * rows * width),
    (row_format("int8"), packed(8)),
    (row_format("int4"), packed(4)),
    (row_format("int2"), packed(2)),
    (row_format("binary"), packed(1)),
    (row_format("binary2"), packed(2, scales=2)),
    (row_format("binary4"), packed(4, scales=4)),
    (row_format("int8/slab"), packed(8, share=0)),
    (row_format("int4/1"), packed(4, share=1)),
    (row_format("int4/7"), packed(4, share=7)),
    # One that no method has heard of.
    (RowFormat("byte", "uint8"), lambda rows, width: rows * width),
]
EVERY_FORMAT = pytest.mark.parametrize(("rows_in", "expected"), EXPECTED, ids=[rows_in.name for rows_in, _ in EXPECTED])
TABLES = (TableConfig("a", 9000, 16), TableConfig("b", 4000, 10), TableConfig("c", 12, 4), TableConfig("d", 700, 16))
# Ids in the order of their frequency, and some that need a remap.
COUNTS = (falling_counts(9000), shuffled_counts(4000), falling_counts(12), falling_counts(700))
# Those that leave less than a row of the budget.
FINE = ("hash", "multi_hash", "unified", "robe", "frequency_cutoff")
BYTES = {rows_in.name: expected for rows_in, expected in EXPECTED}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "byte", EXPECTED[-1][0])


def full_bytes(expected: Expected) -> int:
    return sum(expected(t.rows or 0, t.embedding_dim) for t in TABLES)


def in_full(layout: Layout, table: TableConfig) -> bool:
    """Whether a table is served in full, with rows of all its columns."""
    entry = layout.entries[table.name]
    return entry.variant == "full" or (entry.variant == "nested" and entry.values["width"] == table.embedding_dim)


def fitted(method: Method, group: Group, limit: int, expected: Expected) -> Layout:
    """The layout for this many bytes, which are those of its rows in the group's format, or in those of bands."""
    layout = method.fit(group, limit)
    form = layout.serving
    others = sum(item.num_bytes for item in (*form.extras, *form.codes))
    assert method.kind == "banded" or all(slab.format == group.format.name for slab in form.slabs)
    assert form.num_bytes == sum(BYTES[s.format](s.rows, s.width) for s in form.slabs) + others <= limit
    return layout


@EVERY_FORMAT
@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_the_floor_is_the_least_layout(method: Method, rows_in: RowFormat, expected: Expected) -> None:
    """What the floor says is what the least layout takes, and nobody could do with less."""
    group = Group("g", TABLES, COUNTS, 0, rows_in)
    floor, full = method.floor(group).num_bytes, full_bytes(expected)
    assert group.full_bytes == full
    assert fitted(method, group, floor, expected).serving.num_bytes == floor <= full


@pytest.mark.parametrize(
    ("method", "rows_in", "expected"),
    [
        pytest.param(method, *each, id=f"{method_id(method)}-{each[0].name}")
        for method, each in in_turn([m for m in all_methods() if m.kind != "full"], EXPECTED, 3)
    ],
)
def test_methods_fit_every_format(method: Method, rows_in: RowFormat, expected: Expected) -> None:
    group = Group("g", TABLES, COUNTS, 0, rows_in)
    floor, full = method.floor(group).num_bytes, full_bytes(expected)
    near = [int(n) for n in np.geomspace(max(1, floor), full, 12)]
    limits = sorted({max(n + more, floor) for n in near for more in (0, 1, 40)})
    layouts = {limit: fitted(method, group, limit, expected) for limit in limits}
    for less, more in pairwise(layouts.values()):
        assert less.serving.num_bytes <= more.serving.num_bytes
    for limit, layout in layouts.items():
        if method.kind in FINE and limit < full:
            assert limit - layout.serving.num_bytes < 2 * expected(1, 16)
        if method.kind == "mixed_dimension":
            # These very bytes give it again: none of its steps is thought to be larger than it is.
            assert fitted(method, group, layout.serving.num_bytes, expected) == layout
        if method.kind == "pruned" and 1000 < limit < full:
            assert layout.serving.num_bytes >= 0.95 * limit
            assert {c.dtype for c in layout.serving.codes if c.name.endswith("/values")} <= {rows_in.dtype}
        if limit >= full:
            assert all(in_full(layout, table) for table in TABLES)
            assert layout.serving.num_bytes == full


@pytest.mark.parametrize(
    "method",
    [m for m in all_methods() if m.kind not in ("pruned", "banded", "hot_cold") and not projects(m)],
    ids=method_id,
)
def test_a_quarter_of_the_bytes_a_scalar_is_four_times_the_budget(method: Method) -> None:
    # Nothing but rows: the index of a pruned table, remaps and projections cost the same in every format. Nor bytes
    # that are divided in some proportion, as between hot and cold rows, which is rounded to whole ones.
    counts = tuple(falling_counts(t.rows or 0) for t in TABLES)
    large, small = (Group("g", TABLES, counts, 0, rows_in) for rows_in in (FP32, FORMATS["byte"]))
    floor = method.floor(small).num_bytes
    assert 4 * floor == method.floor(large).num_bytes
    limits = np.geomspace(max(1, floor), 1.1 * small.full_bytes, 30).astype(int).tolist()
    # And to the byte, where a table that costs next to nothing begins to be kept in full.
    budgets = range(floor, small.full_bytes + 1)
    first = budgets[bisect_left(budgets, True, key=lambda n: in_full(method.fit(small, n), TABLES[2]))]
    for limit in [*limits, max(floor, first - 1), first]:
        one, other = method.fit(large, 4 * limit), method.fit(small, limit)
        assert one.entries == other.entries
        assert one.training == other.training and one.serving.num_bytes == 4 * other.serving.num_bytes


def test_rows_of_their_own_go_where_a_byte_serves_most() -> None:
    # A scale counts for more in the narrower row.
    tables = (TableConfig("wide", 2000, 16), TableConfig("narrow", 2000, 1))
    count = falling_counts(2000)
    group = Group("g", tables, (count, 3 * count), 0, row_format("int8/1"))
    for limit in range(500, 60_000, 1500):
        slabs = from_config("frequency_cutoff").fit(group, limit).serving.slabs
        by_byte = [np.append(c[:-1], 0) / (s.width + 2) for c, s in zip((count, 3 * count), slabs)]
        kept = min((worth[s.rows - 2] for worth, s in zip(by_byte, slabs) if s.rows > 1), default=np.inf)
        assert kept >= max(worth[s.rows - 1] for worth, s in zip(by_byte, slabs))


@pytest.mark.parametrize("name", ["int8", "int2/slab", "bf16", "fp32"])
def test_what_is_stored_takes_the_bytes_that_are_planned(name: str) -> None:
    group = Group("g", TABLES, COUNTS, 0, row_format(name))
    form = from_config("compositional").fit(group, group.full_bytes // 3).serving
    store = Store([form, Form((Slab("other", 30, 16), Slab("and_another", 7, 4)))], None, trainable=False)
    assert counted_bytes(store) == form.num_bytes + 4 * (30 * 16 + 7 * 4)
    for slab in form.slabs:
        store.write_slab(slab.name, torch.ones(slab.rows, slab.width))
        assert store.read_slab(slab.name).shape == (slab.rows, slab.width)
    kind = "" if name == "fp32" else f"{name.replace('/', '_per_')}_"
    names = {"weight_16", "weight_4"} | {f"weight_{kind}{s.width}" for s in form.slabs}
    # Those of int8 stand in the rows where these are wide enough to have their own.
    apart = {"int8": 8, "int2/slab": 2**62}.get(name, 0)
    scales = {f"scales_{kind}{s.width}" for s in form.slabs if s.width < apart}
    assert set(store.weight_names) == names and set(store.state_dict()) == names | scales
    assert store.slab("other").dtype == torch.float32


def test_fp32_is_not_written_out_and_other_formats_are_read_back() -> None:
    solved = plan(TABLES, "hash", "20%")
    assert "precision" not in solved.to_dict()["groups"][0]["method"]
    assert all(set(slab) == {"name", "rows", "width"} for slab in solved.groups[0].layout.training.to_dict()["slabs"])
    for precision in ("int4", "int4/7"):
        packed = plan(TABLES, "pruned", 50_000, precision=precision)
        again = Plan.from_dict(json.loads(json.dumps(packed.to_dict())))
        assert again == packed and again.groups[0].group.format == row_format(precision)
        assert again.fingerprint == packed.fingerprint != plan(TABLES, "pruned", 50_000).fingerprint
        assert again.inference_bytes == packed.inference_bytes


@pytest.mark.parametrize("where", ["method", "slab"])
def test_an_unknown_format_is_named(where: str) -> None:
    data = json.loads(json.dumps(plan(TABLES, "hash", "20%").to_dict()))
    group = data["groups"][0]
    if where == "method":
        group["method"]["precision"] = "fp7"
    else:
        group["layout"]["training"]["slabs"][0]["format"] = "fp7"
    with pytest.raises(ValueError, match="unknown precision 'fp7'; there are: fp32, fp16, .*binary4, byte$"):
        Plan.from_dict(data).inference_bytes  # noqa: B018


@EVERY_FORMAT
def test_the_most_rows_within_a_limit(rows_in: RowFormat, expected: Expected) -> None:
    for width in (1, 2, 5, 16):
        for limit in range(expected(0, width), 500):
            rows = rows_in.rows_within(limit, width)
            assert expected(rows, width) <= limit < expected(rows + 1, width)
        assert rows_in.rows_within(expected(0, width) - 1, width) < 0
