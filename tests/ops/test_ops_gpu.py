"""The Triton kernels: on a GPU where there is one, and in Triton's interpreter, on CPU tensors, in a process apart."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from core_cases import in_turn
from torch import Tensor

from embtables import EmbeddingTables, Plan, TableConfig, plan
from embtables.formats import row_format
from embtables.lookup.stored_rows import StoredRows
from embtables.ops import gpu, reference
from embtables.ops.program import PLAIN
from embtables.optimizers import averaged

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
on_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a CUDA GPU; test_in_the_interpreter runs these on the CPU",
)

PACKED = ["fp16", "bf16", "int8", "int8/64", "int4", "int4/slab", "int2", "binary", "binary/7", "binary2", "binary4"]
RULES = ["sgd", "rowwise_adagrad", "adagrad", "adam"]
STORED = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 3, 8, 16, 33, 64]
LR, EPS, BETA1, BETA2, STEP = 0.1, 1e-3, 0.9, 0.99, 3


@pytest.fixture
def kernels() -> object:
    from embtables.ops import gpu_kernels

    return gpu_kernels


def on(device: str, tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone().to(device) for tensor in tensors]


def hyper(rule: str, l2: float = 0.0, clip: float = 0.0, lr: float = LR) -> Tensor:
    own = {"sgd": [], "adam": [EPS, BETA1, BETA2]}.get(rule, [EPS])
    return torch.tensor([lr, l2, *own] + ([clip] if clip else []), dtype=torch.float64)


def state_of(rule: str, rows: int, width: int, dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    widths = {"sgd": [], "rowwise_adagrad": [1], "adagrad": [width], "adam": [width, width]}[rule]
    generator = torch.Generator().manual_seed(seed)
    state = [torch.rand(rows, w, generator=generator).to(dtype) for w in widths]
    return [*state, torch.tensor(STEP)] if rule == "adam" else state


def expected_step(
    weight: Tensor, state: list[Tensor], index: Tensor, grad: Tensor, l2: float, clip: float, rule: str
) -> tuple[Tensor, list[Tensor]]:
    """The step in float64, row by row."""
    weight, *state = [tensor.to(torch.float64, copy=True) for tensor in [weight, *state]]
    for row in sorted(set(index.tolist())):
        g = grad[index == row].double().sum(0)
        if clip and float(g.norm()) > clip:
            g = g * clip / g.norm()
        g = g + l2 * weight[row]
        if rule == "sgd":
            change = LR * g
        elif rule == "adam":
            m, v = state[0][row], state[1][row]
            m.copy_(BETA1 * m + (1 - BETA1) * g)
            v.copy_(BETA2 * v + (1 - BETA2) * g**2)
            change = LR * (m / (1 - BETA1**STEP)) / ((v / (1 - BETA2**STEP)).sqrt() + EPS)
        else:
            squares = state[0][row]
            squares += (g**2).mean() if rule == "rowwise_adagrad" else g**2
            change = LR * g / (squares.sqrt() + EPS)
        weight[row] -= change
    return weight, state


def index_of(count: int, rows: int, seed: int, hot: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    """``count`` ids, beside them row 2 ``hot`` times and rows 0 and 1 once, so that row 2 starts inside a window."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.cat([torch.randint(rows, (count,), generator=generator), torch.tensor([0, 1] + [2] * hot)])
    return index[torch.randperm(len(index), generator=generator)].to(dtype)


def assert_step(kernels: object, rule: str, weight: Tensor, index: Tensor, l2: float, clip: float) -> None:
    """Against float64, and in float32 against the reference operator too."""
    rows, width = weight.shape
    state = state_of(rule, rows, width, torch.float32 if weight.dtype == torch.float32 else weight.dtype)
    grad = torch.randn(index.numel(), width, generator=torch.Generator().manual_seed(2)).to(weight.dtype)
    want_weight, want_state = expected_step(weight, state, index, grad, l2, clip, rule)
    got_weight, given, h = *on(DEVICE, [weight]), on(DEVICE, state), hyper(rule, l2, clip)
    at, g, h = on(DEVICE, [index, grad, h])
    kernels.update_(got_weight, given, at, g, h, rule)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[weight.dtype]
    for got, want in zip([got_weight, *given], [want_weight, *want_state]):
        torch.testing.assert_close(got.cpu().double(), want, rtol=tolerance, atol=tolerance)
    untouched = torch.ones(rows, dtype=torch.bool).index_fill_(0, index.long(), False)
    assert torch.equal(got_weight.cpu()[untouched], weight[untouched])
    if weight.dtype == torch.float32:
        other, others = weight.clone(), [s.clone() for s in state]
        reference.update(other, others, index, grad, hyper(rule, l2, clip), rule)
        for got, want in zip([got_weight, *given], [other, *others]):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6)


# ---- the gather ------------------------------------------------------------------------------------------------------


