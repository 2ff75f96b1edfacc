"""What every method owes, whatever it does inside. A new one is covered as soon as ``kinds()`` lists it."""

from __future__ import annotations

from contextlib import nullcontext
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import (
    NEEDS_COUNTS,
    all_methods,
    draws,
    falling_counts,
    folds,
    in_turn,
    method_id,
    projects,
    random_ids,
    shuffled_counts,
)
from scalar import vector
from torch import Tensor

from embtables import EmbeddingTables, InfeasibleBudget, TableConfig, ops, plan
from embtables.formats import row_format
from embtables.lookup.stored_rows import StoredRows
from embtables.methods import Method, from_config, kinds

METHODS = pytest.mark.parametrize("method", all_methods(), ids=method_id)
BUDGETS = pytest.mark.parametrize("budget", ["60%", "20%", "6%"])
CONFIGS = [
    TableConfig("user", 700, 8, padding_idx=0),
    TableConfig("item", 400, 8, feature_names=["item", "history"], pooling="mean", on_out_of_range="oov"),
    TableConfig("city", 12, 8, feature_names=["city", "item"]),
    TableConfig("slot", 90, 4, on_out_of_range="hash", padding_idx=5),
]
COUNTS = {
    "user": falling_counts(700),
    "item": shuffled_counts(400),
    "city": falling_counts(12),
    "slot": shuffled_counts(90),
}


def make(
    method: Method,
    budget: Any,
    configs: list[TableConfig] = CONFIGS,
    counts: dict[str, Any] | None = COUNTS,
    optimizer: Any = None,
    **options: Any,
) -> EmbeddingTables:
    """Tables of this method at this budget, or at its floor."""
    if method.kind == "full":
        budget = None
    try:
        solved = plan(configs, method, budget, counts, optimizer)
    except InfeasibleBudget as error:
        solved = plan(configs, method, error.floor_bytes, counts, optimizer)
    return EmbeddingTables(solved, **options)


def both_forms(method: Method, budget: Any) -> list[EmbeddingTables]:
    """As they are trained, and as they are served."""
    trained = make(method, budget, std=0.5).train(not draws(method))
    return [trained, trained.serve()]


# ---- vectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.core
@BUDGETS
@pytest.mark.parametrize("method", [m for m in all_methods() if m.kind != "pruned"], ids=method_id)
def test_vectors_equal_a_scalar_computation(method: Method, budget: str) -> None:
    tables = make(method, budget, std=0.5)
    generator = torch.Generator().manual_seed(0)
    for config in CONFIGS:
        dense = tables.to_dense(config.name)
        ids = {0, 1, 2, (config.rows or 0) - 1, *torch.randint(config.rows or 0, (25,), generator=generator).tolist()}
        own = COUNTS[config.name].tolist() + [0] * (config.on_out_of_range == "oov")
        for x in ids - {config.padding_idx}:
            try:
                expected = vector(tables, config.name, x, own)
            except NotImplementedError:
                pytest.skip(f"{method.kind} is written out in its own tests")
            np.testing.assert_allclose(dense[x].detach().numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=f"{x}")
        if config.padding_idx is not None:
            assert torch.equal(dense[config.padding_idx], torch.zeros(config.embedding_dim))


@pytest.mark.core
@BUDGETS
@METHODS
def test_dense_tables_equal_forward_bit_for_bit(method: Method, budget: str) -> None:
    # Native code adds up a product with a projection in another order than a product of matrices.
    with ops.using("reference") if projects(method) else nullcontext():
        check_dense_tables_equal_forward(method, budget)


def check_dense_tables_equal_forward(method: Method, budget: str) -> None:
    for tables in both_forms(method, budget):
        dense = {c.name: tables.to_dense(c.name) for c in CONFIGS}
        ids = random_ids(tables, 257, seed=3)
        ids[:, tables.feature_names.index("item")] %= 12  # this feature is also looked up among cities
        column = {f: ids[:, i] for i, f in enumerate(tables.feature_names)}
        uses = [
            ("user", "user"),
            ("item", "item"),
            ("item", "history"),
            ("city", "city"),
            ("city", "item"),
            ("slot", "slot"),
        ]
        expected = torch.cat([dense[table][column[feature]] for table, feature in uses], dim=1)
        # The last bit of a product of matrices depends on how many rows there are.
        exact = {"rtol": 1e-5, "atol": 1e-6} if folds(method) else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(tables(ids), expected, **exact)
        torch.testing.assert_close(tables(ids.int()), expected, **exact)
        # One at a time, and as flat values: the same vectors.
        torch.testing.assert_close(torch.cat([tables(line.unsqueeze(0)) for line in ids[:20]]), expected[:20], **exact)
        torch.testing.assert_close(tables(ids.t().reshape(-1), torch.arange(ids.numel() + 1)), expected, **exact)


