"""Pruned tables: exact bytes of each served form, the schedule, and lookups that equal the dense reconstruction."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embtables import SGD, Adagrad, Adam, EmbeddingTables, InfeasibleBudget, TableConfig, ops, plan
from embtables.lookup.store import Store
from embtables.methods import pruned
from embtables.methods.pruned import Pruned, PruningStage, by_dim
from embtables.sizes.layout import Group


def variant(tables: EmbeddingTables, name: str) -> str:
    return tables.plan.groups[0].layout.entries[name].variant


def kept(tables: EmbeddingTables, name: str) -> int:
    number: int = tables.plan.groups[0].layout.entries[name].values["entries"]
    return number


def largest(weight: np.ndarray, number: int) -> np.ndarray:
    """``weight`` with all but its ``number`` largest magnitudes set to zero; the first of equals stay."""
    order = np.argsort(-np.abs(weight.reshape(-1)), kind="stable")
    result = np.zeros(weight.size, dtype=weight.dtype)
    result[order[:number]] = weight.reshape(-1)[order[:number]]
    return result.reshape(weight.shape)


def stored_bytes(tables: EmbeddingTables) -> int:
    assert not list(tables.parameters())
    return sum(tensor.untyped_storage().nbytes() for tensor in tables.store.state_dict().values())


# ---- sizes -----------------------------------------------------------------------------------------------------------

FORMS = ["bitmap", "compressed rows", "entries"]


@pytest.mark.parametrize(
    ("form", "rows", "dim", "num_bytes", "spare", "number"),
    [
        # 500·12 bits are 12 blocks of 512, with an int32 each.
        ("bitmap", 500, 12, 12 * 64 + 12 * 4 + 4 * 777, 3, 777),
        ("compressed rows", 500, 200, 501 * 4 + 5 * 1500, 4, 1500),
        ("compressed rows", 500, 300, 501 * 4 + 6 * 2000, 5, 2000),
        ("entries", 500, 12, 9 * 40, 8, 40),
        ("entries", 500, 300, 10 * 40, 9, 40),
        ("entries", 3, 40_000, 12 * 2, 6, 2),
    ],
)
def test_bytes_of_each_form(form: str, rows: int, dim: int, num_bytes: int, spare: int, number: int) -> None:
    tables = EmbeddingTables(plan([TableConfig("a", rows, dim)], "pruned", num_bytes + spare))
    assert variant(tables, "a") == form
    assert kept(tables, "a") == number
    assert tables.plan.inference_bytes == num_bytes
    served = tables.serve()
    assert stored_bytes(served) == num_bytes == served.memory().inference_bytes
    dense = tables.store.slab("pruned/" + str(dim)).numpy()
    np.testing.assert_array_equal(served.to_dense("a").numpy(), largest(dense, number))


def test_integers_are_as_wide_as_the_table_needs() -> None:
    def dtypes(rows: int, dim: int, limit: int) -> tuple[str, dict[str, str]]:
        tables = by_dim(Group("g", (TableConfig("a", rows, dim),), (None,), 0))[0]
        form, _, codes = tables.largest_form(limit)
        return form, {code.name.split("/")[-1]: code.dtype for code in codes}

    assert dtypes(2**31 - 1, 16, 10**6) == ("entries", {"values": "float32", "columns": "uint8", "ids": "int32"})
    assert dtypes(2**31, 16, 10**6) == ("entries", {"values": "float32", "columns": "uint8", "ids": "int64"})
    assert dtypes(1000, 32_768, 10**4)[1]["columns"] == "int16"
    assert dtypes(1000, 32_769, 10**4)[1]["columns"] == "int32"
    bitmap = 2**32 // 8
    assert dtypes(2**28, 16, bitmap + bitmap // 16 + 4 * 2**31 - 4)[1]["directory"] == "int32"
    assert dtypes(2**28, 16, bitmap + bitmap // 8 + 4 * 2**31)[1]["directory"] == "int64"


sizes_of_tables = st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 20)), min_size=1, max_size=5)


def configs(sizes: list[tuple[int, int]]) -> list[TableConfig]:
    return [TableConfig(f"t{i}", n, d) for i, (n, d) in enumerate(sizes)]


@settings(max_examples=100)
@given(sizes_of_tables, st.floats(0.0001, 1.0))
def test_plan_is_exact_or_names_its_floor(sizes: list[tuple[int, int]], share: float) -> None:
    tables = configs(sizes)
    budget = max(1, int(share * sum(4 * n * d for n, d in sizes)))
    try:
        solved = plan(tables, "pruned", budget)
    except InfeasibleBudget as error:
        assert error.floor_bytes > budget
        budget = error.floor_bytes
        solved = plan(tables, "pruned", budget)
        with pytest.raises(InfeasibleBudget):
            plan(tables, "pruned", budget - 1)
    assert solved.inference_bytes <= budget
    built = EmbeddingTables(solved)
    dense = {t.name: built.to_dense(t.name).numpy() for t in tables}
    served = built.finalize()
    assert stored_bytes(served) == solved.inference_bytes == served.memory().inference_bytes
    for dim in {t.embedding_dim for t in tables}:
        names = [t.name for t in tables if t.embedding_dim == dim]
        before = np.concatenate([dense[name] for name in names])
        after = np.concatenate([served.to_dense(name).numpy() for name in names])
        whole = variant(served, names[0]) == "full"
        np.testing.assert_array_equal(after, before if whole else largest(before, kept(served, names[0])))


@settings(max_examples=60)
@given(sizes_of_tables, st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4))
def test_a_larger_budget_shrinks_nothing(sizes: list[tuple[int, int]], shares: list[float]) -> None:
    tables = configs(sizes)
    full = sum(4 * n * d for n, d in sizes)
    before: dict[str, int] = {}
    feasible = False
    for budget in sorted({int(share * full) + more for share in shares for more in range(1, 14)}):
        try:
            layout = plan(tables, "pruned", budget).groups[0].layout
        except InfeasibleBudget:
            assert not feasible
            continue
        feasible = True
        after = {str(d): 0 for _, d in sizes}
        for code in layout.serving.codes:
            after[code.name.split("/")[1]] += code.num_bytes
        for table in tables:
            if layout.entries[table.name].variant == "full":
                after[str(table.embedding_dim)] += table.full_bytes or 0
        assert all(after[dim] >= before.get(dim, 0) for dim in after)
        before = after
    assert plan(tables, "pruned", full).inference_bytes == full


def test_every_byte_of_one_form_to_the_next() -> None:
    """One step of a byte never takes any away, where forms take over from each other as well."""
    tables = by_dim(Group("g", (TableConfig("a", 200, 9), TableConfig("b", 15, 9)), (None, None), 0))[0]
    found = [tables.largest_form(limit) for limit in range(tables.least_bytes, tables.full_bytes)]
    assert [form for form, _ in dict.fromkeys((form, 0) for form, _, _ in found)] == ["entries", "bitmap"]
    totals = [sum(code.num_bytes for code in codes) for _, _, codes in found]
    assert all(a <= b for a, b in pairwise(totals))
    assert all(0 <= limit - total < 9 for limit, total in zip(range(tables.least_bytes, tables.full_bytes), totals))


# ---- serving ---------------------------------------------------------------------------------------------------------


def fill(tables: EmbeddingTables, values: np.ndarray, dim: int) -> None:
    tables.store.slab(f"pruned/{dim}").copy_(torch.from_numpy(values))


@pytest.mark.parametrize("share", [0.7, 0.2, 0.02])
@pytest.mark.parametrize("dim", [5, 16, 260])
def test_ties_and_zeros_keep_the_bytes_exact(share: float, dim: int) -> None:
    tables = EmbeddingTables(plan([TableConfig("a", 300, dim), TableConfig("b", 41, dim)], "pruned", share))
    generator = np.random.default_rng(0)
    values = generator.integers(-2, 3, (341, dim)).astype(np.float32) * (generator.random((341, 1)) < 0.5)
    fill(tables, values.astype(np.float32), dim)
    served = tables.serve()
    assert stored_bytes(served) == tables.plan.inference_bytes
    expected = largest(values.astype(np.float32), kept(tables, "a"))
    np.testing.assert_array_equal(served.to_dense("a").numpy(), expected[:300])
    np.testing.assert_array_equal(served.to_dense("b").numpy(), expected[300:])
    fill(tables, np.zeros((341, dim), dtype=np.float32), dim)
    assert not tables.serve().to_dense("a").any()


@pytest.mark.parametrize("form", FORMS)
def test_lookups_pool_what_the_dense_reconstruction_holds(form: str, tmp_path: Path) -> None:
    dim, share = {"bitmap": (6, 0.3), "compressed rows": (120, 0.02), "entries": (6, 0.03)}[form]
    tables = EmbeddingTables(
        plan(
            [
                TableConfig("a", 700, dim, feature_names=["a1", "a2"]),
                TableConfig("b", 90, dim, pooling="mean", padding_idx=3, on_out_of_range="oov"),
                TableConfig("c", 90, 2 * dim),
            ],
            "pruned",
            share,
        )
    )
    served = tables.serve()
    assert variant(served, "a") == form
    weight = tables.store.slab(f"pruned/{dim}").numpy()
    expected = largest(weight, kept(tables, "a"))
    generator = np.random.default_rng(2)
    lengths = generator.integers(0, 6, 4 * 8)
    feature = np.repeat(np.arange(4), lengths.reshape(4, 8).sum(1))
    ids = generator.integers(0, np.array([700, 700, 300, 90])[feature])
    found = served(torch.from_numpy(ids), torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))).numpy()
    ends = lengths.cumsum()
    for f, name in enumerate(["a", "a", "b"]):
        for b in range(8):
            bag = ids[ends[8 * f + b] - lengths[8 * f + b] : ends[8 * f + b]]
            rows = [min(x, 90) + 700 for x in bag if x != 3] if name == "b" else list(bag)
            total = sum((expected[row] for row in rows), np.zeros(dim, dtype=np.float32))
            vector = total / max(1, len(rows)) if name == "b" else total
            np.testing.assert_allclose(found[b, f * dim : (f + 1) * dim], vector, rtol=1e-5, atol=1e-7)
    assert 0 < served.to_dense("a").count_nonzero() < tables.to_dense("a").count_nonzero()
    assert served.collision_share("a") == 0.0

    served.save(tmp_path / "served.safetensors")
    loaded = EmbeddingTables.load(tmp_path / "served.safetensors")
    tables.save(tmp_path / "tables.safetensors")
    assert (tmp_path / "tables.safetensors").read_bytes() == (tmp_path / "served.safetensors").read_bytes()
    tables.finalize()
    for other in (loaded, tables):
        assert other.memory().inference_bytes == tables.plan.inference_bytes
        for name in "abc":
            assert torch.equal(other.to_dense(name), served.to_dense(name))


def sparse_row(matrix: dict[str, np.ndarray], form: str, row: int, dim: int) -> np.ndarray:
    """A row of a sparse matrix by its codes, in scalar loops: values that there are, in columns that there are."""
    vector, values = np.zeros(dim, dtype=matrix["values"].dtype), matrix["values"]

    def take(at: int, column: int) -> None:
        if 0 <= at < len(values) and 0 <= column < dim:
            vector[column] = values[at]

    if form == "bitmap":
        begin = row * dim
        at = int(matrix["directory"][begin // 512])
        for bit in range(begin // 512 * 512, begin + dim):
            if int(matrix["bitmap"][bit // 64]) >> bit % 64 & 1:
                if bit >= begin:
                    take(at, bit - begin)
                at += 1
    elif form == "compressed rows":
        begin, end = int(matrix["pointers"][row]), min(int(matrix["pointers"][row + 1]), len(values))
        for at in range(begin, end) if begin >= 0 else ():
            take(at, int(matrix["columns"][at]))
    else:
        for at in np.flatnonzero(matrix["ids"] == row):
            take(int(at), int(matrix["columns"][at]))
    return vector


@pytest.mark.skipif(ops.instructions() is None, reason="needs the native library: pip install -e . with a C++ compiler")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_native_rows_are_what_the_codes_say_even_if_damaged(form: str, damage: bool, half: bool) -> None:
    for dim, share in {"bitmap": [(6, 0.3), (64, 0.6)], "compressed rows": [(120, 0.02), (300, 0.05)]}.get(
        form, [(6, 0.03), (16, 0.002)]
    ):
        configs = [TableConfig("a", 70, dim), TableConfig("b", 41, dim, padding_idx=2)]
        served = EmbeddingTables(plan(configs, "pruned", share)).finalize().eval()
        served = served.half() if half else served
        assert variant(served, "a") == form and served.lookups.ops == "native"
        prefix = f"pruned/{dim}/"
        codes = {name[len(prefix) :]: served.store.code(name) for name in served.store.code_names()}
        generator = np.random.default_rng(dim)
        for name, code in codes.items() if damage else ():
            # Rows are bisected, and what is found of those that do not rise is nobody's promise.
            if name not in ("values", "ids"):
                limits = np.iinfo(code.numpy().dtype)
                for place in generator.integers(0, len(code), max(1, len(code) // 10)):
                    code[place] = int(generator.integers(limits.min, limits.max, endpoint=True))
        matrix = {name: code.numpy() for name, code in codes.items()}
        ids = torch.stack([torch.arange(70), torch.arange(70) % 41], 1)
        found = served(ids).view(70, 2, dim).numpy()
        for x, y in ids.tolist():
            np.testing.assert_array_equal(found[x, 0], sparse_row(matrix, form, x, dim))
            expected = sparse_row(matrix, form, 70 + y, dim) if y != 2 else np.zeros(dim, dtype=found.dtype)
            np.testing.assert_array_equal(found[x, 1], expected)
        with ops.using("reference"):
            assert damage or np.array_equal(served(ids).view(70, 2, dim).numpy(), found)


@pytest.mark.skipif(ops.instructions() is None, reason="needs the native library: pip install -e . with a C++ compiler")
@pytest.mark.parametrize(
    "precision, share",
    [("bf16", "9%"), ("int8", "9%"), ("int4", "9%"), ("int2", "5.2%"), ("binary", "2.6%"), ("binary/16", "5%")],
)
@pytest.mark.parametrize("dim", [4, 5, 8, 13, 16, 64])
def test_native_rows_of_packed_values_equal_the_reference(precision: str, share: str, dim: int) -> None:
    """Runs of values begin within bytes, cross blocks that share a scale, and end where there are no more."""
    tables = EmbeddingTables(plan([TableConfig("a", 400, dim)], "pruned", share, precision=precision), std=1)
    served = tables.finalize().eval()
    assert served.lookups.ops == "native"
    with ops.using("reference"):
        expected = served.to_dense("a")
    assert 1 < expected.count_nonzero() < 400 * dim or precision == "binary/16"
    assert torch.equal(served(torch.arange(400).unsqueeze(1)), expected)
    ids, offsets = torch.randint(400, (900,)), torch.arange(0, 901, 9)
    bags = served(ids, offsets, pooling="sum")
    torch.testing.assert_close(bags.double(), expected.double()[ids].view(100, 9, dim).sum(1), rtol=1e-4, atol=1e-5)


def test_no_dense_table_comes_up_in_a_lookup() -> None:
    """The largest tensor that a lookup makes depends on the ids, not on the table."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        made = 0

        def __init__(self, own: set[int]) -> None:
            super().__init__()
            self.own = own

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.own:
                    self.made = max(self.made, tensor.untyped_storage().nbytes())
            return out

    for share, form in ((0.5, "bitmap"), (0.001, "entries")):
        tables = EmbeddingTables(plan([TableConfig("a", 100_000, 8)], "pruned", share)).finalize()
        assert variant(tables, "a") == form
        own = {t.untyped_storage().data_ptr() for t in tables.store.state_dict().values()}
        with Largest(own) as mode, ops.using("reference"):  # native code makes no tensors beside its output
            tables(torch.arange(0, 100_000, 9999).unsqueeze(1))
        assert 0 < mode.made <= 11 * 8 * 8


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_empty_batches(share: float) -> None:
    tables = EmbeddingTables(plan([TableConfig("a", 1000, 8), TableConfig("b", 1000, 8)], "pruned", share)).finalize()
    assert tables(torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 16)
    none = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(tables(none, torch.zeros(7, dtype=torch.int64)), torch.zeros(3, 16))


