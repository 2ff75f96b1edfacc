"""Codes, lists and projections in native code: against loops over single ids in float64, and against PyTorch.

The methods are those of other packages, in ``third_party``: nothing in here is known to the library by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from itertools import product
from typing import Any

import native_cases
import pytest
import scalar
import torch
from core_cases import in_turn, random_ids
from native_cases import assert_same, jagged, state, step
from third_party.frequent_rows import FrequentRows
from third_party.low_rank_hashes import LowRankHashes
from third_party.metadata import Metadata
from third_party.product_quantization import ProductQuantization
from torch import Tensor

from embtables import EmbeddingTables, TableConfig, ops, plan
from embtables.methods import Method
from embtables.optimizers import SGD, Adagrad, Adam, FusedOptimizer, RowWiseAdagrad

pytestmark = pytest.mark.skipif(ops.instructions() is None, reason="the native library was not built")

TABLES = [
    TableConfig("user", 3000, 16, on_out_of_range="oov", padding_idx=3),
    TableConfig("item", 250, 16, ["item", "history"], pooling="mean", on_out_of_range="hash", padding_idx=0),
    TableConfig("city", 40, 8),
    TableConfig("tag", 200, 6, pooling="mean"),
]
METHODS: dict[str, Method] = {
    "codes": ProductQuantization(),
    "codes of ranks": ProductQuantization(code_dtype="int16", remap="int64"),
    "codes, projected": ProductQuantization(code_dtype="int64", inner=10, num_parts=3, remap="int16"),
    "mean of lists": Metadata(),
    "sum of lists": Metadata(combine="sum", longest=5, offset_dtype="int64", value_dtype="int32"),
    "mean of lists, projected": Metadata(inner=7, offset_dtype="int16", value_dtype="int64"),
    "sum of lists, projected": Metadata(combine="sum", inner=24),
    "hash, projected": LowRankHashes(num_hashes=1),
    "sum, projected": LowRankHashes(),
    "sum with signs, projected": LowRankHashes(signs=True, rank=8),
    "mean with signs, projected": LowRankHashes(combine="mean", signs=True),
    "product, projected": LowRankHashes(combine="product"),
    "product of two, projected": LowRankHashes(combine="product", num_hashes=2, rank=16),
    "concat, projected": LowRankHashes(combine="concat", num_hashes=4),
    "one row, projected twice": LowRankHashes(num_hashes=1, narrowed=True),
    "mean with signs, projected twice": LowRankHashes(combine="mean", signs=True, rank=8, narrowed=True),
    "product, projected twice": LowRankHashes(combine="product", narrowed=True),
    "concat, projected twice": LowRankHashes(combine="concat", num_hashes=4, narrowed=True),
    "one wide row, projected": LowRankHashes(combine="concat", num_hashes=1, rank=17),
    "concat and zeros": LowRankHashes(combine="concat", num_hashes=2, rank=2, widened=False),
    "one row and zeros": LowRankHashes(combine="concat", num_hashes=1, widened=False),
    "rest of one row": FrequentRows(rest="capped"),
    "rest, hashed": FrequentRows(rest="hashed", remap="int32"),
    "rest, hashed, and narrow rows": FrequentRows(rest="hashed", narrow=True),
    "rest of narrow rows": FrequentRows(rest="row", narrow=True, remap="int64"),
    "rest of sums": FrequentRows(rest="sum"),
    "rest of means with signs": FrequentRows(rest="mean", remap="int16"),
    "rest of products": FrequentRows(rest="product", narrow=True),
    "rest, joined": FrequentRows(rest="concat", narrow=True),
    "rest of codes": FrequentRows(rest="codes", remap="int16"),
    "rest of blocks": FrequentRows(rest="blocks"),
    "rest of blocks, and narrow rows": FrequentRows(rest="blocks", narrow=True, remap="int16"),
    "rest of sums, projected": FrequentRows(rest="projected", narrow=True),
    "rest of nothing": FrequentRows(rest="nothing"),
}
RESTS = [name for name in METHODS if name.startswith("rest")]
METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
# A large eps keeps steps smooth in the gradient, whose last bits are nobody's business.
FUSED: list[FusedOptimizer] = [SGD(lr=0.01), RowWiseAdagrad(lr=0.1), Adagrad(lr=0.1, eps=0.01), Adam(lr=0.1, eps=0.01)]


def kind_of(optimizer: FusedOptimizer | None) -> str:
    return optimizer.kind if optimizer else "none"


OPTIMIZER = pytest.mark.parametrize("optimizer", [*FUSED, None], ids=kind_of)


def pairs(each: int) -> pytest.MarkDecorator:
    """Every method with `each` of the optimizers."""
    named = [
        pytest.param(METHODS[name], optimizer, id=f"{name}-{kind_of(optimizer)}")
        for name, optimizer in in_turn(list(METHODS), [*FUSED, None], each)
    ]
    return pytest.mark.parametrize(("method", "optimizer"), named)


@pytest.fixture
def any_threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(
    method: Method, optimizer: FusedOptimizer | None, tables: Sequence[TableConfig] = TABLES, **options: Any
) -> EmbeddingTables:
    return EmbeddingTables(plan(tables, method, None, optimizer=optimizer), seed=3, std=0.5, **options)


some_ids = partial(native_cases.some_ids, padded="history")


# ---- one id at a time, in float64 ------------------------------------------------------------------------------------


class Loops:
    """Vectors from the methods' formulas; leaves in float64 take the gradients."""

    def __init__(self, tables: EmbeddingTables) -> None:
        self.tables, store = tables, tables.store
        form = tables.plan.groups[0].layout.training
        self.method: Any = tables.plan.groups[0].method
        self.leaves = {slab.name: self._leaf(store.slab(slab.name)) for slab in form.slabs}
        self.leaves |= {extra.name: self._leaf(store.extra(extra.name)) for extra in form.extras}
        self.codes = {code.name: store.code(code.name).tolist() for code in form.codes}
        self.touched: set[tuple[str, int]] = set()

    @staticmethod
    def _leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().double().clone().requires_grad_()

    def row(self, slab: str, number: int) -> Tensor:
        self.touched.add((slab, number))
        return self.leaves[slab][number]

    def combination(self, name: str, x: int) -> Tensor:
        method = self.method
        if isinstance(method, ProductQuantization):
            x = self.codes[f"{name}/remap"][x] if method.remap else x
            return torch.cat([self.row(f"{name}/{j}", code) for j, code in enumerate(self.codes[f"{name}/codes"][x])])
        if isinstance(method, Metadata):
            attributes = self.attributes(name, x)
            total = torch.zeros(self.leaves[f"{name}/attributes"].shape[1], dtype=torch.float64)
            for attribute in attributes:
                total = total + self.row(f"{name}/attributes", attribute)
            return total / max(1, len(attributes)) if method.combine == "mean" else total
        if isinstance(method, FrequentRows):
            return self.frequent(name, x)
        seed, numbers = self.tables.plan.hash_seed, range(method.num_hashes)
        rows = [self.row(name, scalar.hash_address(x, seed, name, j, method.rows)) for j in numbers]
        if method.signs:
            rows = [row * scalar.sign_of(x, scalar.seed_of(seed, name, "sign", j)) for j, row in enumerate(rows)]
        if method.combine == "concat":
            return torch.cat(rows)
        result = reduce(torch.mul if method.combine == "product" else torch.add, rows)
        return result / len(rows) if method.combine == "mean" else result

    def frequent(self, name: str, x: int) -> Tensor:
        group, config = self.tables.plan.groups[0].group.name, next(t for t in TABLES if t.name == name)
        rank, dim = self.codes[f"{name}/remap"][x] if self.method.remap else x, config.embedding_dim
        assert config.rows is not None
        held = min(self.method.first, config.rows // 3)
        if rank < held:
            return self.row(f"{name}/first", rank)
        rank -= held
        if self.method.narrow:
            if rank < held:
                return self.row(f"{name}/narrow", rank) @ self.leaves[f"{group}/widen_4_{dim}"]
            rank -= held
        return self.of_rest(name, x, rank, dim, f"{group}/widen_3_{dim}")

    def of_rest(self, name: str, x: int, rank: int, dim: int, widen: str) -> Tensor:
        """``x``: the id, from which signs come; ``rank``: how many of the rest come before it."""
        seed, rest, kind = self.tables.plan.hash_seed, f"{name}/rest", self.method.rest
        if kind in ("capped", "row"):
            return self.row(rest, 0) if kind == "capped" else self.row(rest, rank) @ self.leaves[widen]
        if kind == "nothing":
            return torch.zeros(dim, dtype=torch.float64)
        if kind == "product":
            digits = (rank % 11, rank // 11 % 11, rank // 121 % 11)
            return reduce(torch.mul, [self.row(f"{rest}{j}", digit) for j, digit in enumerate(digits)])
        if kind == "codes":
            return torch.cat([self.row(f"{rest}{j}", c) for j, c in enumerate(self.codes[f"{name}/codes"][rank])])

        def row(j: int, size: int) -> int:
            return scalar.hash_address(rank, seed, name, j, size)

        def sign(j: int) -> float:
            return scalar.sign_of(x, scalar.seed_of(seed, name, "sign", j))

        if kind == "concat":
            return torch.cat([self.row(f"{rest}{j}", row(j, 11)) for j in range(3)])
        if kind == "blocks":
            count = -(-dim // 5)
            widths = [dim // count + (j < dim % count) for j in range(count)]
            starts = [row(j, 90) for j in range(count)]
            return torch.cat(
                [sign(j) * self.row(rest, (starts[j] + o) % 90) for j in range(count) for o in range(widths[j])]
            )
        if kind == "mean":
            return sum((sign(j) * self.row(rest, row(j, 30)) for j in range(2)), torch.zeros(dim)) / 2
        rows = [self.row(rest, row(j, 30)) for j in range({"hashed": 1, "projected": 2, "sum": 3}[kind])]
        total = reduce(torch.add, rows)
        return total @ self.leaves[widen] if kind == "projected" else total

    def attributes(self, name: str, x: int) -> list[int]:
        begin, end = self.codes[f"{name}/offsets"][x : x + 2]
        return self.codes[f"{name}/values"][begin:end]

    def taken(self, config: TableConfig, x: int) -> int:
        size = config.num_embeddings
        assert size is not None
        if 0 <= x < size:
            return x
        if config.on_out_of_range == "oov":
            return size
        seed = scalar.seed_of(self.tables.plan.hash_seed, config.name, "out_of_range")
        folded = scalar.bucket(scalar.mix64((x ^ seed) & scalar.MASK), size)
        return (folded + 1) % size if folded == config.padding_idx else folded

    def vector(self, config: TableConfig, x: int) -> Tensor:
        x = self.taken(config, x)
        if x == config.padding_idx:
            return torch.zeros(config.embedding_dim, dtype=torch.float64)
        found = self.combination(config.name, x)
        name = self.tables.plan.groups[0].group.name
        widen, narrow = f"{name}/widen_{config.embedding_dim}", f"{name}/narrow"
        found = found @ self.leaves[narrow] if narrow in self.leaves else found
        if widen in self.leaves:
            return found @ self.leaves[widen]
        return torch.cat([found, torch.zeros(config.embedding_dim - len(found), dtype=torch.float64)])

    def bag(self, config: TableConfig, ids: Sequence[int], weights: Sequence[float] | None, pooling: str) -> Tensor:
        total = torch.zeros(config.embedding_dim, dtype=torch.float64)
        for i, x in enumerate(ids):
            total = total + self.vector(config, x) * (1 if weights is None else weights[i])
        counted = sum(self.taken(config, x) != config.padding_idx for x in ids)
        return total / max(1, counted) if pooling == "mean" else total

    def outputs(self, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Pooled as configured: ``[B, ΣD]``."""
        names = self.tables.feature_names
        batch = ids.shape[0] if offsets is None else (offsets.numel() - 1) // len(names)
        columns = []
        for config in self.tables.plan.tables:
            for feature in config.feature_names:
                f, rows = names.index(feature), []
                for b in range(batch):
                    if offsets is None:
                        rows.append(self.vector(config, int(ids[b, f])))
                        continue
                    own = slice(int(offsets[f * batch + b]), int(offsets[f * batch + b + 1]))
                    given = None if weights is None else weights[own].tolist()
                    rows.append(self.bag(config, ids[own].tolist(), given, config.pooling))
                columns.append(torch.stack(rows))
        return torch.cat(columns, dim=1)

    def stepped(self, name: str, optimizer: FusedOptimizer) -> Tensor:
        """What the first step makes of a leaf whose gradient is known; rows that nobody looked up stay."""
        leaf, new = self.leaves[name].detach(), self.leaves[name].detach().clone()
        gradient = self.leaves[name].grad
        hyper: Any = optimizer
        for row in range(leaf.shape[0]):
            if self.tables.store.has_slab(name) and (name, row) not in self.touched:
                continue
            assert gradient is not None
            g = gradient[row]
            if optimizer.kind == "sgd":
                new[row] -= hyper.lr * g
            elif optimizer.kind == "rowwise_adagrad":
                new[row] -= hyper.lr * g / (g.square().mean().sqrt() + hyper.eps)
            else:  # the first step of Adam is that of Adagrad, since its averages begin with the bias taken out
                new[row] -= hyper.lr * g / (g.abs() + hyper.eps)
        return new


def arguments(tables: EmbeddingTables, bags: bool) -> tuple[Tensor, ...]:
    if not bags:
        return (some_ids(tables, 40, 0),)
    ids, offsets = jagged(tables, 25, 0)
    first = tables.feature_names.index("item") * 25
    ids[int(offsets[first]) : int(offsets[first + 50]) : 5] = 0
    return ids, offsets, torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) + 0.5


def assert_as_loops(tables: EmbeddingTables, loops: Loops, given: tuple[Tensor, ...]) -> None:
    """Vectors, and what a step leaves of weights or their gradients, are those of the loops."""
    assert tables.lookups.ops == "native"
    expected = loops.outputs(*given)
    got = step(tables, given, 1)
    torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    expected.backward(torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).double())
    store, optimizer = tables.store, tables.store.optimizer
    for name, leaf in loops.leaves.items():
        slab = store.has_slab(name)
        if optimizer is not None:
            found, due = store.slab(name) if slab else store.extra(name), loops.stepped(name, optimizer)
        else:
            gradient = (store.weight(store.width(name)) if slab else store.extra(name)).grad
            assert gradient is not None and leaf.grad is not None
            start = store.start(name) if slab else 0
            found, due = gradient[start : start + leaf.shape[0]], leaf.grad
        torch.testing.assert_close(found.double(), due, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("method", "optimizer", "bags"),
    [
        pytest.param(
            METHODS[name], *option, id=f"{name}-{kind_of(option[0])}-{'weighted bags' if option[1] else 'columns'}"
        )
        for name, option in in_turn(list(METHODS), list(product([*FUSED, None], [False, True])), 3)
    ],
)
def test_vectors_and_updates_equal_loops(method: Method, optimizer: FusedOptimizer | None, bags: bool) -> None:
    tables = make(method, optimizer)
    assert_as_loops(tables, Loops(tables), arguments(tables, bags))


# ---- against PyTorch -------------------------------------------------------------------------------------------------


@pairs(2)
def test_steps_equal_the_reference(method: Method, optimizer: FusedOptimizer | None) -> None:
    ours, reference = make(method, optimizer), make(method, optimizer)
    for seed in range(3):
        ids, (flat, offsets) = some_ids(ours, 150, seed), jagged(ours, 60, seed)
        ids = ids if seed else ids.clamp(-5, 2**31 - 1).int()
        got = step(ours, (ids,), seed), step(ours, (flat, offsets), seed)
        with ops.using("reference"):
            assert reference.lookups.ops == "reference"
            expected = step(reference, (ids,), seed), step(reference, (flat, offsets), seed)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    assert_same(ours, reference)


@METHOD
def test_outputs_that_are_not_pooled_equal_the_reference(method: Method) -> None:
    ours, reference = make(method, FUSED[2]), make(method, FUSED[2])
    flat, offsets = jagged(ours, 60, 0)
    results = []
    for tables, name in ((ours, "native"), (reference, "reference")):
        with ops.using(name):
            found = tables.lookup(flat, offsets, pooling={"history": None, "user": None, "tag": "sum"})
            sum((v * torch.linspace(-1, 1, v.numel()).view(v.shape)).sum() for v in found.values()).backward()
        results.append(found)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=2e-5)
    assert_same(ours, reference)


@METHOD
def test_sparse_gradients_have_each_row_once(method: Method) -> None:
    ours, dense = make(method, None, sparse=True), make(method, None)
    for tables in (ours, dense):
        step(tables, (some_ids(tables, 150, 0),), 0)
    assert_same(ours, dense)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.is_sparse == ("weight" in name)
        if parameter.grad.is_sparse:
            rows = parameter.grad._indices()
            assert rows.unique().numel() == rows.numel()


@pairs(1)
def test_two_lookups_before_a_backward(method: Method, optimizer: FusedOptimizer | None) -> None:
    """Gradients are of the rows and projections as they were looked up, not as the first update left them."""
    ours, reference = make(method, optimizer), make(method, optimizer)
    for tables, name in ((ours, "native"), (reference, "reference")):
        with ops.using(name):
            first, second = tables(some_ids(tables, 100, 0)), tables(*jagged(tables, 100, 1))
            (first * second).sum().backward()
    assert_same(ours, reference)


@pairs(1)
def test_threads_leave_the_same_bits(method: Method, optimizer: FusedOptimizer | None, any_threads: None) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        tables = make(method, optimizer)
        outs = [step(tables, (some_ids(tables, 4000, 0),), 0), step(tables, jagged(tables, 3000, 2), 2)]
        results.append((outs, state(tables)))
    for outs, weights in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs, results[0][0]))
        for name, tensor in weights.items():
            assert torch.equal(tensor, results[0][1][name]), name


# Of each method both forms of gradients and both types of numbers.
HALVES = [(torch.bfloat16, FUSED[2]), (torch.float16, None), (torch.bfloat16, None), (torch.float16, FUSED[2])]


@pytest.mark.parametrize(
    ("method", "dtype", "optimizer"),
    [
        pytest.param(METHODS[name], *half, id=f"{name}-{half[0]}-{'fused' if half[1] else 'gradients'}")
        for name, half in in_turn(list(METHODS), HALVES, 2)
    ],
)
def test_half_precision_is_as_close_to_float32_as_its_format(
    method: Method, dtype: torch.dtype, optimizer: FusedOptimizer | None
) -> None:
    half, single = make(method, optimizer).to(dtype), make(method, optimizer)
    single.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in half.state_dict().items()})
    assert half.lookups.ops == "native"
    ids = some_ids(half, 60, 0)
    out, expected = half(ids), single(ids)
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(out.float(), expected, rtol=3 * unit, atol=unit)
    gradient = torch.randint(-4, 5, out.shape) / 8
    out.backward(gradient.to(dtype))
    expected.backward(gradient)
    theirs = state(single)
    for name, tensor in state(half).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.float(), theirs[name].float(), rtol=8 * unit, atol=16 * unit, msg=name)


@METHOD
def test_small_and_empty_batches(method: Method) -> None:
    tables = make(method, FUSED[3])
    for batch in (0, 1):
        out = tables(random_ids(tables, batch))
        assert out.shape == (batch, sum(tables.embedding_dims))
        out.sum().backward()
    nothing = torch.zeros(len(tables.feature_names) * 2 + 1, dtype=torch.int64)
    assert not tables(torch.zeros(0, dtype=torch.int64), nothing).any()


IN_GRAPHS = ["codes", "sum of lists", "sum, projected", "rest of means with signs", "rest of blocks, and narrow rows"]


@pytest.mark.parametrize("method", [METHODS[name] for name in IN_GRAPHS], ids=IN_GRAPHS)
def test_compiled_steps_leave_the_same_weights(method: Method) -> None:
    torch.compiler.reset()
    eager, compiled = (make(method, FUSED[2], TABLES[:2]) for _ in range(2))
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        ids = some_ids(eager, 64, seed)
        step(eager, (ids,), seed)
        step(graph, (ids,), seed)
    assert_same(eager, compiled)


@pytest.mark.parametrize("name", ["rest of sums, projected", "rest of codes"])
def test_rests_in_graphs_without_native_code_equal_native_code(name: str) -> None:
    """In graphs every id is looked up among the alternatives and among the rest."""
    torch.compiler.reset()
    native, compiled = (make(METHODS[name], FUSED[2], TABLES[:2]) for _ in range(2))
    ids = some_ids(native, 64, 0)
    expected = step(native, (ids,), 0)
    with ops.using("reference"):
        assert compiled.lookups.ops == "reference"
        graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        got = step(graph, (ids,), 0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    assert_same(native, compiled)


@pytest.mark.parametrize("name", RESTS)
def test_ids_of_a_rest_collide_where_their_vectors_are_equal(name: str) -> None:
    tables = make(METHODS[name], None)
    loops = Loops(tables)
    for table, ids in (("city", range(40)), ("item", range(250))):
        vectors = [tuple(loops.combination(table, x).tolist()) for x in ids]
        shared = sum(vectors.count(vector) > 1 for vector in vectors) / len(vectors)
        assert tables.collision_share(table) == pytest.approx(shared)


# ---- codes -----------------------------------------------------------------------------------------------------------


SMALL = [TableConfig("t", 60, 8, on_out_of_range="hash", padding_idx=2)]
GRADIENTS = pytest.mark.parametrize("optimizer", [FUSED[2], None], ids=["fused", "gradients"])
PROJECTED = pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])


def small(method: Method, optimizer: FusedOptimizer | None, **codes: Tensor) -> EmbeddingTables:
    """A table of 60 ids, with these codes."""
    tables = EmbeddingTables(plan(SMALL, method, None, optimizer=optimizer), std=0.5)
    for name, values in codes.items():
        tables.store.code(f"t/{name}").copy_(values)
    return tables


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
@pytest.mark.parametrize("lists", [False, True], ids=["codes and ranks", "lists"])
def test_codes_of_any_type_mean_the_same(lists: bool, dtype: str) -> None:
    """Up to 200 and more: as bytes these have no sign."""
    results = []
    for each in (dtype, "int64"):
        method: Method = ProductQuantization(code_dtype=each, codewords=200, remap=each)
        if lists:
            method = Metadata(longest=7, num_attributes=200, offset_dtype=each, value_dtype=each)
        tables = small(method, FUSED[0])
        assert tables.lookups.ops == "native"
        assert max(int(code.max()) for name, code in tables.store.state_dict().items() if "code" in name) > 127
        out = step(tables, (torch.arange(-3, 63).unsqueeze(1),), 0)
        results.append([out, *(t.double() for t in state(tables).values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@GRADIENTS
@PROJECTED
@pytest.mark.parametrize("wrong", [120, -1, 2**31, -(2**63), 2**63 - 1])
def test_damaged_codes_and_ranks_count_as_zero(wrong: int, projected: bool, optimizer: FusedOptimizer | None) -> None:
    codes = torch.randint(120, (60, 4), generator=torch.Generator().manual_seed(0))
    ranks = torch.arange(60).flip(0)
    tables = []
    for value in (wrong, 0):
        codes[::5, 1::2], ranks[7::9] = value, value
        inner = 12 if projected else None
        method = ProductQuantization(code_dtype="int64", codewords=120, remap="int64", inner=inner)
        tables.append(small(method, optimizer, codes=codes, remap=ranks))
    outs = [step(each, (torch.arange(60).unsqueeze(1),), 0) for each in tables]
    assert torch.equal(*outs)
    damaged, repaired = map(state, tables)
    assert all(torch.equal(damaged[name], repaired[name]) for name in repaired if "code" not in name)


class DamagedLists(Loops):
    """A list is what lies within the values, up to its longest, and a row that its slab does not have is row 0."""

    def attributes(self, name: str, x: int) -> list[int]:
        begin, end = self.codes[f"{name}/offsets"][x : x + 2]
        found = self.codes[f"{name}/values"][begin:end] if begin >= 0 and end > begin else []
        return [value if 0 <= value < self.method.num_attributes else 0 for value in found[: self.method.longest]]


@GRADIENTS
@PROJECTED
@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_of_damaged_lists_nothing_is_read_that_is_not_there(
    combine: Any, projected: bool, optimizer: FusedOptimizer | None
) -> None:
    lists = Metadata(combine=combine, inner=5 if projected else None, offset_dtype="int64", value_dtype="int64")
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (torch.arange(60) % 4).cumsum(0)])
    values = torch.randint(100, (90,), generator=torch.Generator().manual_seed(0))
    for place, wrong in ((0, -1), (17, -(2**63)), (31, 2**63 - 1), (44, 91), (60, 2**40)):
        offsets[place] = wrong
    for place, wrong in ((3, -1), (20, 100), (40, 2**40), (89, -(2**63))):
        values[place] = wrong
    tables = small(lists, optimizer, offsets=offsets, values=values)
    assert_as_loops(tables, DamagedLists(tables), (torch.arange(60).unsqueeze(1),))


# ---- what is left to PyTorch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("signs", [False, True])
def test_projections_of_circular_blocks_are_left_to_pytorch(signs: bool) -> None:
    method = LowRankHashes(combine="concat", circular=True, signs=signs)
    mixed = EmbeddingTables(plan(TABLES, {"tag": "full", "*": method}, None, optimizer=FUSED[2]), std=0.5)
    assert mixed.lookups.ops == "mixed"
    ids = some_ids(mixed, 40, 0)
    got, user = step(mixed, (ids,), 0), mixed.feature_names.index("user")
    with ops.using("reference"):
        other = EmbeddingTables(mixed.plan, std=0.5)
        torch.testing.assert_close(got, step(other, (ids,), 0))
    assert_same(mixed, other)
    assert not got[ids[:, user] == 3][:, :16].any() and got.any()


@pytest.mark.parametrize("signs", [False, True])
@OPTIMIZER
def test_zeros_follow_circular_blocks_too(signs: bool, optimizer: FusedOptimizer | None) -> None:
    if optimizer is not None and optimizer.kind == "rowwise_adagrad":
        pytest.skip("scalars have no rows")
    method = LowRankHashes(combine="concat", num_hashes=2, rank=2, circular=True, signs=signs, widened=False)
    ours, reference = make(method, optimizer), make(method, optimizer)
    assert ours.lookups.ops == "native"
    for given in ((some_ids(ours, 60, 0),), arguments(ours, bags=True)):
        got = step(ours, given, 0)
        with ops.using("reference"):
            torch.testing.assert_close(got, step(reference, given, 0), rtol=1e-4, atol=2e-5)
        assert got[:, :4].any() and not got[:, 4:16].any()
    assert_same(ours, reference)


def test_tables_of_one_module_take_all_these_ways_at_once() -> None:
    chosen = {"user": METHODS["sum, projected"], "item": METHODS["mean of lists, projected"], "city": "hash"}
    solved = plan(TABLES, {**chosen, "tag": METHODS["codes"]}, "100%", optimizer=FUSED[3])
    ours, reference = EmbeddingTables(solved, std=0.5), EmbeddingTables(solved, std=0.5)
    assert ours.lookups.ops == "native"
    for seed in range(2):
        got = step(ours, jagged(ours, 100, seed), seed)
        with ops.using("reference"):
            torch.testing.assert_close(got, step(reference, jagged(ours, 100, seed), seed), rtol=1e-4, atol=2e-5)
    assert_same(ours, reference)