def random_bags(tables: EmbeddingTables, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Flat ids and offsets: empty bags, duplicates, padding and ids out of range among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (len(tables.feature_names) * batch,), generator=generator)
    sizes = {"user": 700, "item": 12, "history": 500, "city": 12, "slot": 300}
    limit = torch.tensor([sizes[f] for f in tables.feature_names]).repeat_interleave(lengths.view(-1, batch).sum(1))
    values = (torch.rand(int(lengths.sum()), generator=generator) ** 3 * limit).long()
    return values, torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


@pytest.mark.parametrize(
    ("method", "budget"),
    [pytest.param(m, b, id=f"{method_id(m)}-{b}") for m, b in in_turn(all_methods(), ["60%", "20%", "6%"], 1)],
)
def test_pooled_outputs_are_sums_over_ids_of_single_vectors(method: Method, budget: str) -> None:
    """Combine first, pool after: with ``mult`` Σ(q∘r), not Σq∘Σr."""
    batch = 6
    for tables in both_forms(method, budget):
        values, offsets = random_bags(tables, batch, seed=1)
        factors = torch.randn(values.numel(), generator=torch.Generator().manual_seed(2))
        width = {n: d for n, d in zip(tables.output_names, tables.embedding_dims)}
        # A line for each value, in which it is the only id that is looked at.
        feature_of = torch.arange(len(tables.feature_names)).repeat_interleave(offsets[::batch].diff())
        lines = torch.zeros(values.numel(), len(tables.feature_names), dtype=torch.int64)
        single = tables(lines.scatter(1, feature_of.unsqueeze(1), values.unsqueeze(1))).detach().double()
        for weights in (None, factors):
            for pooling in ("config", "sum", "mean"):
                pooled = tables(values, offsets, weights, pooling).double()
                expected = torch.zeros(batch, sum(tables.embedding_dims), dtype=torch.float64)
                for example in range(batch):
                    begin = 0
                    for output in tables.output_names:
                        feature, _, name = output.partition("@")
                        config = next(c for c in CONFIGS if (name or c.name) == c.name and feature in c.feature_names)
                        f = tables.feature_names.index(feature)
                        columns = slice(begin, begin := begin + width[output])
                        lo, hi = (int(offsets[f * batch + example + e]) for e in (0, 1))
                        kept = 0
                        for i in range(lo, hi):
                            factor = 1.0 if weights is None else float(weights[i])
                            expected[example, columns] += factor * single[i, columns]
                            kept += int(values[i]) != config.padding_idx
                        mean = (config.pooling if pooling == "config" else pooling) == "mean"
                        if mean:
                            expected[example, columns] /= max(1, kept)
                torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)


@METHODS
def test_collision_share_counts_ids_that_have_a_vector_in_common(method: Method) -> None:
    tables = make(method, "20%", std=0.5)
    for config in (CONFIGS[1], CONFIGS[2]):
        dense = tables.to_dense(config.name)
        _, inverse, times = torch.unique(dense, dim=0, return_inverse=True, return_counts=True)
        shared = float((times[inverse] > 1).double().mean())
        # Vectors of one scalar times a projection may be equal by chance.
        assert tables.collision_share(config.name) == pytest.approx(shared, abs=0.01)


