"""``EmbeddingTables``: shapes, bags, pooling, padding, ids out of range, files, devices, torch.optim, bad input."""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import counted_bytes, random_ids
from torch import Tensor

from embtables import EmbeddingTables, Plan, TableConfig, plan
from embtables.methods import kinds

pytestmark = pytest.mark.core


def build(tables: list[TableConfig], method: Any = "full", budget: Any = None, **options: Any) -> EmbeddingTables:
    solved = plan(tables, method, budget, optimizer=options.pop("optimizer", None))
    return EmbeddingTables(solved, **options)


MIXED = [
    TableConfig("user", 20, 4),
    TableConfig("item", 30, 3, feature_names=["item", "history"], pooling="mean"),
    TableConfig("city", 9, 4, feature_names=["city", "item"]),
]


def vector(tables: EmbeddingTables, name: str, id_: int) -> list[float]:
    return [float(v) for v in tables.to_dense(name)[id_]]


# ---- shapes and order ------------------------------------------------------------------------------------------------


def test_columns_are_features_in_order_of_appearance_and_outputs_table_by_table() -> None:
    tables = build(MIXED)
    assert tables.feature_names == ["user", "item", "history", "city"]
    assert tables.output_names == ["user", "item@item", "history", "city", "item@city"]
    assert tables.embedding_dims == [4, 3, 3, 4, 4]
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    expected = [
        vector(tables, "user", u) + vector(tables, "item", i) + vector(tables, "item", h)
        + vector(tables, "city", c) + vector(tables, "city", i)
        for u, i, h, c in ids.tolist()
    ]  # fmt: skip
    assert tables(ids).tolist() == expected
    assert torch.equal(tables(ids), tables(ids.int()))


def test_methods_by_pattern_and_dimensions_keep_the_order() -> None:
    configs = [TableConfig(f"t{i}", 40 + i, d) for i, d in enumerate([4, 8, 4, 2, 8, 4])]
    tables = build(configs, {"t[024]": "hash", "t5": "full", "*": {"kind": "multi_hash"}}, "50%")
    ids = random_ids(tables, 7)
    expected = torch.cat([tables.to_dense(t.name)[ids[:, i]] for i, t in enumerate(configs)], 1)
    assert torch.equal(tables(ids), expected)
    offsets = torch.arange(7 * 6 + 1)
    torch.testing.assert_close(tables(ids.t().reshape(-1), offsets), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bags_equal_loops_in_python(dtype: torch.dtype) -> None:
    tables = build(MIXED)
    generator = torch.Generator().manual_seed(3)
    batch, sizes = 5, {"user": 20, "item": 9, "history": 30, "city": 9}
    lengths = torch.randint(0, 4, (4 * batch,), generator=generator)
    lengths[[0, 7, 19]] = 0
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(dtype)
    limits = torch.tensor(list(sizes.values())).repeat_interleave(lengths.view(4, batch).sum(1))
    values = (torch.rand(int(lengths.sum()), generator=generator) * limits).to(dtype)
    factors = torch.randn(values.numel(), generator=generator)
    uses = [("user", 0, "sum"), ("item", 1, "mean"), ("item", 2, "mean"), ("city", 3, "sum"), ("city", 1, "sum")]
    for weights in (None, factors):
        result = tables(values, offsets, weights)
        for example in range(batch):
            line: list[float] = []
            for name, feature, pooling in uses:
                begin, end = offsets[feature * batch + example], offsets[feature * batch + example + 1]
                bag = np.zeros(tables.to_dense(name).shape[1])
                for i in range(int(begin), int(end)):
                    factor = 1.0 if weights is None else float(weights[i])
                    bag += factor * np.array(vector(tables, name, int(values[i])))
                line += list(bag / max(1, int(end - begin)) if pooling == "mean" else bag)
            np.testing.assert_allclose(result[example].detach().numpy(), line, rtol=1e-5, atol=1e-6)


def test_a_call_may_choose_the_pooling_of_all_or_of_one_feature() -> None:
    tables = build([TableConfig("a", 10, 2), TableConfig("b", 10, 2, pooling="mean")])
    values, offsets = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2, 4])
    a, b = tables.to_dense("a"), tables.to_dense("b")
    sums = torch.cat([a[1] + a[2], b[3] + b[4]])
    torch.testing.assert_close(tables(values, offsets, pooling="sum")[0], sums)
    torch.testing.assert_close(tables(values, offsets, pooling="mean")[0], sums / 2)
    torch.testing.assert_close(tables(values, offsets)[0], torch.cat([a[1] + a[2], (b[3] + b[4]) / 2]))
    both = tables(values, offsets, pooling={"a": "mean", "b": "sum"})[0]
    torch.testing.assert_close(both, torch.cat([(a[1] + a[2]) / 2, b[3] + b[4]]))
    assert torch.equal(tables(values, offsets, pooling=None), torch.stack([a[1], a[2], b[3], b[4]]))
    ids = torch.tensor([[1, 3], [2, 4]])
    assert torch.equal(tables(ids, pooling=None), torch.stack([torch.stack([a[1], b[3]]), torch.stack([a[2], b[4]])]))


