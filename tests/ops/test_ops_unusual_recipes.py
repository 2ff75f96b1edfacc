"""What is unusual: recipes that no method of ours has, other default types and devices, weights that are no numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from native_cases import BACKENDS, NATIVE, run_each
from torch import Tensor

from embtables import EmbeddingTables, TableConfig, ops, plan
from embtables.extend import (
    Capped,
    CircularBlock,
    Digit,
    Entry,
    Extra,
    Floor,
    Form,
    Group,
    Hashed,
    Initializer,
    Layout,
    Listed,
    Method,
    Range,
    Ranks,
    Recipe,
    Row,
    Store,
    TableEntry,
    concat,
)
from embtables.lookup.recipe_block import RecipeBlock
from embtables.optimizers import SGD, Adagrad, FusedOptimizer, RowWiseAdagrad

BACKEND = pytest.mark.parametrize("backend", BACKENDS)


class AnyRecipe(Method):
    """Slabs, by name with their rows and widths, extras, and each table's recipe, as a test sets them."""

    kind: ClassVar[str] = "any_recipe"
    needs_budget: ClassVar[bool] = False
    slabs: ClassVar[Mapping[str, tuple[int, int]]]
    extras: ClassVar[Mapping[str, tuple[int, ...]]]
    recipes: ClassVar[Mapping[str, Recipe]]

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        """Raw ids too."""

    def floor(self, group: Group) -> Floor:
        return Floor(self.fit(group, 0).serving.num_bytes, "all of it")

    def fit(self, group: Group, limit: int) -> Layout:
        slabs = tuple(group.slab(name, *shape) for name, shape in self.slabs.items())
        extras = tuple(Extra(name, shape) for name, shape in self.extras.items())
        return Layout.of({table.name: Entry("any") for table in group.tables}, Form(slabs, extras))

    def recipe(self, entry: TableEntry, group: Group) -> Recipe:
        return self.recipes[entry.table.name]

    def initialize(self, layout: Layout, group: Group, store: Store, init: Initializer) -> None:
        for slab in layout.training.slabs:
            store.slab(slab.name).normal_(generator=init.generator(slab.name))
        for extra in layout.training.extras:
            store.extra(extra.name).normal_(generator=init.generator(extra.name))


def make(
    monkeypatch: pytest.MonkeyPatch,
    recipes: Mapping[TableConfig, Recipe],
    slabs: Mapping[str, tuple[int, int]],
    extras: Mapping[str, tuple[int, ...]] | None = None,
    optimizer: FusedOptimizer | None = None,
) -> EmbeddingTables:
    monkeypatch.setattr(AnyRecipe, "slabs", slabs, raising=False)
    monkeypatch.setattr(AnyRecipe, "extras", extras or {}, raising=False)
    monkeypatch.setattr(AnyRecipe, "recipes", {t.name: recipe for t, recipe in recipes.items()}, raising=False)
    raw = any(table.num_embeddings is None for table in recipes)
    return EmbeddingTables(plan(list(recipes), AnyRecipe(), "1MB" if raw else None, optimizer=optimizer), seed=1)


def gradient_like(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(5))