@on_device
@needs_triton
@pytest.mark.parametrize("dtype", STORED)
def test_rows_are_gathered(kernels: object, dtype: torch.dtype) -> None:
    for number, width in enumerate([*WIDTHS, 600]):
        weight = torch.randn(50, width).to(dtype)
        for count in (0, 1, 70):
            index = torch.randint(50, (count,)).to([torch.int32, torch.int64][number % 2])
            rows = kernels.lookup(*on(DEVICE, [weight, index]))
            assert rows.dtype == dtype and torch.equal(rows.cpu(), weight[index.long()])


@on_device
@needs_triton
@pytest.mark.parametrize("name", PACKED)
def test_rows_are_unpacked(kernels: object, name: str) -> None:
    """Bit for bit as in PyTorch on the CPU: of many slabs, of which some are empty and no first row begins a block."""
    for number, width in enumerate(WIDTHS):
        rows, generator = StoredRows(row_format(name), width), torch.Generator().manual_seed(number)
        starts = [(rows.add(count), count) for count in (5, 0, 70, 1, 0, 0, 130, 3)]
        stored, scales = rows.empty(None)
        for start, count in starts:
            rows.write(stored, scales, start, torch.randn(count, width, generator=generator) * 10.0 ** -(start % 5))
        index = torch.randint(rows.rows[-1], (150,), generator=generator)
        index[:4] = torch.tensor([0, rows.rows[-1] - 1, 5, 75])
        index = index.to([torch.int32, torch.int64][number % 2])
        expected = rows.read(stored, scales, index)
        given = on(DEVICE, [stored, index]), None if scales is None else scales.to(DEVICE)
        got = kernels.unpack(given[0][0], given[1], rows.firsts(torch.device(DEVICE)), given[0][1], width, rows.form)
        assert got.dtype == torch.float32 and torch.equal(got.cpu(), expected)


# ---- sums of bags ----------------------------------------------------------------------------------------------------

LENGTHS = [0, 3, 1, 0, 9, 5, 0, 4, 1, 30, 2, 0]


