"""Trained full tables in the storage of other methods: least squares against a dense solution, products, reports."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from core_cases import all_methods, falling_counts, method_id, shuffled_counts
from torch import Tensor, nn

from embtables import EmbeddingTables, TableConfig, compress_, plan
from embtables.methods import Method

CONFIGS = [TableConfig("a", 60, 4, padding_idx=3), TableConfig("b", 40, 4), TableConfig("c", 30, 2)]
COUNTS = {"a": shuffled_counts(60), "b": falling_counts(40), "c": shuffled_counts(30)}
TRAINED = {
    c.name: torch.randn(c.num_embeddings or 0, c.embedding_dim, generator=torch.Generator().manual_seed(i))
    for i, c in enumerate(CONFIGS)
}
#: Whose vectors are linear in the rows that ids share.
LINEAR = [
    m for m in all_methods() if m.kind in ("hash", "multi_hash", "frequency_cutoff", "unified", "robe", "hot_cold")
]
LINEAR = [m for m in LINEAR if getattr(getattr(m, "cold", None), "kind", "") != "compositional"]
LINEAR += [m for m in all_methods() if m.kind == "compositional" and getattr(m, "operation", "mult") != "mult"]


def make(
    method: Any, budget: Any = "40%", std: float = 0.3, optimizer: str | None = "adagrad", **options: Any
) -> EmbeddingTables:
    budget = None if getattr(method, "kind", method) == "full" else budget
    return EmbeddingTables(plan(CONFIGS, method, budget, COUNTS, optimizer, **options), std=std)


def dense(tables: EmbeddingTables) -> np.ndarray[Any, Any]:
    """All vectors of all tables, each times the root of its id's weight."""
    roots = {name: np.sqrt(1.0 + counts)[:, None] for name, counts in COUNTS.items()}
    roots["a"][3] = 0
    return np.concatenate([(tables.to_dense(n).double().numpy() * roots[n]).ravel() for n in TRAINED])


def error(tables: EmbeddingTables) -> float:
    roots = {name: np.sqrt(1.0 + counts)[:, None] for name, counts in COUNTS.items()}
    roots["a"][3] = 0
    wanted = np.concatenate([(TRAINED[n].double().numpy() * roots[n]).ravel() for n in TRAINED])
    return float(np.square(dense(tables) - wanted).sum())


@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_parameters_of_any_optimizer_take_over_what_fused_ones_do(method: Method) -> None:
    fused, plain = make(method), make(method, optimizer=None)
    assert plain.take_over(TRAINED, COUNTS) == fused.take_over(TRAINED, COUNTS)
    for name in TRAINED:
        torch.testing.assert_close(plain.to_dense(name), fused.to_dense(name), rtol=0, atol=0)


@pytest.mark.parametrize("cold", [{"kind": "multi_hash"}, {"kind": "multi_hash", "num_hashes": 4, "operation": "mean"}])
def test_nothing_is_left_of_what_sums_began_with(cold: dict[str, Any]) -> None:
    for method in (cold, {"kind": "hot_cold", "cold": cold, "hot": 0.1}):
        held = [make(method, "60%", std).take_over(TRAINED, COUNTS) for std in (1e-6, 1.0)]
        assert held[0] == pytest.approx(held[1], abs=1e-3)


@pytest.mark.parametrize("method", LINEAR, ids=method_id)
def test_no_rows_are_nearer_by_a_dense_solution(method: Method) -> None:
    """The matrix that maps all stored scalars to all vectors, a column a scalar, and numpy's least squares."""
    tables, best = make(method), make(method)
    tables.take_over(TRAINED, COUNTS)
    slabs = [slab.name for g in best.plan.groups for slab in g.layout.training.slabs]
    scalars = [(name, i) for name in slabs for i in range(best.store.slab(name).numel())]
    for name in slabs:
        best.store.slab(name).zero_()
    columns = []
    for name, i in scalars:
        best.store.slab(name).view(-1)[i] = 1
        columns.append(dense(best))
        best.store.slab(name).view(-1)[i] = 0
    roots = {name: np.sqrt(1.0 + counts)[:, None] for name, counts in COUNTS.items()}
    roots["a"][3] = 0
    wanted = np.concatenate([(TRAINED[n].double().numpy() * roots[n]).ravel() for n in TRAINED])
    solution, *_ = np.linalg.lstsq(np.stack(columns, axis=1), wanted, rcond=None)
    least = float(np.square(np.stack(columns, axis=1) @ solution - wanted).sum())
    assert least * (1 - 1e-6) <= error(tables) <= least * 1.02