def test_vectors_of_groups_come_back_in_the_order_of_the_values() -> None:
    configs = [TableConfig(n, 30, 4) for n in "abc"]
    tables = build(configs, {"b": "hash", "*": "full"}, "80%")
    values, offsets = torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([0, 1, 3, 3, 4, 6, 6])
    expected = [tables.to_dense(n)[i] for n, i in zip("aaa" + "b" + "cc", values.tolist())]
    assert torch.equal(tables(values, offsets, pooling=None), torch.stack(expected))
    weights = torch.arange(6.0)
    weighted = tables(values, offsets, weights, pooling=None)
    assert torch.equal(weighted, torch.stack(expected) * weights.unsqueeze(1))


def test_empty_batches_and_batches_of_empty_bags() -> None:
    tables = build(MIXED)
    assert tables(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 18)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert tables(nothing, torch.zeros(1, dtype=torch.int64)).shape == (0, 18)
    assert torch.equal(tables(nothing, torch.zeros(13, dtype=torch.int64)), torch.zeros(3, 18))
    tables(nothing, torch.zeros(13, dtype=torch.int64)).sum().backward()
    fused = build(MIXED, optimizer="adam")
    fused(torch.zeros(0, 4, dtype=torch.int64)).sum().backward()
    fused(nothing, torch.zeros(13, dtype=torch.int64)).sum().backward()
    assert torch.equal(fused.to_dense("user"), tables.to_dense("user"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float16, torch.bool])
def test_weights_of_any_dtype_are_numbers(dtype: torch.dtype) -> None:
    tables = build([TableConfig("a", 10, 2)])
    values, offsets = torch.tensor([1, 2]), torch.tensor([0, 2])
    result = tables(values, offsets, torch.tensor([1, 0]).to(dtype))
    assert result.dtype == torch.float32 and torch.equal(result[0], tables.to_dense("a")[1])


# ---- padding and ids out of range ------------------------------------------------------------------------------------


def test_padding_is_zero_has_no_gradient_and_does_not_count_in_a_mean() -> None:
    configs = [TableConfig("a", 10, 2, padding_idx=3, pooling="mean"), TableConfig("b", 10, 2, pooling="mean")]
    tables = build(configs)
    values, offsets = torch.tensor([3, 1, 2, 3, 3, 3, 1, 2]), torch.tensor([0, 3, 5, 6, 8])
    result = tables(values, offsets)
    a, b = tables.to_dense("a"), tables.to_dense("b")
    assert torch.equal(a[3], torch.zeros(2)) and not torch.equal(b[3], torch.zeros(2))
    torch.testing.assert_close(result[0], torch.cat([(a[1] + a[2]) / 2, b[3]]))
    torch.testing.assert_close(result[1], torch.cat([torch.zeros(2), (b[1] + b[2]) / 2]))
    result.sum().backward()
    (weight,) = tables.parameters()
    start = tables.store.start("a")
    assert weight.grad is not None and torch.equal(weight.grad[start + 3], torch.zeros(2))
    torch.testing.assert_close(weight.grad[start + 1], torch.full((2,), 0.5))
    assert torch.equal(tables(torch.tensor([[3, 3]]))[0], torch.cat([torch.zeros(2), b[3]]))


