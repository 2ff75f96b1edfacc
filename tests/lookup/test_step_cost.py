"""A step costs what its ids cost: as many calls however many tables, as many bytes however many rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from core_cases import NEEDS_COUNTS, all_methods, falling_counts, method_id, random_ids
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from embtables import EmbeddingTables, InfeasibleBudget, TableConfig, plan
from embtables.methods import Method


def make(method: Method, configs: list[TableConfig], budget: Any, optimizer: Any = "adagrad") -> EmbeddingTables:
    counts = {c.name: falling_counts(c.num_embeddings or 0) for c in configs} if method.kind in NEEDS_COUNTS else None
    try:
        solved = plan(configs, method, None if method.kind == "full" else budget, counts, optimizer)
    except InfeasibleBudget as error:
        solved = plan(configs, method, error.floor_bytes, counts, optimizer)
    return EmbeddingTables(solved)


def aten_calls(run: Any) -> Counter[str]:
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return Counter(e.name for e in profiler.events() if e.name.startswith(("aten::", "embtables::")))


def step(tables: EmbeddingTables, *arguments: Any) -> Any:
    def run() -> None:
        result = tables(*arguments)
        if result.requires_grad:
            result.sum().backward()

    return run


@pytest.mark.parametrize("bags", [False, True], ids=["columns", "bags"])
@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_as_many_calls_for_78_tables_as_for_13(method: Method, bags: bool) -> None:
    counted = {}
    for number in (13, 78):
        # The share of tables that are kept in full, cut, dropped … is the same for both numbers.
        tables = make(method, [TableConfig(f"t{i}", 400 if i % 13 else 10, 8) for i in range(number)], "20%")
        ids = random_ids(tables, 4)
        arguments = (ids.t().reshape(-1), torch.arange(ids.numel() + 1)) if bags else (ids,)
        trained = aten_calls(step(tables, *arguments))
        with torch.no_grad():
            served = tables.serve().eval()
            counted[number] = trained, aten_calls(lambda s=served, a=arguments: s(*a))  # type: ignore[misc]
    assert counted[13] == counted[78]
    assert sum(counted[13][0].values()) > 10


# What cuts one tensor into an output for each feature, and puts such outputs together again; no values are computed.
VIEWS = {f"aten::{name}" for name in ("as_strided", "narrow", "slice", "select", "view", "reshape", "_reshape_alias")}


@pytest.mark.parametrize("method", ["full", "hash", "multi_hash", "compositional"])
def test_outputs_by_themselves_cost_views_and_nothing_else_a_table(method: str) -> None:
    """Some pooled, some bags of one, some not pooled; with weights, padding and regularization."""
    counted = []
    for number in (13, 78):
        configs = [
            TableConfig(f"t{i}", 400 if i % 13 else 10, 8, pooling="mean" if i % 2 else "sum", padding_idx=0)
            for i in range(number)
        ]
        tables = EmbeddingTables(plan(configs, method, None if method == "full" else "20%", optimizer="adagrad"))
        tables.regularize(0.1)
        lengths = torch.tensor([[1, 1, 1] if i % 3 == 0 else [2, 0, 1] for i in range(number)]).flatten()
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        ids = torch.arange(int(offsets[-1])) % 10
        pooling = {f"t{i}": None for i in range(1, number, 3)}

        weights = torch.ones(len(ids))

        def run(tables: Any = tables, arguments: Any = (ids, offsets, weights), pooling: Any = pooling) -> None:
            torch.cat(list(tables.lookup(*arguments, pooling=pooling).values())).sum().backward()

        counted.append(aten_calls(run))
    assert {name for name in counted[1] if counted[0][name] != counted[1][name]} <= VIEWS
    assert sum(counted[0].values()) > 10


class LargestTensor(TorchDispatchMode):
    """Watches every operator: the largest tensor that one makes, and all shapes."""

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()
        self.ignored, self.numel, self.total = ignored, 0, 0
        self.shapes: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            # Views of the weights and in-place results are no new memory.
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self.ignored:
                self.numel = max(self.numel, value.numel())
                self.total += value.numel()
                self.shapes.append((str(func), tuple(value.shape)))
        return result


ROW_METHODS = [
    m for m in all_methods() if m.kind in ("full", "hash", "multi_hash", "unified", "compositional", "pruned")
]


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("method", ROW_METHODS, ids=method_id)
def test_the_tensors_of_a_step_do_not_grow_with_the_rows(method: Method, optimizer: str) -> None:
    seen = []
    for rows in (10**4, 10**6):
        tables = make(method, [TableConfig("a", rows, 4), TableConfig("b", rows, 4)], "50%", optimizer)
        # The same ids, all different, so that both tables touch as many rows; collisions may differ by chance.
        ids = torch.arange(64).view(32, 2)
        step(tables, ids)()
        watch = LargestTensor({t.untyped_storage()._cdata for t in [*tables.buffers(), *tables.parameters()]})
        with watch:
            step(tables, ids)()
        assert not any(p.grad is not None for p in tables.parameters())
        # Neither does a lookup without gradients, in training or in serving.
        tables.eval()
        reading = LargestTensor(watch.ignored)
        with reading:
            tables(ids)
        assert 0 < reading.numel <= 64 * 64
        seen.append(watch)
    assert seen[0].numel <= 64 * 64 and seen[1].numel <= 64 * 64
    assert abs(seen[0].total - seen[1].total) < 0.1 * seen[0].total
    assert [name for name, _ in seen[0].shapes] == [name for name, _ in seen[1].shapes]
    if method.kind in ("full", "pruned"):
        assert seen[0].shapes == seen[1].shapes


@pytest.mark.parametrize("precision", ["binary/1", "int2/64"])
def test_steps_that_round_rows_do_not_grow_with_the_rows(precision: str) -> None:
    """Those among them that find scales anew: of 40 steps of 64 lookups two, by blocks of 64 rows."""
    seen = []
    for rows in (10**4, 10**6):
        tables = EmbeddingTables(plan([TableConfig("a", rows, 4)], "full", optimizer="adam", precision=precision))
        tables.fake_quantize()
        ids = torch.arange(64).view(64, 1)
        watch = LargestTensor({t.untyped_storage()._cdata for t in tables.buffers()})
        with watch:
            for _ in range(40):
                step(tables, ids)()
        seen.append(watch)
    assert 0 < seen[0].numel <= 64 * 64 and seen[0].shapes == seen[1].shapes


@pytest.mark.parametrize("method", ["full", "hash"])
def test_peak_memory_and_shapes_are_those_of_100_thousand_rows_for_10_million(method: str) -> None:
    peaks, shapes = [], []
    for rows in (10**5, 10**7):
        solved = plan(
            [TableConfig("a", rows, 4)], method, None if method == "full" else "50%", optimizer="rowwise_adagrad"
        )
        tables = EmbeddingTables(solved, device="meta").to_empty(device="cpu")
        tables._build(tables.store)  # the constants; initial values do not matter here
        for tensor in [*tables.store.state_dict().values(), *tables.store.optimizer_state().values()]:
            tensor.zero_()
        ids = (torch.arange(256) * 37 % rows).unsqueeze(1)
        step(tables, ids)()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as profiler:
            step(tables, ids)()
        # Bytes alive at any moment of the step, from the profiler's record of every allocation.
        records = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
        alive = peak = 0
        for record in sorted(records, key=lambda r: r.start_ns()):
            alive += record.nbytes()
            peak = max(peak, alive)
        peaks.append(peak)
        # Operands with more than a million elements are the weights and their state, read and written in place.
        shapes.append(
            [
                (e.name, [s if not s or s[0] not in (rows, rows // 2) else "weights" for s in e.input_shapes])
                for e in profiler.events()
                if e.name.startswith(("aten::", "embtables::"))
            ]
        )
    assert 0 < peaks[1] < 200_000 and abs(peaks[0] - peaks[1]) < 0.1 * peaks[0]
    if method == "full":
        assert shapes[0] == shapes[1]
    else:
        assert [name for name, _ in shapes[0]] == [name for name, _ in shapes[1]]


@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_a_fused_step_makes_no_gradient_of_the_size_of_a_table(method: Method) -> None:
    tables = make(method.for_training(10**6), [TableConfig("a", 50_000, 8), TableConfig("b", 20_000, 8)], "50%")
    weights = sum(t.numel() for _, t, is_code in tables.store.tensors() if not is_code)
    ids = random_ids(tables, 8)
    watch = LargestTensor({t.untyped_storage()._cdata for t in tables.buffers()})
    with watch:
        step(tables, ids)()
    assert watch.numel <= 8 * 2 * 8 * 8
    assert weights == 0 or watch.numel < weights / 10
