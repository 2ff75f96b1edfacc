"""Tables whose rows are trained in bf16: their bytes, what lookups and updates make of them, and what is served."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from core_cases import TRAINED_PROJECTIONS, method_id, random_ids, shuffled_counts, trained_methods
from native_cases import BACKENDS, NATIVE
from torch import Tensor, nn

from embtables import SGD, Adam, EmbeddingTables, Plan, RowWiseAdagrad, TableConfig, compress_, ops, plan
from embtables.faces.embedding import Embedding
from embtables.formats import FORMATS
from embtables.lookup.store import Store
from embtables.methods import Method, from_config
from embtables.optimizers import FusedOptimizer, averaged
from embtables.sizes.layout import Form, Slab

TABLES = [TableConfig("user", 300, 8), TableConfig("item", 90, 8, feature_names=["item", "last"], padding_idx=3)]


def solved(method: Any = "full", optimizer: Any = "adagrad", **others: Any) -> Plan:
    counts = {table.name: shuffled_counts(table.num_embeddings or 0) for table in TABLES}
    budget = None if from_config(method).kind == "full" else "40%"
    return plan(TABLES, method, budget, counts, optimizer, **{"training_precision": "bf16", **others})


def train(tables: EmbeddingTables, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        vectors = tables(random_ids(tables, 64, seed + step))
        assert vectors.dtype == torch.float32
        vectors.backward(torch.randint(-3, 4, vectors.shape, generator=generator).float())


def everything(tables: EmbeddingTables) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tables.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# ---- bytes and what is refused ---------------------------------------------------------------------------------------


@pytest.mark.core
def test_rows_take_half_and_state_stays() -> None:
    wide = [TableConfig("t", 1000, 16)]
    by_hand = {"fp32": 1000 * (4 * 16 + 4), "bf16": 1000 * (2 * 16 + 4) + 8}  # and the number of the step
    for name, expected in by_hand.items():
        found = plan(wide, "full", optimizer=RowWiseAdagrad(), training_precision=name)
        tables = EmbeddingTables(found)
        stored = sum(t.nbytes for t in (*tables.store.buffers(), *tables.parameters()))
        assert found.training_bytes == expected == tables.memory().training_bytes
        assert stored - tables.store.tensor("_hyper").nbytes == expected
        assert found.inference_bytes == 4 * 16 * 1000 and found.full_bytes == found.inference_bytes
    assert "rows in bf16" in str(plan(wide, "full", training_precision="bf16"))
    served = plan(wide, "full", precision="bf16", training_precision="bf16")
    assert EmbeddingTables(served).memory().inference_bytes == served.inference_bytes == 2 * 16 * 1000


def test_a_training_budget_holds_more_rows() -> None:
    wide = [TableConfig("t", 100_000, 16)]
    bound = 2_000_000
    rows = {
        name: plan(wide, "hash", "100%", training_budget=bound, training_precision=name).inference_bytes // 64
        for name in ("fp32", "bf16")
    }
    assert rows == {"fp32": bound // 68, "bf16": (bound - 8) // 36}


def test_a_plan_says_it_in_the_formats_of_its_slabs() -> None:
    plain, half = solved(training_precision="fp32"), solved()
    data = half.to_dict()
    assert [slab["format"] for slab in data["groups"][0]["layout"]["training"]["slabs"]] == ["bf16", "bf16"]
    assert Plan.from_dict(data) == half and Plan.from_dict(data).training_bytes == half.training_bytes
    assert half.training_fingerprint != plain.training_fingerprint
    assert "format" not in plain.to_dict()["groups"][0]["layout"]["training"]["slabs"][0]
    assert plain == plan(TABLES, "full", None, None, "adagrad")


@pytest.mark.parametrize("name", ["int8", "fp16", "bf17", "", None, 16])
def test_other_formats_are_not_trained(name: object) -> None:
    with pytest.raises(ValueError, match="training_precision must be fp32 or bf16, not "):
        solved(training_precision=name)


def test_only_fused_updates_round() -> None:
    with pytest.raises(ValueError, match=r"needs a fused optimizer.*stochastic rounding happens in fused updates"):
        solved(optimizer=None)
    with pytest.raises(ValueError, match=r"slab 'a' would be trained in bf16 by torch\.optim"):
        Store([Form((Slab("a", 3, 4, "bf16"),))], None)
    with pytest.raises(ValueError, match="slab 'a' would be trained in int8: training stores fp32 or bf16"):
        Store([Form((Slab("a", 3, 4, "int8"),))], SGD())
    with pytest.raises(ValueError, match="needs a fused optimizer"):
        compress_(nn.Sequential(nn.Embedding(9, 4)), "full", training_precision="bf16")


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_below_half_a_step_are_learned(backend: str) -> None:
    """Weights of 1 lose 2**-12 each time, a sixteenth of the step of bf16 below 1."""
    steps, rows, rate = 256, 64, 2.0**-12
    config = [TableConfig("t", rows, 16)]
    tables = EmbeddingTables(plan(config, "full", optimizer=SGD(lr=rate), training_precision="bf16"))
    nearest = EmbeddingTables(plan(config, "full", optimizer=SGD(lr=rate))).bfloat16()
    ids = torch.arange(rows).view(rows, 1)
    with ops.using(backend):
        for each in (tables, nearest):
            each.store.slab("t").fill_(1.0)
            for _ in range(steps):
                each(ids).sum().backward()
    assert (nearest.store.slab("t") == 1).all()
    # The variance of one rounding is at most a quarter of a step squared, the step being 2**-8.
    error = math.sqrt(steps * (2.0**-16 / 4) / (16 * rows))
    found = tables.store.slab("t").double()
    assert abs(float(found.mean()) - (1 - steps * rate)) < 4 * error < 0.1 * steps * rate
    assert len(found.unique()) > 4


@pytest.mark.parametrize("method", trained_methods(), ids=method_id)
def test_every_method_trains_and_serves(method: Method) -> None:
    """What is looked up are the stored rows, widened; and so is what is served in fp32."""
    tables = EmbeddingTables(solved(method), std=0.5)
    start = {name: slab.clone() for name, slab in tables.store.named_slabs()}
    assert all(slab.dtype == torch.bfloat16 for slab in start.values())
    train(tables, 3)
    assert any(not torch.equal(slab, start[name]) for name, slab in tables.store.named_slabs())
    twin = EmbeddingTables(solved(method, training_precision="fp32"), std=0.5)
    for name, slab in tables.store.named_slabs():
        twin.store.slab(name).copy_(slab)
    for name, tensor, is_code in tables.store.tensors():
        if is_code or name not in tables.store.weight_names:
            twin.store.tensor(tables.store.key(name)).data.copy_(tensor)
    ids = random_ids(tables, 64, seed=9)
    assert torch.equal(tables.eval()(ids), twin.eval()(ids))
    served = tables.serve()
    assert torch.equal(served(ids), twin.serve()(ids))
    assert served.memory().inference_bytes == tables.plan.inference_bytes


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("kind", ["hash", "robe", "pruned"])
def test_served_in_every_precision(kind: str, precision: str) -> None:
    tables = EmbeddingTables(solved(kind, precision=precision), std=0.5)
    train(tables, 2)
    twin = EmbeddingTables(solved(kind, precision=precision, training_precision="fp32"))
    for name, slab in tables.store.named_slabs():
        twin.store.slab(name).copy_(slab)
    served, expected = tables.serve(), twin.serve()
    assert_equal(served.store.stored(), expected.store.stored())
    assert (served is tables) == (kind != "pruned" and precision == "bf16")
    if kind == "hash" and precision in ("fp32", "bf16"):
        for name, slab in tables.store.named_slabs():
            assert torch.equal(served.store.read_slab(name), slab.float())


OPTIMIZERS: list[FusedOptimizer] = [SGD(lr=0.01), RowWiseAdagrad(), Adam(), averaged(SGD(lr=0.01), horizon=3)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.kind)
def test_a_resumed_training_rounds_on_as_it_would_have(optimizer: FusedOptimizer) -> None:
    through = EmbeddingTables(solved("hash", optimizer))
    train(through, 3)
    file = io.BytesIO()
    torch.save(through.state_dict(), file)
    file.seek(0)
    resumed = EmbeddingTables(solved("hash", optimizer), seed=7)
    resumed.load_state_dict(torch.load(file))
    forgetful = copy.deepcopy(resumed)
    forgetful.store.tensor("_step").zero_()
    for tables in (through, resumed, forgetful):
        train(tables, 3, seed=3)
    assert_equal(everything(through), everything(resumed))
    assert not torch.equal(everything(through)["store.weight_bf16_8"], everything(forgetful)["store.weight_bf16_8"])


@NATIVE
@pytest.mark.parametrize("kind", ["full", "robe", "compositional"])
def test_threads_leave_the_same_bits(kind: str) -> None:
    """Of as many rows that both of two threads have some."""
    wide = [TableConfig("t", 40_000, 16)]
    both, before = [], torch.get_num_threads()
    for threads in (1, 2):
        found = plan(wide, kind, None if kind == "full" else "30%", optimizer=SGD(lr=0.1), training_precision="bf16")
        tables = EmbeddingTables(found)
        torch.set_num_threads(threads)
        try:
            for seed in range(2):
                vectors = tables(random_ids(tables, 20_000, seed))
                vectors.backward(torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed)))
        finally:
            torch.set_num_threads(before)
        both.append(everything(tables))
    assert_equal(*both)


@NATIVE
@pytest.mark.parametrize("kind", ["hash", "compositional", "mixed_dimension", TRAINED_PROJECTIONS, "robe"], ids=str)
def test_native_steps_leave_the_bits_of_pytorch(kind: Any) -> None:
    """With gradients of integers: products and projections read rows natively in backward."""
    both = []
    for backend in ("native", "reference"):
        tables = EmbeddingTables(solved(kind, SGD(lr=2.0**-4)), std=0.5)
        with ops.using(backend):
            train(tables, 1)
        both.append(dict(tables.store.named_slabs()))
    assert_equal(*both)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_passes_make_one_update(backend: str) -> None:
    whole, parts = (EmbeddingTables(solved("compositional", Adam()), std=0.5) for _ in range(2))
    ids = random_ids(whole, 60)
    gradient = torch.randint(-3, 4, (60, 24), generator=torch.Generator().manual_seed(1)).float()
    with ops.using(backend):
        whole(ids).backward(gradient)
        with parts.accumulate():
            for some, own in zip(ids.split(20), gradient.split(20)):
                parts(some).backward(own)
    assert int(parts.store.step_number()) == 1
    for name, slab in parts.store.named_slabs():
        # Products of weights are summed in another order, which may decide a rounding.
        assert (slab != whole.store.slab(name)).float().mean() < 0.01
        torch.testing.assert_close(slab, whole.store.slab(name), rtol=2.0**-7, atol=1e-6)


def test_compiled_steps_leave_the_same_bits() -> None:
    tables = EmbeddingTables(solved("hash", SGD(lr=0.01)))
    twin = copy.deepcopy(tables)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        ids = random_ids(tables, 32, seed)
        outputs = tables(ids), compiled(ids)
        assert torch.equal(*outputs)
        for output in outputs:
            output.square().sum().backward()
    assert_equal(everything(tables), everything(twin))
    assert int(twin.store.step_number()) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_running_mean_is_that_of_the_rows_as_they_were_stored(backend: str) -> None:
    """Rounding moves them too, by more than the rule does here."""
    horizon, rows = 4, 16
    rule = averaged(SGD(lr=2.0**-11), horizon=horizon)
    tables = EmbeddingTables(plan([TableConfig("t", rows, 8)], "full", optimizer=rule, training_precision="bf16"))
    tables.store.slab("t").fill_(1.0)
    mean = tables.store.slab("t").double()
    with ops.using(backend):
        for step in range(1, 20):
            tables(torch.arange(rows).view(rows, 1)).sum().backward()
            share = 1 / (min(step, horizon) + 1)
            mean = (1 - share) * mean + share * tables.store.slab("t").double()
    found = tables.averaged().to_dense("t")
    torch.testing.assert_close(found, mean.float(), rtol=0, atol=1e-6)
    assert (found - tables.to_dense("t")).abs().max() > 2.0**-9


# ---- around it -------------------------------------------------------------------------------------------------------


def test_initial_rows_are_those_of_fp32_rounded_to_nearest() -> None:
    filled = [TableConfig("own", 50, 8, init_fn=nn.init.orthogonal_), TableConfig("other", 40, 8)]
    half, plain = (EmbeddingTables(plan(filled, "full", training_precision=p)) for p in ("bf16", "fp32"))
    for name in ("own", "other"):
        assert torch.equal(half.store.slab(name), plain.store.slab(name).bfloat16())
    half.reset_parameters()
    assert torch.equal(half.store.slab("own"), plain.store.slab("own").bfloat16())


def test_a_trained_model_goes_on_in_16_bits() -> None:
    model = nn.Sequential(nn.Embedding(50, 8))
    before = model(torch.arange(50)).detach()
    compress_(model, "full", optimizer="adagrad", training_precision="bf16", precision="int8")
    found = model(torch.arange(50))
    assert torch.equal(found.detach(), before.bfloat16().float())
    found.sum().backward()
    assert not torch.equal(model(torch.arange(50)), found)


def test_rows_as_they_are_served_are_trained_in_16_bits() -> None:
    tables = EmbeddingTables(solved("hash", Adam(), precision="int4/1"), std=0.5)
    tables.fake_quantize()
    start = tables.store.slab("user").clone()
    for seed in range(2):
        ids = random_ids(tables, 64, seed)
        vectors = tables(ids)
        assert torch.equal(vectors, tables.serve()(ids))
        vectors.square().sum().backward()
    assert not torch.equal(tables.store.slab("user"), start) and start.dtype == torch.bfloat16
    plain = EmbeddingTables(solved("hash", Adam()))
    plain.fake_quantize()
    assert plain.store.rounding is None  # fp32 holds what bf16 does


def test_tables_that_are_cast_keep_their_rows() -> None:
    tables = EmbeddingTables(solved("mixed_dimension", SGD(lr=2.0**-10)), std=0.5)
    rows = {name: slab.clone() for name, slab in tables.store.named_slabs()}
    tables.half()
    assert_equal(rows, dict(tables.store.named_slabs()))
    vectors = tables(random_ids(tables, 64))
    assert vectors.dtype == torch.float16
    vectors.sum().backward()
    assert all(slab.dtype == torch.bfloat16 for _, slab in tables.store.named_slabs())
    assert any(not torch.equal(slab, rows[name]) for name, slab in tables.store.named_slabs())


@pytest.mark.parametrize("compiles", [False, True])
def test_pruning_leaves_as_many_entries_as_it_should(compiles: bool) -> None:
    method = {"kind": "pruned", "warmup_steps": 0, "prune_steps": 2, "interval": 1}
    found = plan(TABLES, method, "30%", optimizer=SGD(lr=0.0), training_precision="bf16")
    tables = EmbeddingTables(found, std=0.5)
    step = torch.compile(tables, fullgraph=True, backend="aot_eager") if compiles else tables
    before = tables.store.slab("pruned/8").clone()
    for seed in range(2):
        step(random_ids(tables, 8, seed)).sum().backward()
    kept, slab = found.groups[0].layout.entries["user"].values["entries"], tables.store.slab("pruned/8")
    magnitudes = before.abs().flatten().sort(descending=True).values
    # Those of the magnitude of the last one that is kept are kept too, of which there are several in 16 bits.
    assert torch.equal(slab, torch.where(before.abs() >= magnitudes[kept - 1], before, 0))
    assert kept <= int(slab.count_nonzero()) < 1.1 * kept


def test_rows_move_and_are_reset() -> None:
    tables = EmbeddingTables(solved(optimizer=Adam()))
    train(tables, 1)
    before = tables.store.slab("user").clone()
    tables.store.move("user", torch.tensor([5]), torch.tensor([7]))
    tables.store.reset("user", torch.tensor([5]))
    assert torch.equal(tables.store.slab("user")[7], before[5]) and not tables.store.slab("user")[5].any()


def test_a_view_looks_up_and_trains() -> None:
    tables = EmbeddingTables(solved("hash", SGD(lr=0.01)))
    view = Embedding.of(tables, "user")
    for _ in range(2):
        view(torch.arange(20)).square().sum().backward()
    assert int(tables.store.step_number()) == 2
    assert torch.equal(view(torch.arange(300)), tables.to_dense("user"))


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casts_leave_rows_and_their_state_alone(cast: torch.dtype, optimizer: str) -> None:
    """State in 16 bits would be read and written as if it were fp32, behind its end."""
    solved = plan([TableConfig("t", 200, 16)], "hash", "50%", optimizer=optimizer, training_precision="bf16")
    tables = EmbeddingTables(solved).to(cast)
    for seed in range(2):
        ids = torch.randint(200, (64, 1), generator=torch.Generator().manual_seed(seed))
        out = tables(ids)
        assert out.dtype == cast
        out.sum().backward()
    for name, tensor in tables.store.optimizer_state().items():
        assert tensor.dtype in (torch.float32, torch.float64, torch.int64) and torch.isfinite(tensor).all(), name
    assert tables.store.tensor(tables.store.weight_names[0]).dtype == torch.bfloat16


def test_mixed_dimensions_in_bf16_take_trained_tables_over() -> None:
    counts = {"t": 10_000 // torch.arange(1, 301).numpy()}
    trained = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    shares = []
    for precision in ("fp32", "bf16"):
        options = {"optimizer": "adagrad", "training_precision": precision}
        tables = EmbeddingTables(plan([TableConfig("t", 300, 16)], "mixed_dimension", "50%", counts, **options))
        shares.append(tables.take_over({"t": trained}, counts)["t"])
    assert shares[1] == pytest.approx(shares[0], abs=1e-2)