@pytest.mark.parametrize("method", [m for m in all_methods() if m.kind == "hash"], ids=method_id)
def test_rows_of_hash_are_means_of_their_ids_vectors(method: Method) -> None:
    tables = make(method)
    tables.take_over(TRAINED, COUNTS)
    found, weights = tables.to_dense("b"), torch.from_numpy(1.0 + COUNTS["b"])
    _, group = torch.unique(found, dim=0, return_inverse=True)
    for x in range(40):
        mine = group == group[x]
        mean = (weights[mine, None] * TRAINED["b"][mine]).sum(0) / weights[mine].sum()
        torch.testing.assert_close(found[x].double(), mean.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("partitions", [2, 3])
def test_products_end_where_every_move_makes_it_worse(partitions: int) -> None:
    tables = make({"kind": "compositional", "num_partitions": partitions})
    before = error(tables)
    tables.take_over(TRAINED, COUNTS)
    least = error(tables)
    assert least < before / 2
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        kept = {name: tables.store.slab(name).clone() for name in tables.store._slabs}
        for name, values in kept.items():
            tables.store.slab(name).add_(0.02 * torch.randn(values.shape, generator=generator))
        assert error(tables) > least
        for name, values in kept.items():
            tables.store.slab(name).copy_(values)


@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_shares_are_those_of_what_is_served(method: Method) -> None:
    tables = make(method, precision="int4")
    shares = tables.take_over(TRAINED, COUNTS)
    served = tables.serve()
    assert set(shares) == set(TRAINED) or method.kind in ("drop_feature", "fewer_dimensions", "mixed_dimension")
    for name, share in shares.items():
        weight, counts = TRAINED[name].double(), 1.0 + torch.from_numpy(COUNTS[name]).double().unsqueeze(1)
        if name == "a":
            counts[3] = 0
        missed = (counts * (served.to_dense(name).double() - weight).square()).sum()
        assert share == pytest.approx(float(1 - missed / (counts * weight.square()).sum()), abs=1e-5)


def test_what_does_not_fit_is_named_and_changes_nothing() -> None:
    tables = make("hash")
    before = {name: tensor.clone() for name, tensor in tables.state_dict().items() if isinstance(tensor, Tensor)}
    for wrong, sentence in (
        ({"d": TRAINED["a"]}, "there is no table 'd'; the tables: a, b, c"),
        ({"b": TRAINED["b"], "a": TRAINED["b"]}, r"table 'a' is \[60, 4\], its trained weight \[40, 4\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tables.take_over(wrong)
    assert all(torch.equal(before[name], tables.state_dict()[name]) for name in before)
    with pytest.raises(ValueError, match="served tables and those on the meta device take no weights over"):
        make("full", precision="int8").finalize().take_over(TRAINED, COUNTS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["unified", "low_rank", "full"])
def test_what_is_not_finite_is_refused(kind: str, bad: float) -> None:
    weight = TRAINED["a"].clone()
    weight[7, 1] = bad
    with pytest.raises(ValueError, match="the trained weight of table 'a' holds NaN or infinite values"):
        make(kind).take_over({"a": weight, "b": TRAINED["b"], "c": TRAINED["c"]})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("kind", ["hash", "low_rank", "banded", "mixed_dimension"])
def test_weights_of_any_type_are_taken(kind: str, dtype: torch.dtype) -> None:
    given = {name: (10 * weight).round() for name, weight in TRAINED.items()}
    one, other = make(kind), make(kind)
    assert one.take_over(given) == pytest.approx(other.take_over({n: w.to(dtype) for n, w in given.items()}), abs=1e-6)


@pytest.mark.parametrize("kind", ["unified", "robe", "fewer_dimensions-projection"])
def test_what_shares_storage_and_is_not_given_stays_near(kind: str) -> None:
    kind, _, projection = kind.partition("-")
    tables = make({"kind": kind, "projection": True} if projection else kind)
    tables.take_over(TRAINED)
    b = tables.to_dense("b")
    tables.take_over({"a": TRAINED["a"]})
    assert float((tables.to_dense("b") - b).square().sum()) < 0.5 * float(b.square().sum())


def test_small_weights_are_fitted_as_well_as_large_ones() -> None:
    shares = []
    for scale in (1.0, 1e-5):
        tables = make({"kind": "multi_hash", "num_hashes": 2})
        shares.append(tables.take_over({name: scale * weight for name, weight in TRAINED.items()}, COUNTS))
    assert shares[1] == pytest.approx(shares[0], abs=1e-3)


def test_rows_that_training_rounds_have_the_scales_of_what_was_taken_over() -> None:
    tables = make("hash", precision="int4/slab")
    tables.fake_quantize()
    tables.take_over({name: 100 * weight for name, weight in TRAINED.items()})
    ids = torch.arange(30).unsqueeze(1).expand(-1, 3)
    torch.testing.assert_close(tables(ids).detach(), tables.serve()(ids))


def test_a_dropped_table_takes_nothing_over() -> None:
    assert set(make("drop_feature").take_over(TRAINED)) < set(TRAINED)


def test_tables_that_are_not_given_stay() -> None:
    tables = make("hash")
    b = tables.to_dense("b")
    assert set(tables.take_over({"a": TRAINED["a"]}, COUNTS)) == {"a"}
    assert torch.equal(tables.to_dense("b"), b)


def test_compress_keeps_what_a_trained_model_learned() -> None:
    def model() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"user": nn.Embedding(500, 8), "item": nn.Embedding(50, 8)})

    counts = {"user": falling_counts(500), "item": falling_counts(50)}
    ids = torch.arange(500)
    trained, fresh = model(), model()
    wanted = trained["user"](ids).detach()
    report = compress_(trained, "hash", "20%", frequencies=counts, trained=True)
    anew = compress_(fresh, "hash", "20%", frequencies=counts)
    weight = torch.from_numpy(1.0 + counts["user"]).unsqueeze(1)
    missed = (weight * (trained["user"](ids) - wanted).square()).sum() / (weight * wanted.square()).sum()
    user, item = report.tables
    assert user.share_kept == pytest.approx(1 - float(missed), abs=1e-5)
    assert 0.5 < user.share_kept < 0.99
    assert f"{user.share_kept:.1%} kept" in str(report)
    assert report.kept == ["user", "item"] and not report.anew
    assert user.std_after == pytest.approx(float(trained["user"](ids).square().mean().sqrt()), rel=1e-4)
    assert "first vectors of another standard deviation" in str(report)
    assert anew.anew == ["user", "item"] and anew.tables[0].share_kept is None
    # A mean of untrained vectors would be shorter than they are.
    assert float(fresh["user"](ids).std()) == pytest.approx(float(wanted.std()), rel=0.1)