@BACKEND
@pytest.mark.parametrize("width", [9, 5000])
def test_rows_wider_than_the_vectors_that_are_made_of_them(
    width: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, ids = TableConfig("a", 50, 4), torch.arange(64).remainder(50).unsqueeze(1)
    recipes, shapes = {table: concat(Row("rows"), projection="p")}, ({"rows": (50, width)}, {"p": (width, 4)})
    tables = make(monkeypatch, recipes, *shapes, SGD(lr=0.25))
    rows, matrix = (t.detach().double().requires_grad_() for t in (tables.store.slab("rows"), tables.store.extra("p")))
    with ops.using(backend):
        out = tables(ids)
        out.backward(gradient_like(out))
    expected = rows[ids[:, 0]] @ matrix
    expected.backward(gradient_like(out).double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    for leaf, tensor in ((rows, tables.store.slab("rows")), (matrix, tables.store.extra("p"))):
        assert leaf.grad is not None
        torch.testing.assert_close(tensor.double(), (leaf - 0.25 * leaf.grad).detach(), rtol=1e-4, atol=1e-4)


def test_which_vectors_are_rows_as_they_stand_there(monkeypatch: pytest.MonkeyPatch) -> None:
    slabs = {"rows": (50, 4), "narrow": (50, 3), "scalars": (50, 1)}
    store = make(monkeypatch, {TableConfig("a", 50, 4): concat(Row("rows"))}, slabs, {"p": (4, 4)}, SGD()).store
    rows = [
        concat(Row("rows")),
        concat(Capped("rows")),
        concat(Hashed("rows", 1)),
        Recipe("mean", (Digit("rows", 5),), ranks=Ranks("code")),
    ]
    others = [
        concat(Hashed("rows", 1, sign_seed=2)),
        concat(Row("rows"), projection="p"),
        concat(Row("narrow"), zeros=1),
        concat(CircularBlock("scalars", 1, 4)),
        concat(Row("narrow"), Row("scalars")),
        Recipe("sum", (Hashed("rows", 1), Hashed("rows", 2))),
        Recipe("sum", (Listed("rows", "offsets", "values", 3),)),
        Recipe("alternatives", (Range("rows"),)),
        concat(zeros=4),
    ]
    assert [RecipeBlock([recipe], store, 4).weight_of_rows for recipe in rows] == ["weight_4"] * len(rows)
    assert [RecipeBlock([recipe], store, 4).weight_of_rows for recipe in others] == [None] * len(others)


@BACKEND
def test_tables_of_one_group_whose_narrow_rows_have_matrices_of_their_own(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [TableConfig(name, 50, 4) for name in "ab"]
    recipes = {t: Recipe("alternatives", (Range(f"{t.name}w"), Range(f"{t.name}n", f"p{t.name}"))) for t in both}
    slabs = {f"{t.name}{kind}": shape for t in both for kind, shape in (("w", (10, 4)), ("n", (40, 2)))}
    tables = make(monkeypatch, recipes, slabs, {"pa": (2, 4), "pb": (2, 4)})
    ids = torch.stack([torch.randperm(50), torch.randperm(50)], dim=1)
    with ops.using(backend):
        found = tables(ids)
    for column, name in enumerate("ab"):
        narrow = tables.store.slab(f"{name}n") @ tables.store.extra(f"p{name}")
        dense = torch.cat([tables.store.slab(f"{name}w"), narrow])
        torch.testing.assert_close(found[:, 4 * column : 4 * column + 4], dense[ids[:, column]])


@BACKEND
def test_digits_of_negative_ids_are_those_of_numbers_rounded_down(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = TableConfig("a", None, 4)
    ids = torch.tensor([*range(-50, 50), -(2**63), -(2**63) + 1, 2**63 - 1, -(2**32), -(2**40) - 7]).unsqueeze(1)
    for divisor in (1, 3, 2**33 + 1):
        tables = make(monkeypatch, {table: concat(Digit("rows", divisor))}, {"rows": (7, 4)})
        with ops.using(backend):
            found = tables(ids)
        rows = torch.tensor([x // divisor % 7 for x in ids[:, 0].tolist()])
        torch.testing.assert_close(found, tables.store.slab("rows")[rows], rtol=0, atol=0)


@BACKEND
@pytest.mark.parametrize(
    "optimizer", [Adagrad(lr=0.1, eps=0.01), RowWiseAdagrad(lr=0.1, eps=0.01)], ids=lambda o: o.kind
)
def test_scalars_that_are_read_as_rows_too_are_updated_once(
    optimizer: FusedOptimizer, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, ids = TableConfig("a", 120, 6), torch.arange(64).unsqueeze(1)
    recipe = concat(CircularBlock("scalars", 3, 5), Capped("scalars"))
    plain = make(monkeypatch, {table: recipe}, {"scalars": (97, 1)})
    tables = make(monkeypatch, {table: recipe}, {"scalars": (97, 1)}, optimizer=optimizer)
    with ops.using("reference"):
        out = plain(ids)
        out.backward(gradient_like(out))
    parameter = plain.store.slab("scalars")
    (gradient,) = [p.grad for p in plain.parameters() if p.grad is not None]
    with ops.using(backend):
        out = tables(ids)
        out.backward(gradient_like(out))
    expected = parameter - 0.1 * gradient / (gradient.abs() + 0.01)
    torch.testing.assert_close(tables.store.slab("scalars"), expected.detach(), rtol=1e-4, atol=1e-5)


@BACKEND
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_row_wise_adagrad_takes_each_scalar_of_a_block_as_a_row(
    clip: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, ids = TableConfig("a", 50, 4), torch.arange(64).remainder(50).unsqueeze(1)
    found = []
    for rule, name in ((RowWiseAdagrad, backend), (Adagrad, "reference")):
        optimizer = rule(lr=0.1, clip_row_norm=clip)
        tables = make(monkeypatch, {table: concat(CircularBlock("s", 5, 4))}, {"s": (97, 1)}, optimizer=optimizer)
        for _ in range(2):
            with ops.using(name):
                out = tables(ids)
                out.backward(gradient_like(out))
        found.append([tables.store.slab("s"), *tables.store.state_of(tables.store.weight_of("s"))])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@BACKEND
def test_no_default_device_decides_where_vectors_are(backend: str) -> None:
    configs = [TableConfig("a", 50, 8), TableConfig("b", 50, 8, on_out_of_range="hash")]
    ids, offsets = torch.arange(32) % 50, torch.arange(0, 33, 2)
    for optimizer in (None, SGD(lr=0.5), Adagrad()):
        tables = EmbeddingTables(plan(configs, "multi_hash", "60%", optimizer=optimizer), seed=1)
        for given in ((ids.view(16, 2),), (ids, offsets)):
            expected = tables(*given).detach()
            with torch.device("meta"), ops.using(backend):
                found = tables(*given)
            assert found.device.type == "cpu"
            torch.testing.assert_close(found, expected)
        gradient = torch.ones_like(expected)
        with torch.device("meta"), ops.using(backend):
            found.backward(gradient)
        assert not torch.equal(tables(*given), expected) or optimizer is None


@BACKEND
def test_dropped_tables_have_zeros_of_the_type_of_the_others(backend: str) -> None:
    configs = [TableConfig("a", 500, 8), TableConfig("b", 5, 8)]
    for methods in ({"a": {"kind": "drop_feature", "keep_small": False}, "b": "full"}, "full"):
        tables = EmbeddingTables(plan(configs, methods, None, optimizer=None)).bfloat16()
        with ops.using(backend):
            assert tables(torch.zeros(3, 2, dtype=torch.int64)).dtype == torch.bfloat16


_IN_FLOAT64 = """
import torch
torch.set_default_dtype(torch.float64)
from embtables import EmbeddingTables, TableConfig, ops, plan
for optimizer in (None, "sgd", "adagrad"):
    tables = EmbeddingTables(plan([TableConfig("a", 1000, 8)], "hash", "50%", optimizer=optimizer))
    for name in ("native", "reference"):
        with ops.using(name):
            tables(torch.arange(5).unsqueeze(1)).sum().backward()
            with torch.no_grad():
                print(tables(torch.arange(5).unsqueeze(1)).dtype)
"""


@NATIVE
def test_the_default_type_is_nobody_s_business_but_the_model_s(tmp_path: Path) -> None:
    (done,) = run_each(_IN_FLOAT64, [{}], tmp_path)
    assert not done.returncode, done.stderr
    assert len(set(done.stdout.split())) == 1


@BACKEND
@pytest.mark.parametrize("method", ["low_rank", "full", "hash"])
def test_a_weight_of_padding_that_is_no_number_reaches_no_parameter(method: str, backend: str) -> None:
    configs = [TableConfig("a", 300, 8, padding_idx=0)]
    budget = None if method == "full" else "40%"
    tables = EmbeddingTables(plan(configs, method, budget, optimizer=SGD(lr=0.1)), seed=1)
    weights = torch.tensor([float("nan"), 1.0, 1.0, 2.0])
    with ops.using(backend):
        tables(torch.tensor([0, 1, 3, 2]), torch.tensor([0, 2, 4]), weights)[1].sum().backward()
    assert all(tensor.isfinite().all() for tensor in tables.store.stored().values())