def test_tables_that_fit_stay_full() -> None:
    tables = EmbeddingTables(plan([TableConfig("a", 10, 4), TableConfig("b", 10, 8)], "pruned", 1.0))
    assert variant(tables, "a") == variant(tables, "b") == "full"
    assert tables.serve() is tables and not tables.stages


# ---- training --------------------------------------------------------------------------------------------------------


def nonzero(tables: EmbeddingTables, dim: int) -> int:
    return int(tables.store.slab(f"pruned/{dim}").count_nonzero())


def stage(tables: EmbeddingTables) -> PruningStage:
    found = tables.stages[0]
    assert isinstance(found, PruningStage)
    return found


@pytest.mark.parametrize("schedule", ["cubic", "exponential"])
@pytest.mark.parametrize(("lr", "std"), [(1.0, 1e-6), (1e-4, 1.0), (0.1, 0.01)])
def test_sparsity_meets_its_target_whatever_rate_and_scale(schedule: str, lr: float, std: float) -> None:
    method = Pruned(warmup_steps=5, prune_steps=40, interval=4, schedule=schedule)  # type: ignore[arg-type]
    solved = plan([TableConfig("a", 3000, 8), TableConfig("b", 500, 4)], method, "10%", optimizer=SGD(lr=lr))
    tables = EmbeddingTables(solved, std=std)
    generator = torch.Generator().manual_seed(0)
    total = {8: 3000 * 8, 4: 500 * 4}
    targets = {8: kept(tables, "a"), 4: kept(tables, "b")}
    levels = []
    for step in range(1, 46):
        out = tables(torch.randint(500, (64, 2), generator=generator))
        time = max(0, step - 5) / 40
        gone = 1 - (1 - time) ** 3 if schedule == "cubic" else (1 - 1000**-time) / (1 - 1 / 1000)
        if step > 5 and (step - 45) % 4 == 0:
            for dim in (8, 4):
                expected = total[dim] - gone * (total[dim] - targets[dim])
                assert abs(nonzero(tables, dim) - expected) <= 1e-3 * total[dim]
            levels.append(nonzero(tables, 8))
        elif step <= 5:
            assert nonzero(tables, 8) == total[8]
        out.square().sum().backward()
    assert all(a > b for a, b in pairwise(levels)) and len(levels) == 10
    tables(torch.zeros(1, 2, dtype=torch.int64))
    assert nonzero(tables, 8) >= targets[8]