def test_padding_is_not_touched_by_an_optimizer_with_momentum_or_decay() -> None:
    for optimizer in ({"kind": "adam", "lr": 0.1}, {"kind": "sgd", "l2": 0.5}):
        tables = build([TableConfig("a", 10, 2, padding_idx=3)], optimizer=optimizer)
        before = tables.store.slab("a").clone()
        for _ in range(3):
            tables(torch.tensor([[3], [1]])).sum().backward()
        assert torch.equal(tables.store.slab("a")[3], before[3]) and not torch.equal(
            tables.store.slab("a")[1], before[1]
        )


def test_minus_one_is_an_id_where_there_is_no_vocabulary() -> None:
    tables = build([TableConfig("raw", None, 4), TableConfig("padded", None, 4, padding_idx=0)], "hash", 800)
    result = tables(torch.tensor([[-1, 0]]))[0]
    assert bool((result[:4] != 0).all()) and torch.equal(result[4:], torch.zeros(4))


OUTSIDE = [-1, 10, 2**40, -(2**63), 2**63 - 1]


@pytest.mark.parametrize("id_", OUTSIDE)
def test_an_error_names_feature_table_and_id(id_: int) -> None:
    tables = build([TableConfig("a", 12, 2), TableConfig("b", 10, 2, feature_names=["x", "y"])])
    for arguments in (
        (torch.tensor([[1, 2, 3], [1, 2, id_]]),),
        (torch.tensor([1, 2, id_]), torch.tensor([0, 1, 2, 3])),
    ):
        with pytest.raises(IndexError, match=rf"feature 'y' holds id {id_}, but table 'b' has the ids 0 … 9"):
            tables(*arguments)


@pytest.mark.parametrize("method", ["full", "hash"])
def test_oov_is_one_more_row_that_counts(method: str) -> None:
    config = TableConfig("a", 10, 2, on_out_of_range="oov")
    tables = build([config], method, None if method == "full" else "60%")
    assert tables.plan.full_bytes == 11 * 8 and tables.to_dense("a").shape == (11, 2)
    result = tables(torch.tensor(OUTSIDE).unsqueeze(1))
    assert torch.equal(result, tables.to_dense("a")[10].expand(5, 2))
    assert torch.equal(tables(torch.tensor([[9]])), tables.to_dense("a")[9:10])


def test_hash_folds_into_the_range_always_alike_and_not_onto_one_row() -> None:
    tables = build([TableConfig("a", 10, 2, on_out_of_range="hash")])
    ids = torch.arange(10, 1010).unsqueeze(1)
    result = tables(ids)
    matches = (result.unsqueeze(1) == tables.to_dense("a")).all(-1)
    assert bool((matches.sum(1) == 1).all())
    assert int(matches.sum(0).min()) > 60
    assert torch.equal(result, build([TableConfig("z", 3, 2), TableConfig("a", 10, 2, on_out_of_range="hash")], seed=0)(
        torch.cat([torch.zeros_like(ids), ids], 1))[:, 2:])  # fmt: skip
    assert torch.equal(tables(torch.tensor([[4]])), tables.to_dense("a")[4:5])


