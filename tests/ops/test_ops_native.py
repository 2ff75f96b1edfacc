"""Native lookups against the reference operators and float64, for every method, optimizer, dtype and thread count."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import (
    TRAINED_PROJECTIONS,
    all_methods,
    falling_counts,
    in_turn,
    method_id,
    random_ids,
    shares_scalars,
    shuffled_counts,
)
from native_cases import assert_same, jagged, run_each, some_ids, state, step
from torch import Tensor

from embtables import EmbeddingTables, Plan, TableConfig, ops, plan
from embtables.methods import Method, from_config
from embtables.optimizers import SGD, Adagrad, Adam, RowWiseAdagrad, averaged

pytestmark = pytest.mark.skipif(ops.instructions() is None, reason="the native library was not built")

METHODS = pytest.mark.parametrize("method", all_methods(), ids=method_id)
# Of SGD a small rate: products of factors, as those of low_rank, would grow until their last bits are the first ones.
# A large eps keeps steps smooth in the gradient: where it is a sum near 0, its sign is a matter of last bits.
OPTIMIZERS = [SGD(lr=0.01), RowWiseAdagrad(lr=0.1), Adagrad(lr=0.1, eps=0.01), Adam(lr=0.1, eps=0.01), None]
AVERAGED = [averaged(optimizer, horizon) for optimizer, horizon in zip(OPTIMIZERS[:-1], [1, 2, 1000, 2])]


def suits(method: Method, optimizer: Any) -> bool:
    return not (shares_scalars(method) and optimizer is not None and optimizer.is_row_wise())


def pairs(each: Sequence[tuple[Method, Any]]) -> pytest.MarkDecorator:
    """Methods with optimizers, but for those that do not go together."""
    named = [
        pytest.param(method, optimizer, id=f"{method_id(method)}-{optimizer.kind if optimizer else 'none'}")
        for method, optimizer in each
        if suits(method, optimizer)
    ]
    return pytest.mark.parametrize(("method", "optimizer"), named)


def one_each(optimizers: Sequence[Any]) -> pytest.MarkDecorator:
    """Every method with one of the optimizers that go with it."""
    suitable = [(method, [each for each in optimizers if suits(method, each)]) for method in all_methods()]
    return pairs([(method, own[i % len(own)]) for i, (method, own) in enumerate(suitable)])


# Between them every method with every optimizer.
MOST_PAIRS = pairs(in_turn(all_methods(), OPTIMIZERS[::-1], 3))
OTHER_PAIRS = pairs(in_turn(all_methods(), OPTIMIZERS, 2))

CONFIGS = [
    TableConfig("user", 4000, 16, on_out_of_range="hash", padding_idx=3),
    TableConfig("item", 900, 16, ["item", "history"], pooling="mean", on_out_of_range="oov"),
    TableConfig("city", 40, 16, padding_idx=0),
    TableConfig("slot", 3, 8),
    TableConfig("tag", 700, 6, pooling="mean"),
]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@cache
def planned(method: str, optimizer: Any) -> Plan:
    # Frequencies in no order: ids are mapped to ranks.
    counts = {
        c.name: shuffled_counts(c.num_embeddings) if c.name == "item" else falling_counts(c.num_embeddings)
        for c in CONFIGS
    }
    settings = json.loads(method)
    return plan(CONFIGS, settings, None if settings["kind"] == "full" else "40%", counts, optimizer)


def make(method: Method, optimizer: Any, **options: Any) -> EmbeddingTables:
    return EmbeddingTables(planned(json.dumps(method.to_dict()), optimizer), seed=3, std=0.5, **options)


# ---- against the reference -------------------------------------------------------------------------------------------


@MOST_PAIRS
def test_steps_equal_the_reference(method: Method, optimizer: Any) -> None:
    ours, reference = make(method, optimizer), make(method, optimizer)
    assert ours.lookups.ops == "native"
    for seed in range(3):
        ids = some_ids(ours, 300, seed)
        ids = ids if seed else ids.clamp(-5, 2**31 - 1).int()
        got = step(ours, (ids,), seed)
        with ops.using("reference"):
            expected = step(reference, (ids,), seed)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    assert_same(ours, reference)


@pytest.mark.parametrize(
    ("method", "bags"),
    in_turn(all_methods(), list(product(["config", "sum", "mean"], ["plain", "weighted"])), 2),
    ids=lambda value: method_id(value) if isinstance(value, Method) else "-".join(value),
)
def test_bags_equal_the_reference(method: Method, bags: tuple[str, str]) -> None:
    pooling, weighted = bags[0], bags[1] == "weighted"
    optimizer = Adagrad(lr=0.1, l2=0.01)
    ours, reference = make(method, optimizer), make(method, optimizer)
    for seed in range(2):
        ids, offsets = jagged(ours, 90, seed)
        weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) + 0.5 if weighted else None
        got = step(ours, (ids, offsets.int() if seed else offsets, weights), seed, pooling=pooling)
        with ops.using("reference"):
            expected = step(reference, (ids, offsets, weights), seed, pooling=pooling)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    assert_same(ours, reference)


@OTHER_PAIRS
def test_outputs_one_by_one_equal_the_reference(method: Method, optimizer: Any) -> None:
    ours, reference = make(method, optimizer), make(method, optimizer)

    def run(tables: EmbeddingTables, seed: int) -> dict[str, Tensor]:
        ids, offsets = jagged(tables, 70, seed)
        found = tables.lookup(ids, offsets, pooling={"history": None, "tag": "sum", "city": None})
        loss = sum((v * torch.linspace(-1, 1, v.numel()).view(v.shape)).sum() for v in found.values())
        if loss.requires_grad:
            loss.backward()
        return found

    for seed in range(2):
        got = run(ours, seed)
        with ops.using("reference"):
            expected = run(reference, seed)
        assert list(got) == list(expected)
        for name in got:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=2e-5)
    assert_same(ours, reference)


def test_unpooled_vectors_come_in_the_order_of_the_ids() -> None:
    tables = EmbeddingTables(plan([TableConfig("b", 50, 4), TableConfig("a", 60, 4, ["x", "y"])], "hash", "50%"))
    ids, offsets = jagged(tables, 30, 0)
    got = tables(ids, offsets, pooling=None)
    with ops.using("reference"):
        assert torch.equal(got, tables(ids, offsets, pooling=None))
        columns = random_ids(tables, 20)
        expected = tables(columns, pooling=None)
    assert torch.equal(tables(columns, pooling=None), expected)


def test_clipping_spreads_nan_over_its_row_as_in_the_reference() -> None:
    index, hyper = torch.tensor([0, 1, 2]), torch.tensor([0.1, 0.0, 1e-8, 0.9, 0.99, 0.5], dtype=torch.float64)
    weight, grad = torch.randn(4, 16), torch.randn(3, 16)
    grad[1, 2] = float("nan")
    results = []
    for name in ("native", "reference"):
        results.append(weight.clone())
        with ops.using(name):
            state = [torch.zeros(4, 16), torch.zeros(4, 16), torch.tensor(1)]
            torch.ops.embtables.update_(results[-1], state, index, grad, hyper, "adam")
    assert results[1].isnan().all(1).tolist() == [False, True, False, False]
    torch.testing.assert_close(*results, equal_nan=True)


@pairs(
    in_turn(
        all_methods(),
        [
            kind(lr=0.1, l2=l2, clip_row_norm=clip)
            for l2, clip in ((0.1, 0.0), (0.0, 0.05), (0.1, 0.05))
            for kind in (SGD, RowWiseAdagrad, Adagrad, Adam)
        ],
        2,
    )
)
def test_clipping_and_decay_equal_the_reference(method: Method, optimizer: Any) -> None:
    ours, reference = make(method, optimizer), make(method, optimizer)
    ids = some_ids(ours, 200, 1)
    step(ours, (ids,), 1)
    with ops.using("reference"):
        step(reference, (ids,), 1)
    assert_same(ours, reference)


@pytest.mark.core
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@METHODS
def test_gradients_equal_the_reference(method: Method, sparse: bool) -> None:
    ours, reference = make(method, None, sparse=sparse), make(method, None, sparse=sparse)
    for seed in range(2):  # they add up
        ids = some_ids(ours, 300, seed)
        step(ours, (ids,), seed)
        with ops.using("reference"):
            step(reference, (ids,), seed)
    for parameter in ours.parameters():
        if parameter.grad is not None and parameter.ndim == 2 and sparse and parameter.grad.is_sparse:
            rows = parameter.grad.coalesce().indices()
            assert rows.unique().numel() == rows.numel()
    assert_same(ours, reference)


# ---- against float64 -------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 32, 48, 64, 100, 128, 129])
@pytest.mark.parametrize("kind", ["full", "hash"])
def test_vectors_and_updates_equal_float64(kind: str, dim: int) -> None:
    """Full rows by plain loops in float64: sum over occurrences, then Adagrad."""
    config = TableConfig("t", 200, dim)
    tables = EmbeddingTables(plan([config], kind, None if kind == "full" else "50%", optimizer=Adagrad(lr=0.1)), std=1)
    ids = random_ids(tables, 500)
    before = tables.store.slab("t").double().numpy().copy()
    gradient = torch.randn(500, dim)
    out = tables(ids)
    block = tables.lookups.blocks[0]
    row = block.block.address(ids.t(), block.lookup.unsqueeze(1))[0].rows[0].flatten().numpy()
    np.testing.assert_array_equal(out.detach().numpy(), before[row].astype(np.float32))
    out.backward(gradient)
    expected, total = before.copy(), np.zeros_like(before)
    summed = np.zeros_like(before)
    np.add.at(summed, row, gradient.double().numpy())
    total += summed**2
    expected -= 0.1 * summed / (np.sqrt(total) + 1e-8) * (total > 0)
    np.testing.assert_allclose(tables.store.slab("t").numpy(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@one_each(OPTIMIZERS)
def test_half_precision_is_as_close_to_float32_as_its_format(
    method: Method, optimizer: Any, dtype: torch.dtype
) -> None:
    """One step of tables in 16 bits: every weight within a few units in the last place of the step in 32 bits."""
    half, single = make(method, optimizer).to(dtype), make(method, optimizer)
    weights_of = half.store.state_dict().items()
    single.store.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in weights_of})
    ids = some_ids(half, 60, 0)
    out = half(ids)
    assert out.dtype == dtype
    expected = single(ids)
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(out.float(), expected, rtol=3 * unit, atol=unit)
    gradient = torch.randint(-4, 5, out.shape) / 8
    out.backward(gradient.to(dtype))
    expected.backward(gradient)
    weights = {n: t for n, t in single.named_parameters()} if optimizer is None else single.store.state_dict()
    mine = {n: t for n, t in half.named_parameters()} if optimizer is None else half.store.state_dict()
    for name, tensor in mine.items():
        if not tensor.is_floating_point():
            continue
        ours, theirs = (tensor.grad, weights[name].grad) if optimizer is None else (tensor, weights[name])
        # Gradients that are sums of rounded products near 0 have an error of the size of their terms.
        torch.testing.assert_close(ours.float(), theirs, rtol=8 * unit, atol=16 * unit)


def test_conversions_round_to_nearest_and_ties_to_even() -> None:
    """Mean pooling of one id divides by one: float32 to 16 bits and back for every kind of number, as PyTorch does."""
    values = torch.cat(
        [torch.randn(4000) * 10.0 ** torch.randint(-9, 6, (4000,)), torch.tensor([0.0, -0.0, 65504.0, 65520.0, 1e30])]
    )
    values = torch.cat([values, torch.arange(0, 4096) * 2.0**-25, 1 + torch.arange(0, 4096) * 2.0**-12])
    for dtype in (torch.bfloat16, torch.float16):
        tables = EmbeddingTables(plan([TableConfig("t", values.numel(), 1)], "full", optimizer=SGD(lr=1.0))).to(dtype)
        tables.store.slab("t").zero_()
        out = tables(torch.arange(values.numel()).unsqueeze(1))
        # w − 1·(−v) = v, computed in float32 and stored in 16 bits; v is exact where it came from 16 bits.
        gradient = -values.to(dtype).unsqueeze(1)
        out.backward(gradient)
        assert torch.equal(tables.store.slab("t").squeeze(1), values.to(dtype))
        halved = EmbeddingTables(plan([TableConfig("t", values.numel(), 1)], "full", optimizer=SGD(lr=0.3))).to(dtype)
        halved.store.slab("t").zero_()
        halved(torch.arange(values.numel()).unsqueeze(1)).backward(gradient)
        rate = torch.tensor(0.3, dtype=torch.float32)
        assert torch.equal(halved.store.slab("t").squeeze(1), (0 - rate * gradient.float()).to(dtype).squeeze(1))


# ---- threads ---------------------------------------------------------------------------------------------------------


@one_each([*OPTIMIZERS, *AVERAGED])
def test_threads_leave_the_same_bits(method: Method, optimizer: Any) -> None:
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        tables = make(method, optimizer)
        outs = [step(tables, (some_ids(tables, 5000, seed),), seed) for seed in range(2)]
        ids, offsets = jagged(tables, 3000, 2)
        outs.append(step(tables, (ids, offsets), 2))
        results.append((outs, state(tables)))
    for outs, weights in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs, results[0][0]))
        for name, tensor in weights.items():
            assert torch.equal(tensor, results[0][1][name]), name


def test_two_trainers_in_two_threads_do_not_disturb_each_other() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def train(seed: int) -> dict[str, Tensor]:
        tables = make(from_config("compositional"), Adam())
        for number in range(5):
            step(tables, (some_ids(tables, 3000, seed + number),), number)
        return state(tables)

    alone = [train(seed) for seed in (0, 100)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(train, (0, 100)))
    for a, b in zip(alone, together):
        assert all(torch.equal(a[name], b[name]) for name in a)


# ---- which way a lookup goes -----------------------------------------------------------------------------------------


@pytest.mark.core
def test_bad_ids_raise_what_the_reference_raises_and_change_nothing() -> None:
    for optimizer in (Adam(), None):
        tables = make(from_config("hash"), optimizer)
        before = copy.deepcopy(state(tables))
        ids = random_ids(tables, 5000)
        ids[4321, tables.feature_names.index("slot")] = 3
        with pytest.raises(IndexError, match="feature 'slot' holds id 3, but table 'slot' has the ids 0 … 2"):
            tables(ids)
        flat, offsets = ids.t().reshape(-1), torch.arange(ids.numel() + 1)
        with pytest.raises(IndexError, match="feature 'slot' holds id 3"):
            tables.lookup(flat, offsets)
        offsets[7] = 9
        with pytest.raises(ValueError, match="offsets must rise"):
            tables(random_ids(tables, 5000).t().reshape(-1), offsets)
        assert all(torch.equal(before[name], tensor) for name, tensor in state(tables).items())


def test_moved_weights_are_found() -> None:
    tables = make(from_config("compositional"), None)
    ids = random_ids(tables, 50)
    tables(ids)
    with torch.no_grad():
        for parameter in tables.parameters():
            parameter.data = parameter.data.clone() * 2
    with ops.using("reference"):
        expected = tables(ids)
    torch.testing.assert_close(tables(ids), expected)


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["copy", "pickle"])
def test_copies_look_up_their_own_weights(copies: Any) -> None:
    tables = make(from_config("hash"), SGD(lr=1.0))
    ids = random_ids(tables, 50)
    first = tables(ids).detach()
    other = copies(tables)
    step(other, (ids,), 0)
    assert torch.equal(tables(ids).detach(), first) and not torch.equal(other(ids), first)


def test_weights_of_ids_get_their_gradient() -> None:
    tables = make(from_config("hash"), SGD())
    ids, offsets = jagged(tables, 20, 0)
    weights = torch.ones(ids.shape, requires_grad=True)
    tables(ids, offsets, weights).sum().backward()
    assert weights.grad is not None and weights.grad.abs().sum() > 0


def test_functional_transforms_go_through_pytorch() -> None:
    tables = make(from_config("hash"), None)
    ids = random_ids(tables, 10)
    parameters = dict(tables.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(tables, p, (ids,)).square().sum())(parameters)
    tables(ids).square().sum().backward()
    for name, parameter in tables.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("hash", Adam(lr=0.1)),
        ("compositional", RowWiseAdagrad(lr=0.1)),
        ("mixed_dimension", Adam(lr=0.1)),
        (TRAINED_PROJECTIONS, Adam(lr=0.1)),
    ],
    ids=["hash", "compositional", "mixed_dimension", "trained projections"],
)
def test_compiled_steps_leave_the_same_weights(kind: Any, optimizer: Any) -> None:
    torch.compiler.reset()
    eager, compiled = make(from_config(kind), optimizer), make(from_config(kind), optimizer)
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        ids = some_ids(eager, 64 + seed, seed)
        step(eager, (ids,), seed)
        out = graph(ids)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)))
    left, right = state(eager), state(compiled)
    if kind in ("hash", "mixed_dimension"):
        assert all(torch.equal(left[name], right[name]) for name in left)
    else:  # whose gradients depend on weights: PyTorch combines them in a graph
        assert_same(eager, compiled)


def test_exported_graphs_hold_pytorchs_own_operators() -> None:
    tables = make(from_config("compositional"), None).eval()
    ids = random_ids(tables, 8)
    with torch.no_grad():
        exported = torch.export.export(tables, (ids,))
        torch.testing.assert_close(exported.module()(ids), tables(ids))
    assert not [n for n in exported.graph.nodes if "look_up" in str(n.target)]


def test_small_and_empty_batches() -> None:
    for method in all_methods():
        tables = make(method, Adagrad())
        for batch in (0, 1):
            out = tables(random_ids(tables, batch))
            assert out.shape == (batch, sum(tables.embedding_dims))
            if out.requires_grad:
                out.sum().backward()
        nothing = torch.zeros(len(tables.feature_names) * 2 + 1, dtype=torch.int64)
        assert torch.equal(
            tables(torch.zeros(0, dtype=torch.int64), nothing), torch.zeros(2, sum(tables.embedding_dims))
        )


def test_the_graph_check_says_when_a_weight_changed_before_its_gradient_was_taken() -> None:
    tables = make(from_config("compositional"), None)
    out = tables(random_ids(tables, 8))
    with torch.no_grad():
        next(tables.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- between a lookup and its gradient -------------------------------------------------------------------------------


@one_each([*AVERAGED, *OPTIMIZERS[:-1]])
def test_two_lookups_before_a_backward(method: Method, optimizer: Any) -> None:
    """The second update must not read what the first one wrote: gradients are of the rows as they were looked up."""
    ours, reference = make(method, optimizer), make(method, optimizer)
    for tables, name in ((ours, "native"), (reference, "reference")):
        with ops.using(name):
            first, second = tables(some_ids(tables, 100, 0)), tables(some_ids(tables, 100, 1))
            (first * second).sum().backward()
    assert_same(ours, reference)


def test_tables_may_be_gone_before_backward() -> None:
    ids = torch.randint(3, (5000, 6))
    for method in all_methods():
        out = make(method, Adagrad())(ids)
        filler = [torch.full((4000, 16), 7.0) for _ in range(8)]
        if out.requires_grad:
            out.sum().backward()
        assert all(bool((f == 7).all()) for f in filler)


def test_tables_may_move_before_backward() -> None:
    """In the same type they get the right gradient; cast to another one nothing is lost in silence."""
    for kind in ("hash", "compositional", "mixed_dimension", TRAINED_PROJECTIONS):
        ours, reference = make(from_config(kind), None), make(from_config(kind), None)
        ids = some_ids(ours, 200, 0)
        step(reference, (ids,), 0)
        out = ours(ids)
        for parameter in ours.parameters():
            parameter.data = parameter.data.clone()
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)))
        assert_same(ours, reference)
        fused = make(from_config(kind), Adam())
        out = fused(ids)
        fused.to(torch.bfloat16)
        with pytest.raises(RuntimeError, match="cast to another type, .* call backward first"):
            out.sum().backward()
        fused(ids).float().sum().backward()


def test_changed_tables_are_noticed_where_the_gradient_depends_on_them() -> None:
    for optimizer in (SGD(), None):
        for kind, depends in (("hash", False), ("compositional", True)):
            tables = make(from_config(kind), optimizer)
            out = tables(random_ids(tables, 20))
            tables.load_state_dict({name: tensor.clone() for name, tensor in tables.state_dict().items()})
            if not depends:
                out.sum().backward()
                continue
            with pytest.raises(RuntimeError, match="changed between a lookup and its backward|modified by an inplace"):
                out.sum().backward()


def test_a_cast_is_never_looked_up_in_the_old_type() -> None:
    tables = make(from_config("hash"), None)
    ids = random_ids(tables, 20)
    for _ in range(20):
        tables(ids)
        tables.half().bfloat16()
        assert tables(ids).dtype == torch.bfloat16
        tables.float()
        assert tables(ids).dtype == torch.float32


def test_forward_mode_derivatives_go_through_pytorch() -> None:
    import torch.autograd.forward_ad as forward_ad

    tables = make(from_config("hash"), None)
    ids = random_ids(tables, 5)
    with forward_ad.dual_level():
        weight = tables.store.weight_16
        dual = forward_ad.make_dual(weight, torch.ones_like(weight))
        out = torch.func.functional_call(tables, {"store.weight_16": dual}, (ids,))
        assert forward_ad.unpack_dual(out).tangent is not None


def test_compiled_lookups_name_the_wrong_id() -> None:
    torch.compiler.reset()
    tables = make(from_config("hash"), SGD())
    graph = torch.compile(tables, fullgraph=True, backend="aot_eager")
    ids = random_ids(tables, 8)
    graph(ids)
    ids[3, tables.feature_names.index("slot")] = 77
    with pytest.raises(IndexError, match="feature 'slot' holds id 77, but table 'slot' has the ids 0 … 2"):
        graph(ids)


def test_compiled_bags_equal_eager_ones() -> None:
    torch.compiler.reset()
    tables = make(from_config("hash"), SGD())
    graph = torch.compile(tables, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        ids, offsets = jagged(tables, 10 + seed, seed)
        assert torch.equal(graph(ids, offsets), tables(ids, offsets))


# ---- choosing --------------------------------------------------------------------------------------------------------


def test_the_environment_chooses(tmp_path: Path) -> None:
    code = "from embtables import ops; print(ops.backend())"
    *right, wrong = run_each(code, [{"EMBTABLES_OPS": name} for name in ("reference", "native", "fast")], tmp_path)
    assert [result.stdout.strip() for result in right] == ["reference", "native"]
    assert wrong.returncode and "EMBTABLES_OPS must be native or reference, not 'fast'" in wrong.stderr


def test_one_notice_where_there_is_no_library(tmp_path: Path) -> None:
    """As with an installation that found no compiler: the library's file is out of sight."""
    code = (
        "import pathlib; real = pathlib.Path.is_file\n"
        "pathlib.Path.is_file = lambda self: self.name != '_native.so' and real(self)\n"
        "from embtables import EmbeddingTables, TableConfig, ops, plan\n"
        "tables = EmbeddingTables(plan([TableConfig('t', 9, 4)], 'full', optimizer='adam'))\n"
        "tables(torch.tensor([[1]])).sum().backward(); print(ops.backend())"
    )
    environments = [{}, {"EMBTABLES_OPS": "native"}, {"EMBTABLES_OPS": "reference"}]
    result, insisted, aside = run_each(code, environments, tmp_path)
    assert result.stdout.strip() == "reference", result.stderr
    assert result.stderr.count("the native library was not built") == 1
    assert insisted.returncode and "EMBTABLES_OPS=native: the native library was not built" in insisted.stderr
    assert aside.stdout.strip() == "reference" and aside.stderr == ""