def bags_of(rows: int, seed: int, missing: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of bags, of which some are −1, the offsets of those, and factors."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1 if missing else 0, rows, (sum(LENGTHS),), generator=generator)
    return index, torch.tensor([0, *LENGTHS]).cumsum(0), torch.randn(sum(LENGTHS), generator=generator)


def running_sums(rows: Tensor, index: Tensor, bags: Tensor, factors: Tensor | None) -> Tensor:
    """One row after another, each rounded to the type of ``rows``, which holds one for every place of the index."""
    sums = torch.zeros(len(bags) - 1, rows.shape[1], dtype=rows.dtype)
    for bag, (start, end) in enumerate(zip(bags.tolist(), bags[1:].tolist())):
        for i in (i for i in range(start, end) if index[i] >= 0):
            sums[bag] = sums[bag] + (rows[i] if factors is None else rows[i] * factors[i])
    return sums


@on_device
@needs_triton
@pytest.mark.parametrize("dtype", [*STORED, torch.float64])
def test_bags_are_summed(kernels: object, dtype: torch.dtype) -> None:
    """Bit for bit the running sums in float32 (float64), rounded once at the end, with factors and without."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Triton's interpreter cuts bfloat16 off where GPUs round it.
    out = wide if dtype == torch.bfloat16 and INTERPRETED else dtype
    for number, width in enumerate([*WIDTHS, 600]):
        weight = torch.randn(50, width, generator=torch.Generator().manual_seed(width)).to(dtype)
        index, bags, factors = bags_of(50, width)
        index = index.to([torch.int32, torch.int64][number % 2])
        for own in (None, factors.to(wide)):
            expected = running_sums(weight[index.long()].to(wide), index, bags, own).to(out)
            given = [None if t is None else t.to(DEVICE) for t in (weight, None, None, index, bags, own)]
            got = kernels.bag_sums(*given, out, width, PLAIN)
            assert got.dtype == out and torch.equal(got.cpu(), expected)
    nothing = on(DEVICE, [torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)])
    empty = kernels.bag_sums(weight.to(DEVICE), None, None, *nothing, None, dtype, width, PLAIN)
    assert torch.equal(empty.cpu(), torch.zeros(3, width, dtype=dtype))


@on_device
@needs_triton
@pytest.mark.parametrize("name", PACKED)
def test_bags_of_packed_rows_are_summed(kernels: object, name: str) -> None:
    for number, width in enumerate(WIDTHS):
        rows, generator = StoredRows(row_format(name), width), torch.Generator().manual_seed(number)
        starts = [(rows.add(count), count) for count in (5, 0, 130)]
        stored, scales = rows.empty(None)
        for start, count in starts:
            rows.write(stored, scales, start, torch.randn(count, width, generator=generator))
        index, bags, factors = bags_of(135, number)
        expected = running_sums(rows.read(stored, scales, index.clamp(min=0)), index, bags, factors)
        firsts = rows.firsts(torch.device(DEVICE))
        stored, scales, *given = (None if t is None else t.to(DEVICE) for t in (stored, scales, index, bags, factors))
        got = kernels.bag_sums(stored, scales, firsts, *given, torch.float32, width, rows.form)
        assert torch.equal(got.cpu(), expected)


@on_device
@needs_triton
@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_from_the_gradients_of_bags(kernels: object, rule: str, weighs: bool) -> None:
    """It is that of the gradient of every id, in float64: a row fills more than a window, and some ids are no row."""
    lengths = torch.tensor([0, 40, 1, 0, 70, 9])
    bags = torch.cat([torch.tensor([0]), lengths.cumsum(0)])
    for width in (3, 16):
        index = index_of(78, 20, width, hot=40)
        index[torch.randperm(120, generator=torch.Generator().manual_seed(width))[:35]] = -1
        factors = torch.randn(120, generator=torch.Generator().manual_seed(1)) if weighs else None
        grad = torch.randn(6, width, generator=torch.Generator().manual_seed(2))
        each = grad.double().repeat_interleave(lengths, dim=0) * (1 if factors is None else factors.unsqueeze(1))
        weight, state = torch.randn(23, width), state_of(rule, 23, width, torch.float32)
        found = index >= 0
        want, wants = expected_step(weight, state, index[found], each[found], 0.1, 0.7, rule)
        got, *gots = on(DEVICE, [weight, *state])
        given = on(DEVICE, [index, grad, hyper(rule, 0.1, 0.7)])
        kernels.update_(got, gots, *given, rule, bags.to(DEVICE), None if factors is None else factors.to(DEVICE))
        for g, w in zip([got, *gots], [want, *wants]):
            torch.testing.assert_close(g.cpu().double(), w, rtol=1e-5, atol=1e-5)


# ---- the step --------------------------------------------------------------------------------------------------------


@on_device
@needs_triton
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("rule", RULES)
def test_a_step_equals_float64(kernels: object, rule: str, dtype: torch.dtype) -> None:
    """Duplicates, a row that fills more than a window, clipping and decay, for all widths.

    The interpreter takes each width with one of the four ways to clip and decay: every two of rule, type of numbers,
    width and way meet.
    """
    ways = ((0.0, 0.0), (0.1, 0.0), (0.0, 0.7), (0.1, 0.7))
    turn = RULES.index(rule) + STORED.index(dtype)
    for number, width in enumerate(WIDTHS):
        for l2, clip in [ways[(number + turn) % len(ways)]] if INTERPRETED else ways:
            weight = torch.randn(23, width, generator=torch.Generator().manual_seed(width)).to(dtype)
            index = index_of(10, 20, width, hot=31, dtype=[torch.int32, torch.int64][number % 2])
            assert_step(kernels, rule, weight, index, l2, clip)


@on_device
@needs_triton
@pytest.mark.parametrize("width", [1, 6, 16])
@pytest.mark.parametrize("rule", RULES)
def test_rows_in_16_bits_are_rounded_as_in_pytorch(kernels: object, rule: str, width: int) -> None:
    """Where the last bit of an update differs, a rounding may: rarely, and by a step. Sums of integers do not."""
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(90, width, generator=generator).bfloat16()
    index = torch.randint(90, (200,), generator=generator)
    grad = torch.randint(-3, 4, (200, width), generator=generator).float()
    state = [t for t in state_of(rule, 90, width, torch.float32) if t.ndim]
    want, wants, step = weight.clone(), [t.clone() for t in state], torch.tensor(STEP)
    reference.update(want, [*wants, step], index, grad, hyper(rule), rule)
    found, *founds = on(DEVICE, [weight, *state])
    kernels.update_(found, [*founds, step.to(DEVICE)], *on(DEVICE, [index, grad, hyper(rule)]), rule)
    assert (found.cpu() != want).float().mean() < (0.01 if rule != "sgd" else 1e-9)
    torch.testing.assert_close(found.cpu(), want, rtol=2.0**-7, atol=0)
    assert not torch.equal(found.cpu(), weight)
    assert torch.equal(kernels.lookup(found, index.to(DEVICE), torch.float32).cpu(), found.cpu().float()[index])


@on_device
@needs_triton
@pytest.mark.parametrize("rule", RULES)
def test_batches_without_duplicates_and_of_one_row_alone(kernels: object, rule: str) -> None:
    weight = torch.randn(90, 5)
    for index in (torch.randperm(90)[:40], torch.full((100,), 7), torch.tensor([89]), torch.arange(32)):
        assert_step(kernels, rule, weight, index, 0.1, 0.5)


@on_device
@needs_triton
@pytest.mark.parametrize("rule", RULES)
def test_wide_rows_and_float64(kernels: object, rule: str) -> None:
    """Rows wider than a tile: by columns where they allow it, whole where the rule or clipping needs a row's norm."""
    assert_step(kernels, rule, torch.randn(9, 200), index_of(15, 9, 3, hot=40), 0.1, 0.0)
    assert_step(kernels, rule, torch.randn(5, 1500), index_of(4, 5, 4, hot=5), 0.1, 0.5)
    assert_step(kernels, rule, torch.randn(9, 7, dtype=torch.float64), index_of(15, 9, 5, hot=40), 0.1, 0.5)


@on_device
@needs_triton
def test_a_row_that_goes_on_for_many_windows(kernels: object) -> None:
    """Long enough that its windows are summed in more than one block; rows before and after it keep to themselves."""
    index = torch.cat([torch.tensor([0, 1, 1]), torch.full((1200,), 2), torch.tensor([3, 4, 4, 4])])
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    assert_step(kernels, "adagrad", torch.randn(6, 2), index, 0.0, 0.0)


@on_device
@needs_triton
def test_gradients_are_added_in_the_order_of_the_input(kernels: object) -> None:
    """Bit for bit the running sum in float32, which another order would not give."""
    generator = torch.Generator().manual_seed(0)  # now and then two orders give the same
    grad = torch.randn(30, 4, generator=generator) * 10.0 ** torch.randint(-4, 5, (30, 1), generator=generator)
    index = torch.tensor([1, 0, 1] * 10)
    weight = torch.zeros(2, 4)
    running = [torch.zeros(4), torch.zeros(4)]
    for row, g in zip(index.tolist(), grad):
        running[row] = running[row] + g
    backwards = grad[index == 1].flip(0).cumsum(0)[-1]
    assert not torch.equal(backwards, running[1])
    (got,) = on(DEVICE, [weight])
    kernels.update_(got, [], *on(DEVICE, [index, grad, hyper("sgd", lr=1.0)]), "sgd")
    assert torch.equal(got.cpu(), -torch.stack(running))


@on_device
@needs_triton
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_the_same_input_gives_the_same_bits(kernels: object, rule: str) -> None:
    weight, index, grad = torch.randn(20, 16), index_of(58, 20, 1, hot=40), torch.randn(100, 16)
    results = []
    for _ in range(2):
        got, state = on(DEVICE, [weight])[0], on(DEVICE, state_of(rule, 20, 16, torch.float32))
        kernels.update_(got, state, *on(DEVICE, [index, grad, hyper(rule, 0.1, 0.5)]), rule)
        results.append([got, *state])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@on_device
@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_what_is_not_finite_stays_in_its_row(kernels: object) -> None:
    weight, index, grad = torch.randn(40, 3), index_of(68, 40, 1), torch.randn(70, 3)
    grad[5, 1], grad[9, 2] = float("nan"), float("inf")
    (got,), want = on(DEVICE, [weight]), weight.clone()
    kernels.update_(got, [], *on(DEVICE, [index, grad, hyper("sgd", 0.1, 0.5)]), "sgd")
    reference.update(want, [], index, grad, hyper("sgd", 0.1, 0.5), "sgd")
    assert want.isnan().any(1).sum() == 2
    torch.testing.assert_close(got.cpu(), want, equal_nan=True)


@on_device
@needs_triton
@pytest.mark.parametrize("rule", RULES)
def test_an_empty_batch_changes_nothing(kernels: object, rule: str) -> None:
    for rows in (0, 4):
        weight, state = torch.randn(rows, 3), state_of(rule, rows, 3, torch.float32)
        got, given = on(DEVICE, [weight])[0], on(DEVICE, state)
        index = torch.zeros(0, dtype=torch.int64)
        kernels.update_(got, given, *on(DEVICE, [index, torch.zeros(0, 3), hyper(rule, 0.1, 0.5)]), rule)
        assert all(torch.equal(a.cpu(), b) for a, b in zip([got, *given], [weight, *state]))


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA GPU")
@needs_triton
def test_nothing_waits_for_the_gpu(kernels: object) -> None:
    weight, index, grad, h = on(
        DEVICE, [torch.randn(9, 4), index_of(58, 9, 1, hot=40), torch.randn(100, 4), hyper("adam", 0.1)]
    )
    state = on(DEVICE, state_of("adam", 9, 4, torch.float32))
    rows = StoredRows(row_format("int2"), 4)
    starts = [rows.add(5), rows.add(9)]
    packed = rows.empty(DEVICE)
    for start, count in zip(starts, (5, 9)):
        rows.write(*packed, start, torch.randn(count, 4, device=DEVICE))
    bags = torch.tensor([0, 40, 40, 100], device=DEVICE)

    def all_of_them() -> None:
        kernels.lookup(weight, index)
        kernels.bag_sums(weight, None, None, index, bags, grad[:, 0], torch.float32, 4, PLAIN)
        rows.read(*packed, index)
        kernels.update_(weight, state, index, grad, h, "adam")
        kernels.update_(weight, state, index, grad[:3], h, "adam", bags, grad[:, 0])

    all_of_them()
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_of_them()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_device
@needs_triton
def test_offsets_beyond_31_bits(kernels: object) -> None:
    """A table of more than 2³¹ rows, of which memory holds only the pages that are touched (on a GPU all: 4.3 GB)."""
    rows = 2**31 + 64
    try:
        weight = torch.empty(rows, 1, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no memory for {rows} rows: {error}")
    index = torch.tensor([rows - 1, 5, rows - 1, 2**31 + 1], device=DEVICE)
    weight[index] = 1.0
    kernels.update_(
        weight, [], index, torch.ones(4, 1, dtype=torch.float16, device=DEVICE), hyper("sgd").to(DEVICE), "sgd"
    )
    expected = torch.tensor([0.8, 0.9, 0.8, 0.9], dtype=torch.float16)
    assert torch.equal(kernels.lookup(weight, index).cpu().flatten(), expected)


@on_device
@needs_triton
def test_what_is_refused(kernels: object) -> None:
    weight, index, grad, h = on(DEVICE, [torch.randn(6, 4), torch.tensor([1, 2]), torch.randn(2, 4), hyper("sgd")])
    with pytest.raises(ValueError, match="must be contiguous"):
        kernels.update_(weight.t()[:, :4].t()[:4].t(), [], index, grad, h, "sgd")
    with pytest.raises(ValueError, match="unknown rule 'lion': sgd, rowwise_adagrad, adagrad, adam"):
        kernels.update_(weight, [], index, grad, h, "lion")


# ---- through the tables ----------------------------------------------------------------------------------------------

TABLES = [
    TableConfig("item", 60, 8, ["item", "history"], pooling="mean", padding_idx=0),
    TableConfig("user", 40, 4, ["user"], on_out_of_range="oov"),
]


def train(method: str, optimizer: str, device: str) -> list[Tensor]:
    """Vectors, tables and optimizer state after three steps over a matrix of ids and bags of them."""
    tables = EmbeddingTables(
        plan(TABLES, method, None if method == "full" else "60%", optimizer=optimizer), device=device
    )
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(3):
        ids = torch.randint(40, (10, 3), generator=generator).to(device)
        weights = torch.randn(10, 20, generator=generator).to(device)
        flat = torch.randint(40, (15,), generator=generator).to(device)
        offsets = torch.tensor([0, 1, 2, 3, 4, 5, 5, 8, 9, 9, 10, 11, 12, 13, 14, 15]).to(device)
        loss = (tables(ids) * weights).sum() + tables(flat, offsets).square().sum()
        loss.backward()
        losses.append(loss.detach())
    dense = [tables.to_dense(table.name) for table in TABLES]
    return [tensor.cpu() for tensor in [*losses, *dense, *tables.optimizer_state_dict().values()]]


@on_device
@needs_triton
def test_eager_lookups_go_straight_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and without; the gradient of a matrix of ids is read where it is, rather than put in order first."""
    configs = [TableConfig("a", 9, 4, ["a", "c"]), TableConfig("b", 7, 4)]
    module = EmbeddingTables(plan(configs, "full", optimizer="adagrad"), device=DEVICE)
    weight, ids = module.store.weight_4, torch.tensor([[0, 1, 2], [3, 4, 5]], device=DEVICE)
    grad = torch.randn(2, 12, device=DEVICE)
    expected = weight.index_select(0, (ids + torch.tensor([0, 0, 9], device=DEVICE)).flatten()).view(2, 12)
    monkeypatch.setitem(reference.eager, DEVICE, gpu.KERNELS)
    monkeypatch.setattr(reference, "fused_lookup", None)
    with torch.no_grad():
        assert torch.equal(module(ids), expected)
    gradients, update = [], gpu._update
    monkeypatch.setattr(gpu, "_update", lambda *given: gradients.append(given[3]) or update(*given))
    before = weight._version
    vectors = module(ids)
    assert torch.equal(vectors, expected)
    vectors.backward(grad)
    assert len(gradients) == 1 and weight._version > before
    if DEVICE != "cpu":  # where the order of the features, and so that of sums, stays
        assert gradients[0].data_ptr() == grad.data_ptr()
    assert not torch.equal(module(ids), expected)


BAGS = [
    TableConfig("item", 60, 8, ["item", "history"], pooling="mean", padding_idx=0),
    TableConfig("user", 40, 8, on_out_of_range="oov"),
    TableConfig("city", 30, 16, padding_idx=3),
]
COUNTS = {config.name: list(range(1, config.num_embeddings + 1)) for config in BAGS}
FLAT = torch.randint(30, (47,), generator=torch.Generator().manual_seed(0))
OFFSETS = torch.tensor([0, 1, 7, 7, 9, 20, 20, 20, 22, 23, 25, 31, 47])
WEIGHTS = torch.randn(47, generator=torch.Generator().manual_seed(1))


def bags_trained(solved: Plan, device: str, weights: Tensor | None = WEIGHTS, pooling: Any = "config") -> list[Tensor]:
    """Vectors, weights and optimizer state of two steps over bags."""
    tables, found = EmbeddingTables(solved, seed=3, device=device), []
    for _ in range(2):
        given = [None if t is None else t.to(device) for t in (FLAT, OFFSETS, weights)]
        vectors = tables(*given, pooling=pooling)
        vectors.square().sum().backward()
        found.append(vectors.detach())
    return [tensor.cpu() for tensor in [*found, *tables.store.buffers()]]


class Launched:
    """What the kernels of a device are asked for, by eager lookups: rows, and the gradients of updates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gathered: list[int] = []
        self.summed: list[int] = []
        self.gradients: list[int] = []
        self._patch, self._update, self._gather, self._sum = monkeypatch, gpu._update, gpu._gather, gpu._bag_sums
        for name in ("_gather", "_bag_sums", "_update"):
            monkeypatch.setattr(gpu, name, getattr(self, f"of{name}"))
        kernels = gpu.KERNELS._replace(gather=self.of_gather, bag_sums=self.of_bag_sums)
        monkeypatch.setitem(reference.eager, DEVICE, kernels)

    def of_gather(self, weight: Tensor, index: Tensor, *more: object) -> Tensor:
        self.gathered.append(index.numel())
        return self._gather(weight, index, *more)

    def of_bag_sums(self, *given: object) -> Tensor:
        sums = self._sum(*given)
        self.summed.append(sums.shape[0])
        return sums

    def of_update(self, *given: object) -> None:
        self.gradients.append(given[3].shape[0])
        self._update(*given)


@on_device
@needs_triton
@pytest.mark.parametrize("rule", [*RULES, "averaged_adam"])
@pytest.mark.parametrize("method", ["full", "hash", "frequency_cutoff", "mixed"])
def test_bags_of_rows_are_summed_as_they_are_looked_up(method: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in PyTorch on the CPU, without a tensor of a row, or of a gradient, for each id."""
    optimizer = averaged("adam", 5) if rule == "averaged_adam" else rule
    chosen = {"user": "compositional", "*": "full"} if method == "mixed" else method
    solved = plan(BAGS, chosen, None if method == "full" else "90%", frequencies=COUNTS, optimizer=optimizer)
    ways = (WEIGHTS, "config"), (None, {"item": "sum", "user": "mean"})
    expected = [bags_trained(solved, "cpu", *way) for way in ways]
    launched = Launched(monkeypatch)
    for way, wanted in zip(ways, expected):
        for got, want in zip(bags_trained(solved, DEVICE, *way), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    # Bags of all four features, or of the three in full; of the three ids of ``user`` two rows each are gathered.
    if method == "mixed":
        assert launched.summed == [6, 3] * 4 and launched.gathered == [6] * 4
    else:
        assert launched.summed == [9, 3] * 4 and not launched.gathered
        assert sorted(launched.gradients) == [3] * 4 + [9] * 4


@on_device
@needs_triton
@pytest.mark.parametrize(
    "method",
    [
        {"kind": "unified", "width": 8},  # two vectors of 8 and one of 16 from the same rows
        {"kind": "robe", "block_size": 8},
        {"kind": "fewer_dimensions"},
        {"kind": "fewer_dimensions", "projection": True},
    ],
    ids=["shared", "blocks", "zeros", "projected"],
)
def test_vectors_that_are_more_than_a_row_of_their_own_are_gathered(
    method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where another block reads these rows, since a step updates each row once."""
    solved = plan(BAGS, method, "60%", optimizer="adagrad")
    expected = bags_trained(solved, "cpu")
    launched = Launched(monkeypatch)
    for got, want in zip(bags_trained(solved, DEVICE), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert not launched.summed


@on_device
@needs_triton
def test_blocks_with_bags_that_are_not_pooled_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the same reason; and outputs one by one are those side by side."""
    launched = Launched(monkeypatch)
    tables = EmbeddingTables(plan(BAGS, "full", optimizer="adagrad"), device=DEVICE)
    outputs = tables.lookup(FLAT.to(DEVICE), OFFSETS.to(DEVICE), pooling={"history": None})
    assert outputs["history"].shape == (13, 8) and launched.summed == [3]
    one_by_one = tables.lookup(FLAT.to(DEVICE), OFFSETS.to(DEVICE), pooling="mean")
    assert launched.summed == [3, 9, 3]
    beside = tables(FLAT.to(DEVICE), OFFSETS.to(DEVICE), pooling="mean")
    assert torch.equal(torch.cat(list(one_by_one.values()), dim=1), beside)


@on_device
@needs_triton
def test_who_needs_single_rows_has_them_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that learn, accumulation, regularization, and rows that autograd gives gradients."""

    def trained(device: str) -> list[Tensor]:
        ids, offsets, weights = on(device, [FLAT, OFFSETS, WEIGHTS])
        tables = EmbeddingTables(plan(BAGS, "full", optimizer="sgd"), seed=3, device=device)
        tables(ids, offsets, weights.requires_grad_()).square().sum().backward()
        with tables.accumulate():
            tables(ids, offsets).square().sum().backward()
        tables.regularize(0.1, COUNTS)
        tables(ids, offsets).square().sum().backward()
        parameters = EmbeddingTables(plan(BAGS, "full", optimizer=None), seed=3, device=device)
        parameters(ids, offsets).square().sum().backward()
        found = [weights.grad, *tables.store.buffers(), *(parameter.grad for parameter in parameters.parameters())]
        return [tensor.cpu() for tensor in found if tensor is not None]

    expected = trained("cpu")
    launched = Launched(monkeypatch)
    for got, want in zip(trained(DEVICE), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not launched.summed


@on_device
@needs_triton
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "binary2"])
def test_bags_of_served_rows_are_summed_as_they_are_unpacked(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def served(device: str) -> Tensor:
        solved = plan(BAGS, "full", precision=precision, optimizer=None)
        with torch.no_grad():  # tables in fp32 are parameters still
            return EmbeddingTables(solved, seed=3, device=device).serve()(*on(device, [FLAT, OFFSETS, WEIGHTS])).cpu()

    expected = served("cpu")
    launched = Launched(monkeypatch)
    torch.testing.assert_close(served(DEVICE), expected, rtol=1e-5, atol=1e-6)
    assert launched.summed == [9, 3] and not launched.gathered


@on_device
@needs_triton
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_holds_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What writes to memory by its address leaves nothing in ``torch.jit.trace``, which then gives what was there."""
    monkeypatch.setitem(reference.eager, DEVICE, gpu.KERNELS)
    tables = EmbeddingTables(plan(BAGS, "full", precision="int8", optimizer=None), device=DEVICE).serve()
    ids = [torch.randint(30, (5, 4), generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(2)]
    traced = torch.jit.trace(tables, (ids[0],), check_trace=False)
    assert torch.equal(traced(ids[1]), tables(ids[1]))


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA GPU")
@needs_triton
@pytest.mark.parametrize("rule", RULES)
def test_a_step_as_a_cuda_graph(rule: str) -> None:
    """Captured once and replayed over other ids and another learning rate, it does what eager steps do, bit for bit."""
    configs = [
        TableConfig("a", 50, 8, ["a", "c"], on_out_of_range="oov"),
        TableConfig("b", 30, 8, on_out_of_range="hash"),
    ]
    one, other = (EmbeddingTables(plan(configs, "full", optimizer=rule), device="cuda") for _ in range(2))
    ids = [torch.randint(70, (40, 3), generator=torch.Generator().manual_seed(i)).cuda() for i in range(4)]
    grad = torch.randn(40, 24, device="cuda")
    given = ids[0].clone()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        other(given).backward(grad)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        vectors = other(given)
        vectors.backward(grad)
    one(ids[0]).backward(grad)
    for batch in ids[1:]:
        for module in (one, other):
            module.set_learning_rate(LR / (1 + len(batch)))
        expected = one(batch)
        expected.backward(grad)
        given.copy_(batch)
        graph.replay()
        assert torch.equal(vectors, expected)
    for name, tensor in one.store.named_buffers():
        assert torch.equal(tensor, other.store.get_buffer(name)), name


def serve(method: str, precision: str, device: str) -> list[Tensor]:
    """Vectors of a matrix of ids and of bags, from served tables."""
    chosen = {"kind": method, "precision": precision}
    tables = EmbeddingTables(plan(TABLES, chosen, None if method == "full" else "60%", optimizer=None), device=device)
    tables = tables.serve()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (30, 3), generator=generator).to(device)
    offsets = torch.arange(0, 91).to(device)
    return [tables(ids).cpu(), tables(ids.t().reshape(-1), offsets).cpu()]


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA GPU")
@needs_triton
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "binary2"])
def test_what_is_served_as_a_cuda_graph_and_compiled(precision: str) -> None:
    """Both give what eager lookups give, bit for bit; the graph for other ids than those it was captured with."""
    configs = [
        TableConfig("a", 50, 8, ["a", "c"], on_out_of_range="oov"),
        TableConfig("b", 300, 12, on_out_of_range="hash"),
    ]
    tables = EmbeddingTables(plan(configs, "full", precision=precision, optimizer=None), device="cuda").serve()
    ids = [torch.randint(400, (40, 3), generator=torch.Generator().manual_seed(i)).cuda() for i in range(3)]
    expected = [tables(batch) for batch in ids]
    given, graph = ids[0].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        vectors = tables(given)
    compiled = torch.compile(tables, fullgraph=True)
    for batch, wanted in zip(ids, expected):
        given.copy_(batch)
        graph.replay()
        assert torch.equal(vectors, wanted)
        assert torch.equal(compiled(batch), wanted)


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA GPU")
@needs_triton
@pytest.mark.parametrize("method", ["full", "hash", "compositional"])
def test_a_compiled_step_on_a_gpu(method: str) -> None:
    """It is the eager one, but for the order in which a compiler may add."""
    configs = [TableConfig("a", 50, 8, ["a", "c"]), TableConfig("b", 300, 8)]
    solved = plan(configs, method, None if method == "full" else "50%", optimizer="adagrad")
    one, other = (EmbeddingTables(solved, device="cuda") for _ in range(2))
    compiled = torch.compile(other, fullgraph=True)
    grad = torch.randn(40, 24, device="cuda")
    for i in range(3):
        ids = torch.randint(50, (40, 3), generator=torch.Generator().manual_seed(i)).cuda()
        vectors, wanted = compiled(ids), one(ids)
        torch.testing.assert_close(vectors, wanted)
        vectors.backward(grad)
        wanted.backward(grad)
    for name in ("a", "b"):
        torch.testing.assert_close(one.to_dense(name), other.to_dense(name))


@on_device
@needs_triton
def test_tables_train_and_serve_as_on_the_reference() -> None:
    """The last test of a process without a GPU: its CPU operators are the kernels from here on."""
    served = in_turn(["full", "compositional", "mixed_dimension", "robe"], ["int8", "int4", "binary2"], 2)
    vectors = [serve(*case, "cpu") for case in served]
    cases = in_turn(["full", "compositional", "mixed_dimension"], RULES, 2)
    cases.append(("robe", "adagrad"))
    expected = [train(*case, "cpu") for case in cases]
    gpu.register_for(DEVICE)
    for case, wanted in zip(cases, expected):
        for got, want in zip(train(*case, DEVICE), wanted):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for case, wanted in zip(served, vectors):
        for got, want in zip(serve(*case, DEVICE), wanted):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# ---- without a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@needs_triton
def test_in_the_interpreter() -> None:
    """All of the above, on CPU tensors."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment = kept | {"TRITON_INTERPRET": "1", "EMBTABLES_OPS": "reference", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="nothing to interpret")
def test_when_the_kernels_are_in_force() -> None:
    """In a process of its own; nobody waits for Triton before the first call on a GPU."""
    code = """
import importlib.util, os, sys, torch
torch.version.cuda = torch.version.hip = None
from embtables.ops import gpu, reference

find = importlib.util.find_spec
for version, found, choice in ((None, True, ""), ("13.0", False, ""), ("13.0", True, "reference"), ("13.0", True, "")):
    torch.version.cuda, os.environ["EMBTABLES_OPS"] = version, choice
    importlib.util.find_spec = lambda name, *rest: (found or None) if name == "triton" else find(name, *rest)
    print(gpu.register(), *("cuda" in o._backend_fns for o in (reference.fused_lookup, reference.update)))
assert "triton" not in sys.modules
"""
    kept = {k: v for k, v in os.environ.items() if k not in ("EMBTABLES_OPS", "TRITON_INTERPRET")}
    result = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["False False False"] * 3 + ["True True True"], result.stderr


# Every launch becomes a compilation, for a GPU that is not there; prints its kernel and how many loads are of 16 bytes.
# The tensors have no data, so whoever asks for some, as to wait for the GPU, gets an error.
COMPILE = """
import re, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Driver:
    get_current_device = get_current_stream = lambda self, *_: 0
    get_current_target = lambda self: GPUTarget("cuda", architecture, 32)

def launch(self, grid):
    def compile(*arguments, **options):
        compiled = self.warmup(*arguments, grid=grid, **options)
        assert compiled.asm["cubin"]
        print(architecture, self.fn.__name__, len(re.findall("ld.global.v4.b32", compiled.asm["ptx"])))
    return compile

JITFunction.__getitem__ = launch
torch.set_default_device("meta")
from embtables.formats import row_format
from embtables.lookup.stored_rows import StoredRows
from embtables.ops import gpu_kernels
from embtables.ops.program import PLAIN

for architecture, dtype, width in (80, torch.float32, 16), (90, torch.bfloat16, 64), (90, torch.float64, 33):
    driver.set_active(Driver())
    weight, index = torch.zeros(40, width, dtype=dtype), torch.arange(40)
    bags, factors = torch.arange(5) * 10, torch.ones(40)
    gpu_kernels.lookup(weight, index)
    gpu_kernels.bag_sums(weight, None, None, index, bags, factors, dtype, width, PLAIN)
    for name in "int4", "binary4":
        rows = StoredRows(row_format(name), width)
        rows.add(30), rows.add(10)
        stored = *rows.empty(None), rows.firsts(index.device)
        gpu_kernels.unpack(*stored, index, width, rows.form)
        gpu_kernels.bag_sums(*stored, index, bags, None, torch.float32, width, rows.form)
    for rule, columns in ("sgd", []), ("rowwise_adagrad", [1]), ("adagrad", [width]), ("adam", [width, width]):
        state = [torch.zeros(40, n) for n in columns] + [torch.tensor(1)] * (rule == "adam")
        hyper = torch.ones({"sgd": 3, "adam": 6}.get(rule, 4), dtype=torch.float64)  # rows are clipped
        gpu_kernels.update_(weight, state, index, weight, hyper, rule)
        gpu_kernels.update_(weight, state, index, weight[:4], hyper, rule, bags, factors)
        if dtype == torch.float32:  # rows that are trained in 16 bits
            rows = [*(s for s in state if s.ndim), torch.tensor(1)]
            gpu_kernels.update_(weight.bfloat16(), rows, index, weight, hyper, rule)
"""


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing to compile in the interpreter")
@needs_triton
def test_the_kernels_compile(tmp_path: Path) -> None:
    """To machine code of two generations of GPUs, with 16-byte loads where rows allow them; this takes no GPU.

    And that nothing waits for a GPU.
    """
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=kept, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) == 3 * (2 + 2 * 2 + 2 * 4 * 2) + 4 * 2, result.stderr[-4000:]
    vectorized = {" ".join(line.split()[:2]) for line in lines if not line.endswith(" 0")}
    assert vectorized == {f"{a} {name}" for a in (80, 90) for name in ("_gather", "_bag_sums", "_window_sums", "_step")}