def test_three_policies_side_by_side() -> None:
    policies: list[Any] = ["error", "hash", "oov"]
    tables = build([TableConfig(p, 10, 2, on_out_of_range=p) for p in policies])
    assert tables(torch.tensor([[9, 99, 99]])).shape == (1, 6)
    assert torch.equal(tables(torch.tensor([[9, 99, 99]]))[0, 4:], tables.to_dense("oov")[10])
    with pytest.raises(IndexError, match="feature 'error' holds id 99"):
        tables(torch.tensor([[99, 99, 99]]))


# ---- initialization --------------------------------------------------------------------------------------------------


def test_one_standard_deviation_for_all_tables() -> None:
    configs = [TableConfig("large", 30_000, 16), TableConfig("small", 3_000, 16)]
    for tables, expected in (
        (build(configs), (3 * 30_000) ** -0.5),
        (build(configs, std=0.2), 0.2),
    ):
        for name in ("large", "small"):
            assert float(tables.to_dense(name).std()) == pytest.approx(expected, rel=0.02)


def test_init_fn_is_used_as_it_is_for_full_tables_and_by_its_spread_for_others() -> None:
    def init(weight: Tensor) -> Tensor:
        return torch.nn.init.normal_(weight, std=0.3)

    config = TableConfig("a", 20_000, 8, init_fn=init)
    full = build([config])
    # A normal distribution, not the default uniform one: 4.6 % of it lie beyond two deviations.
    share = float((full.to_dense("a").abs() > 0.6).double().mean())
    assert share == pytest.approx(0.0455, abs=0.005)
    hashed = build([config], "hash", "50%")
    assert float(hashed.to_dense("a").std()) == pytest.approx(0.3, rel=0.02)
    assert torch.equal(build([config], std=0.01).to_dense("a"), full.to_dense("a"))


def test_init_fn_may_copy_trained_vectors_and_decides_nothing_for_other_tables() -> None:
    trained = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    configs = [TableConfig("item", 50, 4, init_fn=lambda w: w.copy_(trained)), TableConfig("user", 3000, 4)]
    alone = build([TableConfig("user", 3000, 4)]).to_dense("user")
    for std in (None, 0.5):
        assert torch.equal(build(configs, std=std).to_dense("item"), trained)
    assert torch.equal(build(configs).to_dense("user"), alone)
    assert torch.equal(build(configs, "matryoshka", "60%").to_dense("item")[:, :1], trained[:, :1])  # trained in full
    with_oov = TableConfig("item", 50, 4, on_out_of_range="oov", init_fn=lambda w: w.copy_(trained))
    assert torch.equal(build([with_oov]).to_dense("item")[:50], trained)


@pytest.mark.parametrize("method", ["hash", "multi_hash", "compositional", "mixed_dimension"])
def test_compressed_tables_take_the_spread_of_their_own_init_fn(method: str) -> None:
    seen: list[tuple[int, ...]] = []

    def wide(weight: Tensor) -> None:
        seen.append(tuple(weight.shape))
        torch.nn.init.uniform_(weight, -3, 3)

    configs = [TableConfig("a", 20_000, 8, init_fn=wide), TableConfig("b", 20_000, 8)]
    counts = {name: np.arange(20_000, 0, -1) for name in "ab"}
    tables = EmbeddingTables(plan(configs, method, "30%", frequencies=counts))
    assert set(seen) == {(20_000, 8)}
    # That of U(-3, 3) is √3; the default is 1/√(3·n).
    assert float(tables.to_dense("a").square().mean().sqrt()) == pytest.approx(3**0.5, rel=0.05)
    assert float(tables.to_dense("b").square().mean().sqrt()) == pytest.approx(60_000**-0.5, rel=0.05)


def test_what_tables_share_takes_the_root_mean_square_of_their_spreads() -> None:
    configs = [TableConfig("a", 20_000, 8, init_fn=lambda w: w.fill_(0.3)), TableConfig("b", 20_000, 8)]
    tables = EmbeddingTables(plan(configs, "unified", "30%"), std=0.4)
    for name in "ab":
        assert float(tables.to_dense(name).std()) == pytest.approx(((0.3**2 + 0.4**2) / 2) ** 0.5, rel=0.05)


