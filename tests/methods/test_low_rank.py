"""Low rank: what ranks cost and who gets them, what is kept of trained tables, and training wider than serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import random_ids
from torch import Tensor, nn

from embtables import EmbeddingTables, InfeasibleBudget, TableConfig, compress_, ops, plan
from embtables.plan.solver import GroupPlan
from embtables.sizes.layout import Group

TABLES = [TableConfig("user", 900, 16), TableConfig("item", 300, 16), TableConfig("city", 10, 8)]
WIDE = {"kind": "low_rank", "inner_dim": 24}


def ranks(solved: Any) -> dict[str, int]:
    """The rank of each table; its dimension where it is stored in full."""
    entries = solved.groups[0].layout.entries
    return {t.name: entries[t.name].values.get("rank", t.embedding_dim) for t in TABLES}


def test_bytes_are_those_of_both_factors_and_small_tables_stay_full() -> None:
    solved = plan(TABLES, "low_rank", 4 * (5 * 916 + 5 * 316 + 80))
    assert ranks(solved) == {"user": 5, "item": 5, "city": 8}
    assert solved.inference_bytes == solved.budget_bytes
    assert solved.groups[0].layout.entries["city"].variant == "full"
    # 10 ids of 8 dimensions: 80 scalars in full, 18 for each rank.
    floor = 4 * (916 + 316 + 18)
    assert ranks(plan(TABLES, "low_rank", floor)) == {"user": 1, "item": 1, "city": 1}
    with pytest.raises(InfeasibleBudget) as error:
        plan(TABLES, "low_rank", floor - 1)
    assert error.value.floor_bytes == floor
    assert ranks(plan(TABLES, "low_rank", 4 * (16 * 1200 + 80))) == {"user": 16, "item": 16, "city": 8}


def test_ranks_follow_lookups_per_byte_where_counts_are_known() -> None:
    tables = [TableConfig(name, 100_000, 64) for name in ("often", "seldom")]
    counts = {"often": np.full(100_000, 400), "seldom": np.full(100_000, 25)}
    solved = plan(tables, "low_rank", "30%", counts)
    entries = solved.groups[0].layout.entries
    # The root of 16 times the lookups.
    assert entries["often"].values["rank"] == pytest.approx(4 * entries["seldom"].values["rank"], abs=4)
    assert solved.inference_bytes > 0.97 * (solved.budget_bytes or 0)
    even = plan(tables, "low_rank", "30%").groups[0].layout.entries
    assert even["often"].values["rank"] - even["seldom"].values["rank"] in (0, 1)


# ---- trained tables --------------------------------------------------------------------------------------------------


def trained_weights() -> dict[str, Tensor]:
    """Tables whose directions matter less and less, about a mean of their own."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for table in TABLES:
        dim = table.embedding_dim
        basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
        rows = torch.randn(table.num_embeddings or 0, dim, generator=generator) * 0.8 ** torch.arange(dim)
        found[table.name] = rows @ basis + 0.1
    return found


def keep(method: Any, counts: tuple[Any, ...] = (None, None, None)) -> tuple[EmbeddingTables, GroupPlan]:
    solved = plan(TABLES, method, 4 * (5 * 916 + 5 * 316 + 80), optimizer="sgd")
    tables, g = EmbeddingTables(solved), solved.groups[0]
    group = Group(g.group.name, g.group.tables, counts, 0)
    assert set(g.method.keep(g.layout, group, tables.store, trained_weights())) == {"user", "item", "city"}
    return tables, g


@pytest.mark.parametrize("method", ["low_rank", WIDE], ids=["as served", "wider"])
@pytest.mark.parametrize("counted", [False, True])
def test_trained_tables_keep_their_best_approximation(method: Any, counted: bool) -> None:
    rng = np.random.default_rng(0)
    counts = tuple(rng.integers(0, 60, t.num_embeddings) if counted else None for t in TABLES)
    tables, _ = keep(method, counts)
    for (name, weight), own in zip(trained_weights().items(), counts):
        dense = weight.double().numpy()
        root = np.sqrt(np.ones((len(dense), 1)) if own is None else own[:, None] + 1.0)
        left, values, right = np.linalg.svd(root * dense, full_matrices=False)
        rank = 5 if name != "city" else 8
        expected = (left[:, :rank] * values[:rank]) @ right[:rank] / root
        for form in (tables, tables.serve()):
            np.testing.assert_allclose(form.to_dense(name).numpy(), expected, rtol=1e-4, atol=2e-5)