def test_large_tables_are_pruned_from_a_sample() -> None:
    pruned_by_sample = EmbeddingTables(
        plan([TableConfig("a", 100_000, 16)], Pruned(warmup_steps=0, prune_steps=10, interval=1), "10%")
    )
    total, target = 1_600_000, kept(pruned_by_sample, "a")
    ids = torch.zeros(1, 1, dtype=torch.int64)
    assert total > 4 * pruned._SAMPLE
    for step in range(1, 10):
        pruned_by_sample(ids)
        expected = total - (1 - (1 - step / 10) ** 3) * (total - target)
        assert -0.002 * total < nonzero(pruned_by_sample, 16) - expected < 0.01 * total
    pruned_by_sample(ids)
    assert nonzero(pruned_by_sample, 16) == target
    for _ in range(30):
        pruned_by_sample(ids)
    assert nonzero(pruned_by_sample, 16) > 0.999 * target


def test_magnitudes_are_ranked_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(700_000, generator=generator), torch.tensor([0.0, -0.0, 1e-45, -3e38, 1e-39])])
    ranked = values.abs().sort(descending=True).values
    for rank in (1, 2, 1000, 350_000, 700_000, 700_001, 700_002, 700_003, 700_004, 700_005):
        assert torch.equal(pruned._magnitude_of_rank(values, rank), ranked[rank - 1])