def test_an_init_fn_that_fails_is_named() -> None:
    def copy(weight: Tensor) -> None:
        weight.copy_(torch.zeros(7, 4))

    with pytest.raises(ValueError, match=r"table 'item': its init_fn failed on a tensor \[50, 4\] with: The size"):
        build([TableConfig("item", 50, 4, init_fn=copy)])
    with pytest.raises(ValueError, match=r"a tensor \[4194304, 4\], a part of the table, which is compressed, with"):
        build([TableConfig("item", 5_000_000, 4, init_fn=copy)], "hash", "1%")


def test_tables_are_built_of_a_plan() -> None:
    with pytest.raises(TypeError, match=r"EmbeddingTables takes a plan, not a list: EmbeddingTables\(embtables.plan"):
        EmbeddingTables([TableConfig("a", 9, 4)])  # type: ignore[arg-type]


def test_the_seed_alone_decides_the_weights() -> None:
    configs = [TableConfig("a", 50, 4, init_fn=torch.nn.init.normal_), TableConfig("b", 50, 4)]
    torch.manual_seed(1)
    first = build(configs, seed=7)
    after = torch.rand(3)
    torch.manual_seed(2)
    second = build(configs, seed=7)
    for name in "ab":
        assert torch.equal(first.to_dense(name), second.to_dense(name))
        assert not torch.equal(first.to_dense(name), build(configs, seed=8).to_dense(name))
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
    for bad in (0.0, -1.0, float("nan"), float("inf"), 1e39):
        with pytest.raises(ValueError, match="std must be a positive number"):
            build(configs, std=bad)


# ---- devices, copies, files ------------------------------------------------------------------------------------------

BUDGETS = [("full", None), ("hash", "30%"), ("multi_hash", "30%"), ("unified", "30%"), ("mixed_dimension", "50%")]
BUDGETS += [("compositional", "30%"), ("pruned", "30%"), ("robe", "30%"), ("drop_feature", "30%")]
BUDGETS = [(kind, budget) for kind, budget in BUDGETS if kind in kinds()]


@pytest.mark.parametrize("optimizer", [None, "adagrad"])
@pytest.mark.parametrize("method", kinds())
def test_the_device_may_come_from_the_context(method: str, optimizer: str | None) -> None:
    """Where it is the meta device, no constant of the plan can be read back from a tensor."""
    configs = [TableConfig("a", 300, 8, on_out_of_range="hash"), TableConfig("b", 200, 8)]
    counts = {table.name: np.arange(table.num_embeddings or 0, 0, -1) for table in configs}
    solved = plan(configs, method, None if method == "full" else "60%", counts, optimizer)
    with torch.device("meta"):
        tables = EmbeddingTables(solved, seed=5)
    assert all(tensor.device.type == "meta" for _, tensor, _ in tables.store.tensors())
    tables.to_empty(device="cpu")
    tables.reset_parameters()
    here = EmbeddingTables(solved, seed=5)
    ids = torch.tensor([[299, 3], [0, 199]])
    assert torch.equal(tables(ids), here(ids))


@pytest.mark.parametrize(("method", "budget"), BUDGETS)
def test_meta_device_allocates_nothing_until_reset(method: str, budget: str | None) -> None:
    configs = [TableConfig("a", 200, 8), TableConfig("b", 100, 8, padding_idx=1)]
    here = build(configs, method, budget, optimizer="adagrad", seed=5)
    meta = EmbeddingTables(here.plan, seed=5, device="meta")
    assert all(t.device.type == "meta" for _, t, _ in meta.store.tensors())
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match="on the meta device, .* call to_empty"):
            meta(torch.zeros(1, 2, dtype=torch.int64, device=device))
    assert counted_bytes(meta) == counted_bytes(here)
    meta.to_empty(device="cpu")
    meta.reset_parameters()
    ids = random_ids(here, 16)
    for tables in (meta, here):
        assert torch.equal(tables(ids), here(ids))
        if tables(ids).requires_grad:
            tables(ids).square().sum().backward()
    assert torch.equal(meta(ids), here(ids))