# ---- initialization --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["50%", "2%"])
@METHODS
def test_initial_outputs_have_mean_zero_and_the_one_standard_deviation(method: Method, budget: str) -> None:
    configs = [TableConfig("large", 20_000, 16), TableConfig("middle", 4_000, 16), TableConfig("other", 6_000, 8)]
    for counts, std in ((None, None), ({c.name: shuffled_counts(c.num_embeddings or 0) for c in configs}, 0.3)):
        if counts is not None or method.kind not in NEEDS_COUNTS:
            tables = make(method, budget, configs, counts, std=std)
            sigma = std or 1 / sqrt(3 * 20_000)
            for config in configs:
                g = tables.plan.groups[0].layout
                if g.entries[config.name].variant == "dropped":
                    continue
                # Ids that share all their weights say nothing more, nor do columns that are hidden.
                shown = slice(next((stage.shows.get(config.name) for stage in tables.stages), None))
                outputs = torch.unique(tables.to_dense(config.name)[:, shown], dim=0).double()
                if getattr(method, "drops_lowest", False):  # ids without a row have zeros
                    outputs = outputs[outputs.any(dim=1)]
                    if not len(outputs):
                        continue
                own = [s.rows * s.width for s in g.training.slabs if s.name.split("/")[0] == config.name]
                shared = [s.rows * s.width for s in g.training.slabs]
                scalars = min(outputs.numel(), max(own, default=max(shared)))
                # The few rows of a small partition are in every output: they do not average out.
                few = min([scalars, *own])
                bound = max(0.05, 4 / sqrt(2 * (few if getattr(method, "operation", "") == "concat" else scalars)))
                assert abs(float(outputs.std()) / sigma - 1) < bound, config.name
                # Where an output sums up to four rows of one slab, the mean of the slab counts twice its deviation.
                assert abs(float(outputs.mean())) / sigma < max(0.05, 2 * 4 / sqrt(few)), config.name


@METHODS
def test_the_seed_decides_the_weights_and_not_the_addresses(method: Method) -> None:
    one, same, other = (make(method, "20%", seed=s) for s in (1, 1, 2))
    for (name, a, is_code), (_, b, _), (_, c, _) in zip(
        one.store.tensors(), same.store.tensors(), other.store.tensors()
    ):
        assert torch.equal(a, b), name
        assert is_code or not torch.equal(a, c), name
    assert one.collision_share("user") == other.collision_share("user")


# ---- gradients -------------------------------------------------------------------------------------------------------


@METHODS
def test_gradients_equal_finite_differences(method: Method) -> None:
    # Ordinary parameters can be moved to float64, where differences are exact enough.
    tables = make(method, "20%", std=0.5).double().train(not draws(method))
    values, offsets = random_bags(tables, 4, seed=5)
    direction = torch.randn(
        4, sum(tables.embedding_dims), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )

    def loss() -> Tensor:
        return (tables(values, offsets).double() * direction).square().sum()

    loss().backward()
    generator = torch.Generator().manual_seed(2)
    step = 1e-6
    for name, weight in tables.named_parameters():
        if weight.grad is None:
            continue
        touched = weight.grad.flatten().nonzero().flatten()
        some = touched[torch.randperm(len(touched), generator=generator)[:15]].tolist()
        some += torch.randint(weight.numel(), (5,), generator=generator).tolist()
        with torch.no_grad():
            for i in some:
                flat = weight.view(-1)
                kept = float(flat[i])
                flat[i] = kept + step
                up = float(loss())
                flat[i] = kept - step
                down = float(loss())
                flat[i] = kept
                gradient = float(weight.grad.flatten()[i])
                assert gradient == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-6), (name, i)


@METHODS
def test_sparse_gradients_equal_dense_ones_and_duplicates_accumulate(method: Method) -> None:
    dense, sparse = (make(method, "20%", std=0.5, sparse=s).train(not draws(method)) for s in (False, True))
    # A weight with sparse gradients is held by a module that has its name.
    weights, others = (
        {name.removesuffix(".weight"): parameter for name, parameter in tables.named_parameters()}
        for tables in (dense, sparse)
    )
    assert weights.keys() == others.keys()
    ids = random_ids(dense, 12, seed=4)
    ids[:, dense.feature_names.index("item")] %= 12
    ids = torch.cat([ids, ids[:5], ids[:2]])
    for tables in (dense, sparse):
        tables(ids).square().sum().backward()
    for name, weight in weights.items():
        a, b = weight.grad, others[name].grad
        if a is None or b is None:
            assert a is b, name
            continue
        assert not a.is_sparse and b.is_sparse != ("extra" in name), name
        torch.testing.assert_close(a, b.to_dense(), rtol=1e-5, atol=1e-6)
    # The same from every line alone, as often as it came.
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for line in ids:
        dense.zero_grad()
        dense(line.unsqueeze(0)).square().sum().backward()
        for name, weight in weights.items():
            total[name] += weight.grad if weight.grad is not None else 0
    for name, expected in total.items():
        gradient = others[name].grad
        if gradient is not None:
            torch.testing.assert_close(expected, gradient.to_dense(), rtol=1e-4, atol=1e-5)


