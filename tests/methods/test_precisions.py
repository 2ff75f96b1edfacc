"""Every method in every precision: vectors against loops over stored bits, bytes, files, and what rounding changes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import (
    all_methods,
    counted_bytes,
    falling_counts,
    in_turn,
    method_id,
    projects,
    random_ids,
    shares_scalars,
    shuffled_counts,
)
from packed_rows import kind_of, slab_of
from scalar import vector

from embtables import EmbeddingTables, InfeasibleBudget, Plan, TableConfig, ops, plan
from embtables.faces.embedding import Embedding
from embtables.formats import FORMATS, PackedFormat, row_format
from embtables.methods import Method

CONFIGS = [
    TableConfig("user", 300, 16, padding_idx=0),
    TableConfig("item", 200, 10, feature_names=["item", "history"], pooling="mean", on_out_of_range="oov"),
    TableConfig("city", 12, 10, feature_names=["city", "item"]),
    TableConfig("slot", 90, 6, on_out_of_range="hash", padding_idx=5),
]
COUNTS = {
    "user": falling_counts(300),
    "item": shuffled_counts(200),
    "city": falling_counts(12),
    "slot": shuffled_counts(90),
}
PRECISIONS = [name for name in FORMATS if name != "fp32"] + ["int4/slab", "int2/7"]
METHOD = next(m for m in all_methods() if m.kind == "hash")


def some_precisions(*without: str, of: Sequence[str] = PRECISIONS) -> pytest.MarkDecorator:
    """Three precisions for every method."""
    methods = [m for m in all_methods() if m.kind not in ("drop_feature", *without)]
    each = [pytest.param(m, p, id=f"{method_id(m)}-{p}") for m, p in in_turn(methods, of, 3)]
    return pytest.mark.parametrize(("method", "precision"), each)


def make(method: Method, precision: str, budget: Any = "12%") -> EmbeddingTables:
    optimizer = "adagrad" if shares_scalars(method) else "default"
    budget = None if method.kind == "full" else budget
    try:
        solved = plan(CONFIGS, method, budget, COUNTS, optimizer, precision=precision)
    except (InfeasibleBudget, ValueError) as error:
        if not isinstance(error, InfeasibleBudget):
            pytest.skip(str(error))
        solved = plan(CONFIGS, method, error.floor_bytes, COUNTS, optimizer, precision=precision)
    return EmbeddingTables(solved, std=0.3)


@some_precisions()
def test_served_tables_take_the_bytes_of_the_plan(method: Method, precision: str) -> None:
    tables = make(method, precision)
    served = tables.serve()
    assert served is not tables and not list(served.parameters())
    assert counted_bytes(served) == served.memory().inference_bytes == tables.plan.inference_bytes
    assert served.memory().by_kind == tables.plan.bytes_by_kind()


@some_precisions("pruned")
def test_served_vectors_equal_a_scalar_computation(method: Method, precision: str) -> None:
    served = make(method, precision).serve()
    slabs: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    for config in CONFIGS:
        dense = served.to_dense(config.name)
        ids = {0, 1, (config.rows or 0) - 1, *torch.randint(config.rows or 0, (12,), generator=generator).tolist()}
        own = COUNTS[config.name].tolist() + [0] * (config.on_out_of_range == "oov")
        for x in ids - {config.padding_idx}:
            expected = vector(served, config.name, x, own, slabs)
            np.testing.assert_allclose(dense[x], expected, rtol=1e-5, atol=1e-6, err_msg=f"{config.name} {x}")


EXACT_TO_HALF_A_STEP = ["fp16", "bf16", "int8", "int4", "int4/slab"]


@some_precisions(of=EXACT_TO_HALF_A_STEP)
def test_rows_move_by_at_most_half_a_step(method: Method, precision: str) -> None:
    tables = make(method, precision)
    served = tables.serve()
    slabs = [slab for g in tables.plan.groups for slab in g.layout.serving.slabs]
    if method.kind == "banded":
        # Bands of fewer bits have fewer levels than their scalars need.
        slabs = [slab for slab in slabs if slab.format in EXACT_TO_HALF_A_STEP]
    for slab in slabs:
        precision = slab.format
        trained, stored = slab_of(tables, slab.name), slab_of(served, slab.name)
        fold = slab.name.replace("/rows", "/fold")
        if fold in tables.store.extra_shapes():
            trained = trained @ tables.store.extra(fold).detach()
        trained = trained[:, : slab.width]
        if precision in ("fp16", "bf16"):
            bits = 11 if precision == "fp16" else 8
            assert torch.all((trained - stored).abs() <= trained.abs() * 2.0**-bits + 2.0**-25)
        else:
            most = trained.abs().max() if "slab" in precision else None
            levels = 2 ** (kind_of(precision)[1] - 1) - 1
            if most is None:
                share = row_format(precision).rows_per_scale(slab.width) or 1
                blocks = [part.abs().max().expand(len(part)) for part in trained.split(share)]
                most = torch.cat(blocks).unsqueeze(1)
            # A scale is at most one part in 128 larger than it need be.
            assert torch.all((trained - stored).abs() <= most / levels / 2 * (1 + 2.0**-7) + 1e-9)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pruned_values_are_the_largest_in_the_format(precision: str) -> None:
    for budget in ("40%", "15%", "4%"):
        tables = make(next(m for m in all_methods() if m.kind == "pruned"), precision, budget)
        dense = {t.name: tables.to_dense(t.name).detach() for t in CONFIGS}
        exact = EmbeddingTables(tables.plan, std=0.3).serve()
        assert counted_bytes(exact) == exact.memory().inference_bytes == tables.plan.inference_bytes
        for config in CONFIGS:
            served = exact.to_dense(config.name)
            kept = served != 0
            if precision in ("fp16", "bf16"):
                torch.testing.assert_close(served[kept], dense[config.name][kept], rtol=2.0**-8, atol=1e-7)
            elif precision in ("int8", "int4"):
                assert (served - dense[config.name])[kept].abs().max() <= 0.55 * 0.3 * 3**0.5 / (
                    7 if "4" in precision else 127
                )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lookups_of_served_tables_agree_in_every_way(precision: str) -> None:
    """Pooled and not, natively and in PyTorch, beside tables in fp32, and cast to half precision."""
    methods = {"user": {"kind": "hash", "precision": precision}, "item": "mixed_dimension", "*": "full"}
    solved = plan(CONFIGS, methods, "50%", COUNTS, precision=precision)
    assert {g.method.precision for g in solved.groups} == {precision}
    mixed = plan(CONFIGS, {"user": {"kind": "hash", "precision": precision}, "*": "full"}, "80%", COUNTS)
    assert [g.method.precision for g in mixed.groups] == [precision, None]
    for each in (solved, mixed):
        served = EmbeddingTables(each, std=0.3).finalize().eval()
        ids = random_ids(served, 40)
        found = {}
        for backend in ("native", "reference") if ops.instructions() else ("reference",):
            with ops.using(backend):
                found[backend] = served(ids)
        assert all(torch.equal(vectors, served(ids)) for vectors in found.values())
        kept = {name: tensor.dtype for name, tensor in served.store.stored().items()}
        halved = served.half()
        assert all(halved.store.tensor(name).dtype == kept[name] for name in halved.store.in_other_formats())
        assert halved(ids).dtype == torch.float16
        torch.testing.assert_close(halved(ids).float(), found["reference"], rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(ops.instructions() is None, reason="needs the native library: pip install -e . with a C++ compiler")
@some_precisions()
def test_native_lookups_are_those_of_pytorch(method: Method, precision: str) -> None:
    """Single ids and weighted bags, which native code takes whatever the rows are stored in."""
    served = make(method, precision).finalize().eval()
    assert served.lookups.ops == "native"
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 7, (len(served.feature_names) * 9,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(12, (int(offsets[-1]),), generator=generator)
    weights = torch.rand(len(ids), generator=generator)
    for given in ((random_ids(served, 40),), (ids, offsets), (ids, offsets, weights)):
        found = []
        for backend in ("native", "reference"):
            with ops.using(backend):
                found.append(served(*given))
        if not projects(method) and len(given) == 1:
            assert torch.equal(*found)
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


READER = """
import sys
import torch
from embtables import EmbeddingTables
for name in sys.argv[1:]:
    tables = EmbeddingTables.load(name)
    assert torch.equal(tables(torch.load(name + ".ids")), torch.load(name + ".vectors")), name