def test_the_schedule_fits_the_run() -> None:
    fitted = Pruned().for_training(1000)
    assert isinstance(fitted, Pruned)
    assert (fitted.warmup_steps, fitted.prune_steps) == (100, 500)
    assert Pruned(warmup_steps=7, prune_steps=9).for_training(1000) == Pruned(warmup_steps=7, prune_steps=9)
    store = Store([], None)
    for method in (Pruned(), fitted, Pruned().for_training(1), Pruned(prune_steps=3, interval=7)):
        assert isinstance(method, Pruned)
        made = PruningStage(method, {}, store)
        schedule = made.schedule
        end = schedule.warmup_steps + schedule.prune_steps
        events = [step for step in range(end + 1) if schedule.prunes_at(step)]
        assert events[-1] == end and len(events) <= 30 and events[0] > schedule.warmup_steps
        assert schedule.progress(end) == 1.0 and schedule.progress(schedule.warmup_steps) == 0.0
    with pytest.raises(ValueError, match="pruned, field 'prune_steps'"):
        Pruned(prune_steps=0)


def test_evaluation_does_not_count() -> None:
    tables = EmbeddingTables(plan([TableConfig("a", 100, 4)], "pruned", 0.5))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    tables(ids)
    with torch.no_grad():
        tables(ids)
    tables.eval()
    tables(ids)
    assert int(stage(tables).steps) == 1