@METHODS
@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_fused_training_equals_torch_optim(method: Method, name: str) -> None:
    method = method.for_training(10_000)  # no pruning inside these steps
    # With a learning rate at which no method's steps grow, in which the last bits would grow too.
    fused = make(method, "20%", optimizer={"kind": name, "lr": 0.005}, std=0.5)
    free = make(method, "20%", std=0.5)
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(free.parameters(), lr=0.005)
        if name == "sgd"
        else torch.optim.Adagrad(free.parameters(), lr=0.005, eps=1e-8)
    )
    for i in range(8):
        values, offsets = random_bags(fused, 16, seed=i)
        optimizer.zero_grad()
        for tables in (fused, free):
            (tables(values, offsets) - 0.2).square().sum().backward()
        optimizer.step()
    assert all(p.grad is None for p in fused.parameters())
    for (tensor, a, _), (_, b, _) in zip(fused.store.tensors(), free.store.tensors()):
        torch.testing.assert_close(a, b.detach(), rtol=1e-3, atol=2e-5, msg=tensor)


@METHODS
def test_training_lowers_the_loss_and_serving_keeps_what_was_learned(method: Method) -> None:
    steps = 60
    tables = make(method.for_training(steps), "60%", optimizer={"kind": "adagrad", "lr": 0.1})
    ids = random_ids(tables, 64, seed=0)
    ids[:, tables.feature_names.index("item")] %= 12
    target = torch.randn(64, sum(tables.embedding_dims), generator=torch.Generator().manual_seed(1)) * 0.1
    losses = []
    for _ in range(steps):
        loss = (tables(ids) - target).square().mean()
        losses.append(float(loss.detach()))
        if loss.requires_grad:
            loss.backward()
    if list(tables.plan.groups[0].layout.training.slabs):
        assert losses[-1] < 0.97 * losses[0]
    served = tables.eval().serve()
    if method.kind == "banded":
        # Served in several precisions, which is what the rows of each band become.
        for slab in tables.plan.groups[0].layout.serving.slabs:
            stored = row_format(slab.format)
            rows = StoredRows(stored, slab.width)
            rows.add(slab.rows)
            trained_rows = tables.store.slab(slab.name)
            trained_rows.copy_(rows.read(*stored.pack(trained_rows.clone()), torch.arange(slab.rows)))
    trained = tables(ids).detach()
    # Pruning ends at the served number of entries, so that nothing is lost on the way out.
    atol = 0.2 if method.kind == "pruned" else 1e-6 if folds(method) else 0
    torch.testing.assert_close(served(ids), trained, rtol=0, atol=atol)


# ---- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.core
@METHODS
def test_a_method_is_plain_data(method: Method) -> None:
    assert from_config(method.to_dict()) == method and from_config(method) is method
    assert type(method).kind == method.kind and method.kind in kinds()
    with pytest.raises(ValueError, match=f"method {method.kind} has no field 'nonsense'"):
        from_config({"kind": method.kind, "nonsense": 1})
    with pytest.raises(Exception, match="frozen"):
        method.kind_of_thing = 1  # type: ignore[attr-defined]
    assert method.for_training(100).kind == method.kind
    assert type(method).__doc__ is not None and type(method).__doc__ != Method.__doc__


def test_every_kind_is_an_attribute_of_the_package() -> None:
    import embtables.methods

    names = {type(m).__name__ for m in all_methods()}
    assert {"Full", "Hash", "MultiHash", "Unified", "Robe", "MixedDimension", "DropFeature"} <= names
    for m in all_methods():
        assert getattr(embtables.methods, type(m).__name__) is type(m)
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = embtables.methods.Nonsense