print("read", len(sys.argv) - 1)
"""


def test_files_are_read_back_bit_for_bit_by_another_process(tmp_path: Path) -> None:
    files = []
    for number, (method, precision) in enumerate(in_turn(all_methods(), PRECISIONS, 3)):
        tables = make(method, precision)
        file = str(tmp_path / f"{number}.safetensors")
        ids = random_ids(tables, 20)
        tables.save(file)
        torch.save(ids, f"{file}.ids")
        torch.save(tables.serve()(ids), f"{file}.vectors")
        files.append(file)
    done = subprocess.run([sys.executable, "-c", READER, *files], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"read {len(files)}\n", done.stderr


def test_training_is_that_of_fp32_and_never_stores_anything_else() -> None:
    plans = [plan(CONFIGS, {"kind": "hash", "precision": p}, 4000, COUNTS) for p in ("int8", "fp16")]
    assert all(slab.format == "fp32" for p in plans for g in p.groups for slab in g.layout.training.slabs)
    slabs = [slab for g in plans[0].groups for slab in g.layout.training.slabs]
    assert plans[0].training_bytes == sum(4 * slab.rows * (slab.width + 1) for slab in slabs)
    tables = EmbeddingTables(plans[0], std=0.3)
    before = tables.serve().to_dense("user")
    for seed in range(3):
        tables(random_ids(tables, 64, seed=seed)).square().sum().backward()
    assert {tensor.dtype for tensor in tables.store.stored().values()} == {torch.float32}
    assert not torch.equal(tables.serve().to_dense("user"), before)


def test_packed_formats_are_all_there() -> None:
    assert {"int8", "int4", "int2", "binary", "binary2", "binary4"} == {
        name for name, each in FORMATS.items() if isinstance(each, PackedFormat)
    }


def test_a_pruned_plan_whose_values_are_others_is_damaged() -> None:
    solved = plan(CONFIGS, {"kind": "pruned", "precision": "int4"}, "8%", COUNTS)
    for precision in ("int8", "int4/slab", "binary4", "fp16"):
        data = json.loads(json.dumps(solved.to_dict()))
        data["groups"][0]["method"]["precision"] = precision
        with pytest.raises(
            ValueError,
            match=f"entries in {precision}, but '.*/(values|scales)' is of another shape or type: the plan is d",
        ):
            EmbeddingTables(Plan.from_dict(data)).finalize()


@pytest.mark.parametrize("precision", [["int8"], {"kind": "int8"}, 8, True, "", "int9"])
def test_what_is_no_precision_is_refused(precision: Any) -> None:
    with pytest.raises(ValueError, match="unknown precision .*; there are: fp32, fp16"):
        plan(CONFIGS, "hash", "10%", precision=precision)


def test_packed_tables_behind_the_face_of_embedding() -> None:
    module = Embedding(50, 16, padding_idx=3, method={"kind": "full", "precision": "int8"})
    vectors = module(torch.arange(50))
    module.tables.finalize()
    assert (module(torch.arange(50)) - vectors).abs().max() < 0.01
    again = Embedding(50, 16, padding_idx=3, method={"kind": "full", "precision": "int8"})
    again.tables.finalize()
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(torch.arange(50)), module(torch.arange(50)))
    with pytest.raises(RuntimeError, match="'embedding' is not stored in full and in fp32, so it cannot take a weight"):
        module.load_state_dict({"weight": torch.zeros(50, 16)})


def test_served_tables_are_of_the_type_that_was_assigned() -> None:
    tables, half = make(METHOD, "int8"), make(METHOD, "int8").half()
    tables.load_state_dict(half.state_dict(), assign=True)
    ids = random_ids(tables, 9)
    assert tables(ids).dtype == tables.serve()(ids).dtype == torch.float16


@pytest.mark.parametrize("name", ["weight_int8_per_64_16", "scales_int8_per_64_16"])
def test_native_code_reads_nothing_behind_what_was_put_in_the_place_of_weights_or_scales(name: str) -> None:
    served = make(METHOD, "int8/64").finalize().eval()
    assert served.lookups.ops == "native" or ops.instructions() is None
    served.store._buffers[name] = served.store.tensor(name)[:1]
    assert served.lookups.ops == "reference"
    with pytest.raises(IndexError):
        served(random_ids(served, 40))