class Foreign(torch.nn.Module):
    """A model that knows nothing of the tables inside it."""

    def __init__(self, tables: EmbeddingTables) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tables = tables
        self.head = torch.nn.Linear(sum(tables.embedding_dims), 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.tables(ids)).squeeze(1)
        return logits


def train(model: Foreign, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.stack(
            [torch.randint(200, (256,), generator=generator), torch.randint(30, (256,), generator=generator)], 1
        )
        labels = (ids[:, 0] * 7 % 5 + ids[:, 1] % 3 < 3).float()
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(ids), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def foreign(fused: SGD | Adam | Adagrad | None) -> tuple[Foreign, torch.optim.Optimizer]:
    method = Pruned(warmup_steps=20, prune_steps=60, interval=6)
    solved = plan([TableConfig("a", 200, 8), TableConfig("b", 30, 8)], method, "30%", optimizer=fused)
    model = Foreign(EmbeddingTables(solved, std=0.1))
    return model, torch.optim.Adam(model.parameters(), lr=0.02)


@pytest.mark.parametrize("fused", [None, Adam(lr=0.02), Adagrad(lr=0.1)], ids=str)
def test_prunes_inside_a_foreign_training_loop(fused: Adam | Adagrad | None) -> None:
    model, optimizer = foreign(fused)
    losses = train(model, optimizer, range(110))
    assert losses[-1] < 0.8 * losses[0]
    assert int(stage(model.tables).steps) == 110
    target = kept(model.tables, "a")
    model(torch.zeros(1, 2, dtype=torch.int64))
    model.tables.finalize()
    assert sum(int(model.tables.to_dense(name).count_nonzero()) for name in "ab") <= target
    assert model(torch.zeros(4, 2, dtype=torch.int64)).isfinite().all()
    assert stored_bytes(model.tables) == model.tables.plan.inference_bytes


@pytest.mark.parametrize("fused", [None, Adam(lr=0.02)], ids=str)
def test_resumes_exactly_in_the_middle_of_pruning(fused: Adam | None) -> None:
    straight, optimizer = foreign(fused)
    train(straight, optimizer, range(90))

    first, optimizer = foreign(fused)
    train(first, optimizer, range(47))
    state = first.state_dict(), first.tables.optimizer_state_dict(), optimizer.state_dict()
    resumed, optimizer = foreign(fused)
    train(resumed, optimizer, range(3))
    resumed.load_state_dict(state[0])
    resumed.tables.load_optimizer_state_dict(state[1])
    optimizer.load_state_dict(state[2])
    assert int(stage(resumed.tables).steps) == 47
    train(resumed, optimizer, range(47, 90))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for name in "ab":
        assert torch.equal(straight.tables.serve().to_dense(name), resumed.tables.serve().to_dense(name))


_BEFORE_A_WALL = """
import ctypes, mmap, sys
import torch
from embtables import EmbeddingTables, TableConfig, ops, plan

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def moved(tensor):
    # To the end of a page, behind which nobody may read.
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    place = libc.mmap(None, pages + mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, 0x22, -1, 0)
    assert libc.mprotect(place + pages, mmap.PAGESIZE, 0) == 0
    memory = (ctypes.c_uint8 * size).from_address(place + pages - size)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


ids = torch.arange(401).unsqueeze(1)
for precision, share in zip("int8 int4 int4 int2 binary fp32".split(), (0.09, 0.09, 0.03, 0.052, 0.05, 0.2)):
    for dim in (4, 5, 13, 16, 64, 128):
        tables = EmbeddingTables(plan([TableConfig("a", 401, dim)], "pruned", share, precision=precision), std=1)
        tables = tables.finalize().eval()
        with ops.using("reference"):
            expected = tables.to_dense("a")
        for tensor in (*tables.store.buffers(), *tables.store.parameters()):
            if tensor.numel():
                tensor.data = moved(tensor.data)
        assert torch.equal(tables(ids), expected)
for dim in (1, 3, 5, 7, 9, 15, 17, 24, 31, 33, 48, 100, 127, 129):
    tables = EmbeddingTables(plan([TableConfig("a", 33, dim)], "full", optimizer="rowwise_adagrad"))
    for tensor in (*tables.store.parameters(), *tables.store.buffers()):
        if tensor.numel():
            tensor.data = moved(tensor.data)
    vectors = tables(torch.tensor([32, 0, 32, 31]), torch.tensor([0, 1, 4]), pooling="sum")
    vectors.backward(moved(torch.ones_like(vectors)))
print("held")
"""


@pytest.mark.skipif(ops.instructions() is None, reason="needs the native library: pip install -e . with a C++ compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps memory as Linux does")
@pytest.mark.parametrize("instructions", ["baseline", "avx2", "best"])
def test_nothing_is_read_behind_the_last_value(instructions: str) -> None:
    if instructions == "avx2" and ops.instructions() != "avx512":
        pytest.skip("the best instructions are avx2, or this processor has none of the two")
    variable = {} if instructions == "best" else {"EMBTABLES_INSTRUCTIONS": instructions}
    done = subprocess.run(
        [sys.executable, "-c", _BEFORE_A_WALL], env=os.environ | variable, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "held\n"), done.stderr[-2000:]
