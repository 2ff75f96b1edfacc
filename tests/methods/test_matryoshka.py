"""Matryoshka: one training for every budget, what its steps draw and train, and what the first columns are worth."""

from __future__ import annotations

import io
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import random_ids
from native_cases import assert_same, jagged
from scalar import MASK, mix64, seed_of

from embtables import Embedding, EmbeddingTables, Plan, TableConfig, ops, plan
from embtables.sizes.layout import Group

TABLES = [
    TableConfig("large", 1000, 16, ["large", "both"]),
    TableConfig("small", 100, 16, padding_idx=3),
    TableConfig("thin", 300, 6, ["thin", "both"], pooling="mean", on_out_of_range="oov"),
]
ROWS, DIMS = (1000, 100, 301), (16, 16, 6)
FULL = 4 * sum(n * d for n, d in zip(ROWS, DIMS))


def make(budget: Any = "50%", method: Any = "matryoshka", tables: list[TableConfig] = TABLES, **options: Any) -> Plan:
    return plan(tables, method, budget, **options)


def widths(solved: Plan) -> list[int]:
    return [slab.width for slab in solved.groups[0].layout.serving.slabs]


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_widths_are_the_largest_that_fit(precision: str) -> None:
    """Of all that may be: d columns for all tables, and one more for the first few of them, the smallest first."""

    def size(rows: int, width: int) -> int:
        scales = 2 * (rows if width >= 8 else -(-rows // 64))
        return 4 * rows * width if precision == "fp32" else rows * width + scales

    smallest_first = (1, 2, 0)
    choices = []
    for d, more in product(range(1, 17), range(3)):
        some = [min(dim, d + (t in smallest_first[:more])) for t, dim in enumerate(DIMS)]
        choices.append((sum(map(size, ROWS, some)), some))
    for budget in np.linspace(choices[0][0], FULL, 40).astype(int).tolist():
        solved = make(budget, precision=precision)
        assert (solved.inference_bytes, widths(solved)) == max(c for c in choices if c[0] <= budget)
        assert solved.training_bytes == FULL + 4 * sum(ROWS)  # row-wise Adagrad
    with pytest.raises(ValueError, match="one scalar per id"):
        make(choices[0][0] - 1, precision=precision)


def test_plans_of_all_budgets_and_precisions_train_alike() -> None:
    plans = [make(budget, precision=precision) for budget in ("100%", "10%", 6000) for precision in (None, "int4")]
    assert len({solved.fingerprint for solved in plans}) == len(plans)
    assert len({solved.training_fingerprint for solved in plans}) == 1
    others = [
        make(method={"kind": "matryoshka", "nested_share": 0.25}),
        make(hash_seed=1),
        make(optimizer="sgd"),
        make(tables=TABLES[:2]),
        make(method="fewer_dimensions"),
    ]
    assert len({solved.training_fingerprint for solved in (*plans, *others)}) == 1 + len(others)


# ---- what is served --------------------------------------------------------------------------------------------------


def trained(method: Any = "matryoshka", steps: int = 6, **options: Any) -> EmbeddingTables:
    tables = EmbeddingTables(make("100%", method, **options), std=0.5)
    for i in range(steps):
        tables(*jagged(tables, 40, i)).tanh().sum().backward()
    return tables


def test_what_is_served_are_the_first_columns_of_what_was_trained() -> None:
    tables = trained()
    ids = random_ids(tables, 60)
    ids[:, 1] %= 300
    for budget, precision in product(("100%", "45%", 6000), ("fp32", "int8")):
        solved = make(budget, precision=precision)
        served = tables.serve(solved).eval()
        assert served.memory().inference_bytes == solved.inference_bytes
        for config, width in zip(TABLES, widths(solved)):
            rows = tables.store.slab(config.name)
            dense = served.to_dense(config.name)
            there = [i for i in range(len(rows)) if i != config.padding_idx]
            if precision == "fp32":
                assert torch.equal(served.store.slab(config.name), rows[:, :width])
                assert torch.equal(dense[there, :width], rows[there, :width])
            assert dense[there, :width].any(dim=0).all() and not dense[:, width:].any()
        # Trained tables show the same outside of training, in the plan's own budget.
        if precision == "fp32":
            alike = EmbeddingTables(solved).eval()
            alike.store.load_state_dict(tables.store.state_dict())
            with torch.no_grad():
                assert torch.equal(alike(ids), served(ids))
                assert torch.equal(alike.train()(ids), served(ids))  # nothing trains without gradients
            assert all(torch.equal(alike.to_dense(t.name), served.to_dense(t.name)) for t in TABLES)


def test_a_file_of_all_columns_is_served_at_later_budgets(tmp_path: Path) -> None:
    tables, later = trained(), make("30%", precision="int8")
    tables.save(tmp_path / "all.safetensors")
    loaded = EmbeddingTables.load(tmp_path / "all.safetensors")
    loaded.serve(later).save(tmp_path / "some.safetensors")
    served = EmbeddingTables.load(tmp_path / "some.safetensors")
    assert served.plan.fingerprint == later.fingerprint and served.memory().inference_bytes == later.inference_bytes
    ids = random_ids(tables, 60) % 300
    ids[:, 2] %= 100
    assert torch.equal(served(ids), tables.serve(later).eval()(ids))
    # What was cut off is gone, and what was rounded is not what was trained.
    for lossy in (served, tables.serve(make("30%")), tables.serve(make("100%", precision="int8"))):
        with pytest.raises(ValueError, match="served tables stay in the form that they have"):
            lossy.serve(make("100%"))
    with pytest.raises(ValueError, match="train otherwise"):
        loaded.serve(make("30%", optimizer="sgd"))


def test_trained_weights_are_taken_over_as_they_are() -> None:
    solved = make("40%")
    tables, g = EmbeddingTables(solved).eval(), solved.groups[0]
    weights = {t.name: torch.randn(t.num_embeddings or 0, t.embedding_dim) for t in TABLES}
    group = Group("matryoshka", tuple(TABLES), (None,) * 3, 0)
    assert set(g.method.keep(g.layout, group, tables.store, weights)) == set(weights)
    for (name, weight), width in zip(weights.items(), widths(solved)):
        assert torch.equal(tables.store.slab(name)[: len(weight)], weight)
        rows = [i for i in range(len(weight)) if (name, i) != ("small", 3)]
        assert torch.equal(tables.to_dense(name)[rows, :width], weight[rows, :width])


# ---- what a step draws -----------------------------------------------------------------------------------------------


def drawn(steps: int, share: float, dim: int = 16, hash_seed: int = 0) -> list[int]:
    """The widths of the first steps once more, in Python's integers."""
    seed, nested = seed_of(hash_seed, "matryoshka", "width") & MASK, [w for w in (1, 2, 4, 8, 16) if w < dim]
    found = []
    for step in range(1, steps + 1):
        number = mix64(step ^ seed) % 2**30 / 2**30
        found.append(nested[int(number / share * len(nested))] if number < share else dim)
    return found


def seen(tables: EmbeddingTables, steps: int) -> list[int]:
    found = []
    for _ in range(steps):
        tables.stages[0].step(None)  # type: ignore[arg-type]
        found.append(int(tables.stages[0].width))
    return found


@pytest.mark.parametrize("share", [0.5, 0.8, 1.0, 0.0])
def test_widths_have_the_stated_distribution(share: float) -> None:
    steps = 2000
    tables = EmbeddingTables(make(method={"kind": "matryoshka", "nested_share": share}))
    found = seen(tables, steps)
    assert found == (drawn(steps, share) if share else [16] * steps)
    for width in (1, 2, 4, 8, 16):
        chance = 1 - share if width == 16 else share / 4
        assert abs(found.count(width) - steps * chance) <= 4 * sqrt(steps * chance * (1 - chance)), width
    # Plans of another seed draw others; a table of one column has nothing to hide.
    assert seen(EmbeddingTables(make(hash_seed=7)), 50) == drawn(50, 0.5, hash_seed=7) != drawn(50, 0.5)
    assert seen(EmbeddingTables(plan([TableConfig("a", 9, 1)], "matryoshka", "100%")), 20) == [1] * 20


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_hidden_columns_are_zeros_and_get_no_gradient(backend: str) -> None:
    """Against the sums of what comes back to each row, in float64."""
    tables = EmbeddingTables(make("40%", optimizer=None), std=0.5)
    ids = random_ids(tables, 50)
    ids[:, 1] %= 300
    uses = [("large", 0), ("large", 1), ("small", 2), ("thin", 3), ("thin", 1)]
    dims = [DIMS[[t.name for t in TABLES].index(name)] for name, _ in uses]
    with ops.using(backend):
        for width in drawn(12, 0.5):
            tables.zero_grad()
            vectors = tables(ids)
            direction = torch.randn(vectors.shape)
            (vectors * direction).sum().backward()
            expected = {t.name: torch.zeros(n, d, dtype=torch.float64) for t, n, d in zip(TABLES, ROWS, DIMS)}
            for (name, column), each, own in zip(uses, vectors.split(dims, 1), direction.split(dims, 1)):
                rows = tables.store.slab(name)[ids[:, column]]
                if name == "small":
                    rows = rows * (ids[:, column] != 3).unsqueeze(1)
                    own = own * (ids[:, column] != 3).unsqueeze(1)
                assert torch.equal(each[:, :width], rows[:, :width]) and not each[:, width:].any()
                expected[name].index_add_(0, ids[:, column], own.double())
            for name, gradient in expected.items():
                start = tables.store.start(name)
                weight = getattr(tables.store, tables.store.weight_of(name))
                found = weight.grad[start : start + len(gradient)]
                torch.testing.assert_close(found[:, :width].double(), gradient[:, :width], rtol=1e-5, atol=1e-5)
                assert found[:, :width].any() and not found[:, width:].any()


@pytest.mark.parametrize(
    "method", ["matryoshka", {"small": "hash", "*": "matryoshka"}, {"t*": "matryoshka", "*": "matryoshka"}]
)
@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_native_steps_equal_those_in_pytorch(optimizer: str, method: Any) -> None:
    native, reference = (EmbeddingTables(make("60%", method, optimizer=optimizer), std=0.5, seed=1) for _ in range(2))
    assert native.memory().ops == "native"
    for i in range(6):
        given, outputs = jagged(native, 30, i), []
        for tables, backend in ((native, "native"), (reference, "reference")):
            with ops.using(backend):
                found = tables.lookup(*given, pooling={"both": None} if i % 2 else {})
                outputs.append(torch.cat([output.flatten() for output in found.values()]))
                outputs[-1].tanh().sum().backward()
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert_same(native, reference)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("method", ["matryoshka", {"b": "unified", "*": "matryoshka"}])
def test_unpooled_vectors_show_the_columns_that_pooled_ones_do(method: Any, backend: str) -> None:
    tables = EmbeddingTables(plan([TableConfig(n, 50, 8) for n in "abc"], method, "60%", optimizer=None), std=0.5)
    twin = EmbeddingTables(tables.plan, std=0.5)
    generator = torch.Generator().manual_seed(0)
    with ops.using(backend):
        for _ in range(6):
            ids = torch.randint(50, (20, 3), generator=generator)
            lengths = torch.randint(4, (60,), generator=generator)
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            flat = torch.randint(50, (int(offsets[-1]),), generator=generator)
            assert torch.equal(tables(ids, pooling=None).flatten(1), twin(ids))
            unpooled = twin.lookup(flat, offsets, pooling=None)
            assert torch.equal(tables(flat, offsets, pooling=None), torch.cat([*unpooled.values()]))
            for name in ("a", "c"):
                assert not unpooled[name][:, int(twin.stages[0].width) :].any()
    assert min(drawn(12, 0.5, 8)[1::2]) < 8


def test_views_of_one_step_show_the_same_columns() -> None:
    tables = EmbeddingTables(make("60%", optimizer="sgd"), std=0.5)
    views = [Embedding.of(tables, name) for name in ("large", "thin")]
    for width in drawn(8, 0.5):
        outputs = [view(torch.arange(20)) for view in views]
        for output, dim in zip(outputs, (16, 6)):
            assert output[:, :width].any(dim=0).all() and not output[:, width:].any() and output.shape[1] == dim
        sum(output.sum() for output in outputs).backward()  # type: ignore[union-attr]
    tables.to("meta")
    shown = [lookups.shown for lookups in (tables.lookups, *(tables.view(name)[0] for name in ("large", "thin")))]
    assert {tensor.device.type for each in shown for tensor in (each.hidden, each.number)} == {"meta"}


@pytest.mark.parametrize("optimizer", ["adam", None])
def test_a_state_dict_resumes_exactly(optimizer: str | None) -> None:
    def steps(tables: EmbeddingTables, numbers: range) -> list[int]:
        found = []
        for i in numbers:
            tables(*jagged(tables, 20, i)).tanh().sum().backward()
            found.append(int(tables.stages[0].width))
        return found

    straight, resumed = (EmbeddingTables(make(optimizer=optimizer), seed=s) for s in (0, 1))
    first = steps(straight, range(5))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    assert first + steps(resumed, range(5, 15)) == drawn(15, 0.5)
    steps(straight, range(5, 15))
    if optimizer is not None:
        assert_same(straight, resumed, rtol=0, atol=0)


# ---- what the first columns are worth --------------------------------------------------------------------------------


def test_nested_columns_hold_most_of_a_planted_signal_and_those_of_full_tables_their_share_by_number() -> None:
    """Scores of users and items of rank 4, learned as dot products in 8 dimensions.

    The first 2 columns can hold all but (1² + 0.5²)/(4² + 2² + 1² + 0.5²) of it, 6 %. Those of full tables are any 2
    of 8 directions: they hold about a quarter of every score, and lack (3/4)², 56 % of the squares.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 4, generator=generator)).Q for n in (40, 30))
    scores = left @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5])) @ right.t()
    configs = [TableConfig("user", 40, 8), TableConfig("item", 30, 8)]
    ids, offsets = torch.cat([torch.arange(40), torch.arange(30)]), torch.tensor([0, 40, 70])

    def lacking(tables: EmbeddingTables, width: int) -> float:
        solved = plan(configs, tables.plan.groups[0].method, 4 * 70 * width, optimizer=tables.plan.optimizer)
        assert widths(solved) == [width, width]
        user, item = (tables.serve(solved).to_dense(config.name) for config in configs)
        return float((user @ item.t() - scores).square().sum() / scores.square().sum())

    found = {}
    for share in (0.0, 0.5):
        method = {"kind": "matryoshka", "nested_share": share}
        tables = EmbeddingTables(plan(configs, method, "100%", optimizer={"kind": "adam", "lr": 0.02}), std=0.1)
        for _ in range(250):
            user, item = tables.lookup(ids, offsets, pooling=None).values()
            (user @ item.t() - scores).square().sum().backward()
        found[share] = [lacking(tables, width) for width in (1, 2, 4, 8)]
    best = [(4.0 + 1 + 0.25) / 21.25, 1.25 / 21.25, 0.0, 0.0]
    assert all(nested < least + 0.01 for nested, least in zip(found[0.5], best))
    assert found[0.0][3] < 0.01 and found[0.0][1] > 0.4