class Scores(nn.Module):
    """Dot products of users and items whose vectors have few directions that matter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        basis = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
        found = (torch.randn(n, 32, generator=generator) * 0.5 ** torch.arange(32) @ basis for n in (800, 300))
        self.user, self.item = (nn.Embedding.from_pretrained(weight, freeze=False) for weight in found)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return (self.user(users) * self.item(items)).sum(-1)


@pytest.mark.parametrize("method", ["low_rank", WIDE, {"kind": "fewer_dimensions", "projection": True}], ids=str)
def test_a_model_that_is_compressed_keeps_its_scores(method: Any) -> None:
    model = Scores()
    users, items = torch.arange(800), torch.arange(800) % 300
    before = model(users, items).detach()
    report = compress_(model, method, "30%")
    assert report.kept == ["user", "item"] and report.bytes_after < 0.3 * report.bytes_before
    after = model(users, items).detach()
    # A quarter of the directions: what is lost of a vector is 2**-9 of it, and less of its square.
    assert float((after - before).square().mean()) < 1e-6 * float(before.square().mean())


def test_what_is_kept_goes_on_training_in_all_directions() -> None:
    """None of the columns that rank r does without is stuck at zero."""
    tables, _ = keep(WIDE)
    assert tables.store.slab("user/rows").abs().amin() > 0
    before = {name: tensor.clone() for name, tensor, _ in tables.store.tensors()}
    tables(random_ids(tables, 4000)).square().sum().backward()
    for name, tensor, is_buffer in tables.store.tensors():
        assert is_buffer or (tensor != before[name]).float().mean() > 0.9, name


# ---- trained wider than served ---------------------------------------------------------------------------------------


def test_the_served_form_has_the_bytes_of_its_rank_alone() -> None:
    budget = 4 * (5 * 916 + 5 * 316 + 80)
    solved, plain = plan(TABLES, WIDE, budget, optimizer="sgd"), plan(TABLES, "low_rank", budget, optimizer="sgd")
    assert solved.groups[0].layout.serving == plain.groups[0].layout.serving
    assert solved.training_bytes == 4 * (24 * 1200 + 2 * 24 * 5 + 2 * 5 * 16 + 80)
    # Where the rank reaches the inner dimension, nothing is wider than it is served.
    narrow = plan(TABLES, {"kind": "low_rank", "inner_dim": 5}, budget, optimizer="sgd")
    assert narrow.groups[0].layout == plain.groups[0].layout


def test_served_are_the_vectors_that_were_trained(tmp_path: Path) -> None:
    tables = EmbeddingTables(plan(TABLES, WIDE, 4 * (5 * 916 + 5 * 316 + 80), optimizer="adagrad"), std=0.3)
    for seed in range(5):
        (tables(random_ids(tables, 64, seed)) - 0.1).square().sum().backward()
    store = tables.store
    product = store.slab("user/rows").double() @ store.extra("user/fold").double() @ store.extra("user/basis").double()
    expected = tables.to_dense("user")
    np.testing.assert_allclose(expected.numpy(), product.numpy(), rtol=1e-5, atol=1e-6)
    tables.save(tmp_path / "tables.safetensors")
    loaded, served = EmbeddingTables.load(tmp_path / "tables.safetensors"), tables.serve()
    assert torch.equal(loaded.to_dense("user"), served.to_dense("user"))
    torch.testing.assert_close(served.to_dense("user"), expected, rtol=1e-5, atol=1e-6)
    assert served.store.extra_shapes().keys() == {"user/basis", "item/basis"}
    if ops.instructions() is not None:
        assert tables.lookups.ops == served.lookups.ops == "native"


def test_precisions_round_what_is_folded() -> None:
    wide = EmbeddingTables(plan(TABLES, WIDE | {"precision": "int8/1"}, "12%", optimizer=None), std=0.3)
    served = wide.serve()
    rows = wide.store.slab("user/rows") @ wide.store.extra("user/fold").detach()
    step = rows.abs().amax(1, keepdim=True) / 127
    assert ((served.store.read_slab("user/rows") - rows).abs() <= step / 2 * (1 + 2.0**-7) + 1e-9).all()
    assert served.store.read_slab("user/rows").shape[1] == served.plan.groups[0].layout.entries["user"].values["rank"]