def test_a_huge_table_can_be_planned_and_built_on_meta() -> None:
    tables = build([TableConfig("a", 10**9, 64)], device="meta")
    assert tables.memory().inference_bytes == 4 * 64 * 10**9
    # Row offsets count elements in 64 bits.
    assert tables.store.slab("a").numel() == 64 * 10**9


@pytest.mark.parametrize(("method", "budget"), BUDGETS)
def test_copies_and_moves_keep_every_vector(method: str, budget: str | None) -> None:
    tables = build([TableConfig("a", 200, 8), TableConfig("b", 100, 4)], method, budget, optimizer="adagrad")
    ids = random_ids(tables, 16)
    before = tables(ids).detach()
    assert torch.equal(copy.deepcopy(tables)(ids), before)
    assert torch.equal(tables.to("cpu").to(torch.device("cpu"))(ids), before)
    assert torch.equal(torch.nn.Sequential(tables)(ids), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("method", "budget"), BUDGETS)
def test_a_saved_file_keeps_the_precision_of_the_tables(
    tmp_path: Path, method: str, budget: str | None, dtype: torch.dtype
) -> None:
    tables = build([TableConfig("a", 200, 8, padding_idx=0), TableConfig("b", 100, 4)], method, budget).to(dtype)
    ids, path = random_ids(tables, 64), tmp_path / "tables.safetensors"
    tables.save(path)
    loaded, vectors = EmbeddingTables.load(path), tables.eval().serve()(ids)
    assert loaded(ids).dtype == vectors.dtype == dtype and torch.equal(loaded(ids), vectors)
    assert loaded.memory().inference_bytes == sum(t.nbytes for t in loaded.store.stored().values())
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert path.stat().st_size == 8 + length + loaded.memory().inference_bytes


