"""Quantization-aware training: vectors are those of the served form, gradients those at the rounded rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core_cases import all_methods, falling_counts, method_id, projects, random_ids, rounds
from native_cases import jagged
from packed_rows import bf16
from torch import Tensor, nn

from embtables import EmbeddingTables, TableConfig, optimizers, plan
from embtables.formats import row_format
from embtables.lookup.rounding import RoundedRows
from embtables.methods import Method

TABLES = [
    TableConfig("item", 300, 8, ["item", "history"], padding_idx=2),
    TableConfig("user", 200, 8),
    TableConfig("city", 40, 16),
]
COUNTS = {table.name: falling_counts(table.num_embeddings or 0) for table in TABLES}
# A scale for each row, whatever its width, or none.
OWN = ("fp16", "bf16", "int8/1", "int4/1", "int2/1", "binary/1", "binary4/1")
PATTERNS: dict[str, Any] = {
    "item": {"kind": "full", "precision": "int2/7"},
    "user": {"kind": "full", "precision": "fp32"},
    "*": {"kind": "full", "precision": "binary/1"},
}


def make(method: Any, precision: str, optimizer: Any = None, share: str = "60%", **options: Any) -> EmbeddingTables:
    budget = None if method in ("full", PATTERNS) or getattr(method, "kind", "") == "full" else share
    solved = plan(TABLES, method, budget, COUNTS, optimizer, precision=precision)
    return EmbeddingTables(solved, std=0.5, **options)


def rounded_methods() -> list[Method]:
    return [m for m in all_methods() if m.kind != "drop_feature" and rounds(m)]


@pytest.mark.parametrize("precision", OWN)
@pytest.mark.parametrize("method", rounded_methods(), ids=method_id)
def test_training_computes_with_what_would_be_served(method: Method, precision: str) -> None:
    tables = make(method, precision, "adam")
    tables.fake_quantize()
    for step in range(3):
        given = jagged(tables, 40, step) if step else (random_ids(tables, 40),)
        served = tables.serve()(*given)
        trained = tables(*given)
        if projects(method):  # the last bit of a product of matrices depends on how many rows there are
            torch.testing.assert_close(trained, served, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(trained, served)
        trained.square().sum().backward()


def test_every_method_of_rows_is_rounded_and_others_are_refused() -> None:
    for method in all_methods():
        tables = make(method, "int4/1", share="15%")
        if not rounds(method):
            with pytest.raises(ValueError, match="serves something else than the rows that it trains"):
                tables.fake_quantize()
        else:
            tables.fake_quantize()
            assert (tables.store.rounding is None) == (not tables.store.weight_names)
    # In fp32 there is nothing to round, but for bands, which have formats of their own.
    for method in (method for method in all_methods() if method.kind != "banded"):
        tables = make(method, "fp32", share="15%")
        tables.fake_quantize()
        assert tables.store.rounding is None


@pytest.mark.parametrize("precision", ["int4/1", "binary/1", "int2/64"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("method", ["full", "compositional", "mixed_dimension", "robe", "multi_hash"])
def test_gradients_are_those_at_the_rounded_rows(method: str, sparse: bool, precision: str) -> None:
    """Those of a twin that has the rounded rows for its own, as nothing rounds them."""
    tables = make(method, precision, sparse=sparse)
    twin = make(method, precision, sparse=sparse)
    served = tables.serve()
    with torch.no_grad():
        for name, slab in twin.store.named_slabs():
            slab.copy_(served.store.read_slab(name))
    tables.fake_quantize()
    given = jagged(tables, 40, 0)
    for each in (tables, twin):
        each(*given).tanh().square().sum().backward()
    pairs = list(zip(tables.named_parameters(), twin.parameters()))
    assert pairs
    for (name, parameter), other in pairs:
        assert parameter.grad is not None and other.grad is not None
        found, expected = (p.grad.coalesce().to_dense() if p.grad.is_sparse else p.grad for p in (parameter, other))
        assert found.any()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("accumulates", [False, True])
def test_fused_optimizers_move_the_fp32_rows(accumulates: bool) -> None:
    """SGD in float64 on the rows themselves, with the gradient of a twin of rounded rows."""
    tables, twin = make("full", "int2/1", optimizers.SGD(lr=0.1)), make("full", "int2/1")
    with torch.no_grad():
        for name, slab in twin.store.named_slabs():
            slab.copy_(tables.serve().store.read_slab(name))
    before = {name: slab.double() for name, slab in tables.store.named_slabs()}
    tables.fake_quantize()
    ids = random_ids(tables, 40)
    twin(ids).tanh().sum().backward()
    if accumulates:
        with tables.accumulate():
            tables(ids).tanh().sum().backward()
    else:
        tables(ids).tanh().sum().backward()
    for name, slab in tables.store.named_slabs():
        width, start = twin.store.width(name), twin.store.start(name)
        gradient = twin.store.weight(width).grad
        assert gradient is not None
        expected = before[name] - 0.1 * gradient[start : start + len(slab)].double()
        torch.testing.assert_close(slab.double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(slab, tables.serve().store.read_slab(name))


def test_patterns_are_rounded_each_in_its_own_format() -> None:
    tables = make(PATTERNS, "int8")
    tables.fake_quantize()
    ids = random_ids(tables, 64)
    assert torch.equal(tables(ids), tables.serve()(ids))
    with torch.no_grad():
        unrounded = tables(ids)
    item, history, user, city = tables(ids).split([8, 8, 8, 16], dim=1)
    assert torch.equal(user, unrounded[:, 16:24])
    assert all(len(part[row].abs().unique()) <= 2 for part in (item, history) for row in range(64))
    assert all(len(row.abs().unique()) == 1 for row in city)


@pytest.mark.parametrize("precision", ["int4/7", "int2/7", "binary2/7", "int4/slab", "binary/slab"])
def test_common_scales_are_those_of_their_blocks_when_last_found(precision: str) -> None:
    """Against loops over rows and blocks: which scales are due, what they become, and what others stay."""
    table = TableConfig("item", 40, 4)
    tables = EmbeddingTables(plan([table], "full", optimizer="sgd", precision=precision), std=0.5)
    tables.fake_quantize()
    assert tables.store.rounding is not None
    rounds = tables.store.rounding.weights["weight_4"]
    assert isinstance(rounds, RoundedRows)
    kept = rounds.scales(0)
    assert kept is not None
    share = 40 if "slab" in precision else 7
    expected, seen, rows_in = bf16(kept), 0, row_format(precision)
    found_anew = 0
    for step in range(12):
        ids = torch.randint(40, (50, 1), generator=torch.Generator().manual_seed(step)) // (1 + step % 3)
        with torch.no_grad():
            tables.store.slab("item").mul_(1.1)
        slab = tables.store.slab("item").clone()
        for row in ids.flatten().tolist():
            if seen % (16 * share) == 0:
                own = rows_in.pack(slab[row // share * share : (row // share + 1) * share])[1]
                assert own is not None
                expected[row // share] = bf16(own)[0]
                found_anew += 1
            seen += 1
        vectors = tables(ids)
        assert bf16(kept) == expected
        scales = torch.tensor([expected[row // share] for row in ids.flatten().tolist()])
        assert torch.equal(vectors, rows_in.rounded(slab[ids.flatten()], scales))
        vectors.sum().backward()
    assert found_anew == -(-600 // (16 * share))


def test_rounding_is_a_part_of_the_state() -> None:
    """Scales in common are older than the rows, so that they cannot be found again from these."""
    tables = make("full", "int2/64", "adam")
    tables.fake_quantize()

    def train(each: EmbeddingTables, steps: range) -> list[Tensor]:
        losses = []
        for seed in steps:
            losses.append(each(random_ids(each, 200, seed)).tanh().square().sum())
            losses[-1].backward()
        return losses

    train(tables, range(10))
    state = copy.deepcopy(tables.state_dict())
    others = make("full", "int2/64", "adam", seed=5)
    others.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(train(tables, range(10, 14)), train(others, range(10, 14))))
    for (name, one), other in zip(tables.state_dict().items(), others.state_dict().values()):
        assert torch.equal(one, other), name
    fresh = make("full", "int2/64", "adam")
    fresh.load_state_dict({name: t for name, t in state.items() if "rounding" not in name})
    fresh.fake_quantize()
    ids = random_ids(fresh, 100)
    assert torch.equal(fresh(ids), fresh.serve()(ids)) and not torch.equal(others(ids), others.serve()(ids))


@pytest.mark.parametrize("precision", ["int4", "int2/64"])
@pytest.mark.parametrize("optimizer", ["adam", None])
def test_a_state_says_whether_rows_were_rounded(precision: str, optimizer: str | None) -> None:
    """Tables that load it go on as those did that it was taken of."""
    tables = make("full", precision, optimizer)
    plain = copy.deepcopy(tables.state_dict())
    ids = random_ids(tables, 100)
    tables.fake_quantize()
    rounded = copy.deepcopy(tables.state_dict())
    assert not torch.equal(tables(ids), make("full", precision, optimizer)(ids))

    others = make("full", precision, optimizer, seed=5)
    assert others.load_state_dict(rounded) == ([], [])
    assert others.store.rounding is not None and torch.equal(others(ids), tables(ids))
    # States of earlier versions have scales in common alone.
    older = make("full", precision, optimizer, seed=5)
    older.fake_quantize()
    older.load_state_dict({name: t for name, t in rounded.items() if not name.endswith("rounding.on")})
    assert torch.equal(older(ids), tables(ids))
    # A plain state leaves it to the tables, whose scales are those of the rows that they have then.
    both = make("full", precision, optimizer, seed=5)
    both.fake_quantize()
    assert both.load_state_dict(plain) == ([], [])
    assert torch.equal(both(ids), tables(ids))
    # Tables that cannot round take the weights.
    meta = make("full", precision, optimizer, device="meta")
    meta.load_state_dict(rounded, assign=True)
    assert torch.equal(meta(ids), tables(ids))
    with torch.no_grad():
        assert torch.equal(meta.serve()(ids), tables.serve()(ids))
    with pytest.raises(ValueError, match=r"served in other formats than this state of trained ones: .* and serve\(\)"):
        tables.serve().load_state_dict(rounded)
    other = plan(TABLES, "full", None, COUNTS, optimizer, precision=precision, hash_seed=9)
    with pytest.raises(ValueError, match="belongs to another plan"):
        EmbeddingTables(other).serve().load_state_dict(rounded)


def test_meta_tables_that_were_loaded_in_inference_mode_train() -> None:
    tables, meta = make("full", "int2", "adam"), make("full", "int2", "adam", device="meta")
    with torch.inference_mode():
        meta.load_state_dict(tables.state_dict(), assign=True)
    ids = random_ids(tables, 100)
    meta(ids).sum().backward()


@pytest.mark.parametrize("loads", [True, False])
def test_rounding_that_begins_in_inference_mode_trains(loads: bool) -> None:
    tables, others = make("full", "int2/64", "adam"), make("full", "int2/64", "adam")
    tables.fake_quantize()
    with torch.inference_mode():
        others.load_state_dict(tables.state_dict()) if loads else others.fake_quantize()
    ids = random_ids(tables, 100)
    for each in (tables, others):
        each(ids).sum().backward()
    assert torch.equal(others(ids), tables(ids))


def test_a_state_that_is_refused_leaves_no_scales() -> None:
    """They would be taken up with the next state that is loaded."""
    tables = make("full", "int2/64", "adam")
    other = EmbeddingTables(plan(TABLES, "full", None, COUNTS, "adam", precision="int2/64", hash_seed=9), std=5)
    for each in (tables, other):
        each.fake_quantize()
    fresh = make("full", "int2/64", "adam", seed=5)
    with pytest.raises(ValueError, match="belongs to another plan"):
        fresh.load_state_dict(other.state_dict())
    fresh.fake_quantize()
    fresh.load_state_dict(tables.state_dict())
    ids = random_ids(fresh, 100)
    assert torch.equal(fresh(ids), tables(ids))


def test_what_does_not_train_is_not_rounded() -> None:
    tables = make("full", "binary/1", "adam")
    ids = random_ids(tables, 30)
    with torch.no_grad():
        before = tables(ids)
    tables.fake_quantize()
    assert not torch.equal(tables(ids), before)
    with torch.no_grad():
        assert torch.equal(tables(ids), before)
    assert torch.equal(tables.eval()(ids), before)
    assert torch.equal(tables.to_dense("user"), make("full", "binary/1", "adam").to_dense("user"))


def test_scales_count_as_bytes_of_training_and_move_uncast() -> None:
    tables = make("full", "int2/64", "adam")
    before = tables.memory()
    tables.fake_quantize()
    # 300 and 200 rows of width 8, and 40 of width 16, by 64; and a count for each width.
    assert tables.memory().training_bytes - before.training_bytes == 2 * (5 + 4 + 1) + 2 * 8
    assert tables.memory().inference_bytes == before.inference_bytes
    rounding = tables.half().store.rounding
    assert rounding is not None
    assert {buffer.dtype for buffer in rounding.buffers()} == {torch.bfloat16, torch.int64}
    assert tables(random_ids(tables, 10)).dtype == torch.float16
    assert tables.finalize().store.rounding is None


def test_served_and_empty_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="served tables are not trained, so there is nothing to round"):
        make("full", "int4").finalize().fake_quantize()
    with pytest.raises(ValueError, match="tables on the meta device have no rows to round"):
        make("full", "int4", device="meta").fake_quantize()


def test_compiled_lookups_are_rounded_outside_of_graphs() -> None:
    """Where widths differ graphs ask for rows of −1, which are no rows, and which no update may touch."""
    tables, twin = make("mixed_dimension", "int2/7", "adam"), make("mixed_dimension", "int2/7", "adam")
    for each in (tables, twin):
        each.fake_quantize()
    compiled = torch.compile(tables, backend="eager")
    for step in range(2):
        ids = random_ids(tables, 20, step)
        found, expected = compiled(ids), twin(ids)
        torch.testing.assert_close(found, expected)
        for vectors in (found, expected):
            vectors.tanh().sum().backward()
    for one, other in zip(tables.store.stored().values(), twin.store.stored().values()):
        torch.testing.assert_close(one, other)


def best_loss(precision: str, quantizes: bool) -> float:
    """The best log loss of the served form after the second half of a training, on pairs that are held out.

    Of 60 users and 40 items a pair is liked where the product of two hidden vectors is positive.
    """
    generator = torch.Generator().manual_seed(2)
    hidden = [torch.randn(n, 4, generator=generator) for n in (60, 40)]
    ids = torch.stack([torch.randint(n, (12_000,), generator=generator) for n in (60, 40)], dim=1)
    labels = ((hidden[0][ids[:, 0]] * hidden[1][ids[:, 1]]).sum(1) > 0).float()
    configs = [TableConfig("user", 60, 8), TableConfig("item", 40, 8)]
    solved = plan(configs, "full", None, None, optimizers.Adam(lr=0.01), precision=precision)
    tables = EmbeddingTables(solved, seed=2)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    dense = torch.optim.Adam(head.parameters(), 0.01)

    def loss(tables: EmbeddingTables, rows: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(head(tables(ids[rows])).squeeze(1), labels[rows])

    losses = []
    for epoch in range(16):
        if quantizes and epoch == 8:
            tables.fake_quantize()
        for rows in torch.randperm(8_000, generator=generator).split(500):
            dense.zero_grad()
            loss(tables, rows).backward()
            dense.step()
        with torch.no_grad():
            losses.append(float(loss(tables.serve(), torch.arange(8_000, 12_000))))
    return min(losses[8:])


@pytest.mark.parametrize("precision", ["int2/1", "binary/1"])
def test_what_is_trained_rounded_is_better_than_what_is_rounded_after_training(precision: str) -> None:
    assert best_loss(precision, quantizes=True) < 0.97 * best_loss(precision, quantizes=False)


@pytest.mark.parametrize("way", ["to_empty", "assign"])
def test_rounding_survives_the_meta_device(way: str) -> None:
    tables = make("full", "int4/64", optimizers.SGD(lr=0.1))
    tables.fake_quantize()
    state, ids = copy.deepcopy(tables.state_dict()), random_ids(tables, 40)
    moved = copy.deepcopy(tables).to("meta")
    if way == "to_empty":
        moved.to_empty(device="cpu")
    moved.load_state_dict(state, assign=way == "assign")
    for each in (tables, moved):
        for _ in range(3):
            each(ids).square().sum().backward()
    expected = tables.state_dict()
    for name, tensor in moved.state_dict().items():
        if isinstance(tensor, Tensor):
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