@pytest.mark.parametrize(("method", "budget"), BUDGETS)
def test_a_saved_file_holds_the_inference_bytes_and_loads_to_the_same_vectors(
    tmp_path: Path, method: str, budget: str | None
) -> None:
    configs = [TableConfig("a", 200, 8, padding_idx=0), TableConfig("b", 100, 4, pooling="mean", on_out_of_range="oov")]
    tables = build(configs, method, budget, optimizer="adagrad")
    for i in range(3):
        loss = tables(random_ids(tables, 32, seed=i)).square().sum()
        if loss.requires_grad:
            loss.backward()
    path = tmp_path / "tables.safetensors"
    tables.save(path)
    assert os.listdir(tmp_path) == ["tables.safetensors"]
    # Read the format by hand: eight bytes of length, JSON, tensors. There is no pickle in it.
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert len(raw) - 8 - length == tables.plan.inference_bytes
    assert Plan.from_dict(json.loads(header["__metadata__"]["embtables"])) == tables.plan
    loaded = EmbeddingTables.load(path)
    ids = random_ids(tables, 64)
    served = tables.serve()
    assert torch.equal(loaded(ids), served(ids))
    assert torch.equal(loaded.to_dense("a"), served.to_dense("a"))
    assert list(loaded.parameters()) == [] and not loaded(ids).requires_grad and not loaded.training
    assert counted_bytes(loaded) == loaded.memory().inference_bytes == tables.plan.inference_bytes
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == raw
    with pytest.raises(ValueError, match="no fused optimizer"):
        loaded.set_learning_rate(0.1)
    tables.finalize()
    assert torch.equal(tables(ids), loaded(ids))


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    build([TableConfig("a", 200, 8)], "hash", "50%").save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", bytes(range(256)) * 8, whole[:8] + b"{}" + whole[10:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="t.safetensors"):
            EmbeddingTables.load(path)
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="t.safetensors.*holds no plan"):
        EmbeddingTables.load(path)
    save_file({"w": torch.zeros(3)}, path, metadata={"embtables": json.dumps({"format_version": 1})})
    with pytest.raises(ValueError, match="t.safetensors"):
        EmbeddingTables.load(path)
    # Twice the rows of the plan.
    fewer = plan([TableConfig("a", 200, 8)], "hash", "25%", optimizer=None)
    save_file({"weight_8": torch.zeros(100, 8)}, path, metadata={"embtables": json.dumps(fewer.to_dict())})
    with pytest.raises(ValueError, match="t.safetensors.*weight_8"):
        EmbeddingTables.load(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        EmbeddingTables.load(tmp_path / "missing")


FULL_DISK = """
import resource, signal, sys
from embtables import EmbeddingTables, TableConfig, plan
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tables = EmbeddingTables(plan([TableConfig("a", 20_000, 16)], "full"))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    tables.save(sys.argv[1])
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are POSIX")
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_text("old")
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], cwd=root, capture_output=True, text=True, check=True
    )
    assert f"File too large: '{path}'" in result.stdout
    assert os.listdir(tmp_path) == ["t.safetensors"] and path.read_text() == "old"
    with pytest.raises(OSError, match=r"No such file or directory: '.*no such folder/t\.safetensors'"):
        build([TableConfig("a", 20, 4)]).save(tmp_path / "no such folder" / "t.safetensors")


# ---- torch.optim -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
@pytest.mark.parametrize("method", ["full", "hash", "multi_hash"])
def test_sparse_gradients_work_with_the_optimizers_that_take_them(name: str, method: str) -> None:
    configs = [TableConfig("a", 300, 8, padding_idx=2), TableConfig("b", 100, 8)]
    results = []
    for sparse in (True, False):
        tables = build(configs, method, None if method == "full" else "30%", sparse=sparse)
        # SparseAdam leaves untouched rows alone, which dense Adam does not; SGD and Adagrad do so either way.
        make = getattr(torch.optim, name if sparse else name.replace("SparseAdam", "Adam"))
        optimizer = make(tables.parameters(), lr=0.1)
        for i in range(1 if name == "SparseAdam" else 5):
            ids = random_ids(tables, 32, seed=i)
            optimizer.zero_grad()
            (tables(ids) - 1).square().sum().backward()
            for p in tables.parameters():
                assert p.grad is not None and p.grad.is_sparse == sparse
            optimizer.step()
        results.append(torch.cat([tables.to_dense("a"), tables.to_dense("b")]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_rows_of_the_dense_table() -> None:
    tables = build([TableConfig("a", 100, 4), TableConfig("raw", None, 4)], {"raw": "hash", "a": "full"}, 2000)
    whole = tables.to_dense("a")
    assert torch.equal(tables.to_dense("a", slice(10, 20)), whole[10:20])
    assert torch.equal(tables.to_dense("a", slice(None, None, 7)), whole[::7])
    assert tables.to_dense("a", slice(5, 5)).shape == (0, 4) and not whole.requires_grad
    with pytest.raises(ValueError, match="no table 'b'; the tables: a, raw"):
        tables.to_dense("b")
    with pytest.raises(ValueError, match="table 'raw' has no num_embeddings"):
        tables.to_dense("raw")


def test_share_of_colliding_ids() -> None:
    assert build([TableConfig("a", 1000, 4)]).collision_share("a") == 0.0
    # Of n ids hashed to m rows a share of 1 − (1 − 1/m)^(n−1) has company.
    for n, m in ((20_000, 10_000), (20_000, 2_000)):
        tables = build([TableConfig("a", n, 4)], {"kind": "hash", "addressing": "random"}, 16 * m)
        assert tables.collision_share("a") == pytest.approx(1 - (1 - 1 / m) ** (n - 1), abs=0.01)
    # In balanced rows the m ids of one turn are apart, and each of the 5,000 beyond meets one of them.
    assert build([TableConfig("a", 20_000, 4)], "hash", 16 * 15_000).collision_share("a") == 0.5
    twice = build([TableConfig("a", 20_000, 4)], "multi_hash", 16 * 10_000)
    assert twice.collision_share("a") < 0.01


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 4),), TypeError, "ids must be int32 or int64, not torch.float32"),
        ((torch.ones(2, 4, dtype=torch.bool),), TypeError, "not torch.bool"),
        (([[1, 2, 3, 4]],), TypeError, "ids must be a tensor, not a list"),
        ((torch.tensor([1]), [0, 1, 1, 1, 1]), TypeError, "offsets must be a tensor, not a list"),
        ((torch.tensor([[1, 2, 3, 4]]), None, [[1, 1, 1, 1]]), TypeError, "per_sample_weights must be a tensor, not a"),
        ((torch.ones(2, 3, dtype=torch.int64),), ValueError, r"ids must be \[batch, 4\].*user, item, history, city"),
        ((torch.ones(4, dtype=torch.int64),), ValueError, "flat with offsets"),
        ((torch.ones(2, 4, dtype=torch.int64), torch.tensor([0, 8])), ValueError, "ids must be flat"),
        ((torch.tensor([1]), torch.tensor([0.0, 1, 1, 1, 1])), TypeError, "offsets must be int32 or int64"),
        ((torch.tensor([1]), torch.tensor([0, 1, 1, 1])), ValueError, r"offsets.*4·batch \+ 1"),
        ((torch.tensor([1]), torch.tensor([], dtype=torch.int64)), ValueError, r"offsets.*4·batch \+ 1"),
        ((torch.tensor([1]), torch.tensor([[0, 1, 1, 1, 1]])), ValueError, "offsets must be 1-D"),
        ((torch.tensor([1]), torch.tensor([1, 1, 1, 1, 1])), ValueError, "run from 1 to 1"),
        ((torch.tensor([1]), torch.tensor([0, 1, 1, 1, 2])), ValueError, "number of ids, 1; they run from 0 to 2"),
        ((torch.tensor([1, 1]), torch.tensor([0, 2, 1, 2, 2])), ValueError, "fall in between"),
        ((torch.tensor([1]), torch.tensor([0, 1, 1, 1, 1]), torch.ones(2)), ValueError, "per_sample_weights"),
    ],
)  # fmt: skip
def test_bad_ids_offsets_and_weights(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(MIXED)(*arguments)


def test_bad_pooling() -> None:
    ids = torch.ones(1, 2, dtype=torch.int64)
    tables = build([TableConfig("a", 10, 2), TableConfig("b", 10, 3)])
    for pooling, message in (
        ("max", "must be 'sum', 'mean' or None, not 'max'"),
        (3, "not 3"),
        ({"c": "sum"}, "feature 'c', which no table has"),
        ({"a": "max"}, "not 'max'"),
        (None, "one embedding_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            tables(ids, pooling=pooling)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no feature in two tables"):
        build([TableConfig("a", 10, 2, ["x"]), TableConfig("b", 10, 2, ["x"])])(ids[:, :1], pooling=None)


@pytest.mark.parametrize("padding_idx", [0, 3])
def test_an_id_out_of_range_is_not_folded_onto_the_padding(padding_idx: int) -> None:
    table = TableConfig("user", 4, 8, on_out_of_range="hash", padding_idx=padding_idx)
    module = EmbeddingTables(plan([table], "full"))
    vectors = module(torch.arange(4, 1004).unsqueeze(1))
    assert (vectors.abs().sum(1) > 0).all()
    assert (module(torch.tensor([[padding_idx]])) == 0).all()
