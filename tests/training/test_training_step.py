"""What a step does beside its arithmetic: compiled, watched without waiting, and no pass over whole tables."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import Graphs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import assert_weights, config_of, curve_of, weights_of

from embtables import EmbeddingTables, TableConfig, plan
from embtables.datasets import Batch, Synthetic, prepare_synthetic
from embtables.models import DIN, DLRM, build_model
from embtables.training import Trainer, compilation, load_served, loop
from embtables.training.compilation import Compilation, uncompiled
from embtables.training.nan_guard import NonFiniteError, Watch
from embtables.training.optimization import Optimization


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    config = Synthetic(rows=4000, cardinalities=(200, 40), num_dense=2, shares=(0.6, 0.2, 0.2))
    return prepare_synthetic(tmp_path_factory.mktemp("data") / "toy", config)


def batch_of(size: int, seed: int = 0, num_dense: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (size,), generator=generator).float()
    ids = torch.randint(50, (size, 2), generator=generator)
    return Batch(labels, torch.randn(size, num_dense, generator=generator), ids, None, {})


def tables_of(optimizer: str | None = "adagrad", rows: int = 50) -> EmbeddingTables:
    return EmbeddingTables(plan([TableConfig("a", rows, 4), TableConfig("b", rows, 4)], "full", optimizer=optimizer))


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    found = Graphs()
    monkeypatch.setattr(compilation, "_BACKEND", found)
    return found


@pytest.mark.parametrize("more", [[], ["training.autocast=bf16"], ["model.name=mlp", "training.clip_norm=0.1"]])
def test_a_compiled_run_is_the_one_that_is_not(more, toy, graphs, tmp_path):
    assert toy.num_rows("train") % 500  # the last batch of an epoch is another size
    small = ["training.batch_size=500", *more]
    plain = Trainer(config_of(*small), toy, tmp_path / "plain").run()
    assert plain["compile_seconds"] is None and not graphs.operators
    compiled = Trainer(config_of(*small, "training.compile=true"), toy, tmp_path / "compiled").run()
    assert compiled["compile_seconds"] > 0 and compiled["examples_per_second"] > 0
    before = [{k: v for k, v in row.items()} for row in curve_of(tmp_path / "plain")]
    assert before == curve_of(tmp_path / "compiled")
    weights = weights_of(tmp_path / "plain")
    assert list(weights_of(tmp_path / "compiled")) == list(weights)
    assert_weights(weights_of(tmp_path / "compiled"), weights, rtol=0, atol=0)
    # The probe and the model; no other size or mode is compiled, and no lookup.
    number = len(graphs.operators)
    assert number == 2
    flat = [operator for operators in graphs.operators for operator in operators]
    assert any("linear" in operator for operator in flat) and not any("embtables" in operator for operator in flat)
    served = load_served(tmp_path / "compiled" / "served")
    (batch,) = toy.batches("test", toy.num_rows("test"))
    with torch.no_grad():
        logits = served(batch).numpy()
    np.testing.assert_allclose(logits, np.load(tmp_path / "compiled" / "test_scores.npy"), rtol=1e-4, atol=1e-6)
    assert len(graphs.operators) == number


def test_a_compiled_run_goes_on_where_it_was(toy, graphs, tmp_path, monkeypatch):
    more = ["training.compile=true", "training.checkpoint_seconds=0", "model.hyperparameters.dropout=0.3"]
    Trainer(config_of(*more), toy, tmp_path / "whole").run()
    step = loop.Run._step

    def interrupted(self, batch, watch):
        if self.progress.step == 4:
            raise KeyboardInterrupt
        step(self, batch, watch)

    monkeypatch.setattr(loop.Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config_of(*more), toy, tmp_path / "again").run()
    monkeypatch.setattr(loop.Run, "_step", step)
    Trainer(config_of(*more), toy, tmp_path / "again").run()
    assert_weights(weights_of(tmp_path / "again"), weights_of(tmp_path / "whole"), rtol=0, atol=0)
    assert curve_of(tmp_path / "again") == curve_of(tmp_path / "whole")


def test_the_compiled_step_counts_as_no_speed(toy, graphs, tmp_path):
    """A run of one step."""
    config = config_of(f"training.batch_size={toy.num_rows('train')}", "training.epochs=1", "training.compile=true")
    result = Trainer(config, toy, tmp_path / "run").run()
    assert result["compile_seconds"] > 0 and result["train_seconds"] == 0 and result["examples_per_second"] is None


def test_histories_of_any_length_share_their_graphs(graphs):
    from model_cases import make_batch, make_tables

    tables = make_tables(optimizer="sgd")
    model = DIN(tables, 2)
    watch = Watch(model, tables, [])
    running = Compilation(model, 6, varying=True)
    seen = []
    for seed, lengths in enumerate([(3, 0, 1, 6, 2, 7), (9, 9, 9, 9, 9, 9), (2, 1, 0, 1, 2, 30), (1, 1, 1, 1, 1, 2)]):
        running.call(make_batch(lengths=lengths, num_dense=2, seed=seed)).sum().backward()
        seen.append(len(graphs.operators))
    assert seen[0] > 0 and set(seen) == {seen[0]}
    running.call(make_batch(lengths=(2, 3), num_dense=2))
    model.eval()
    with uncompiled(), torch.no_grad():
        model(make_batch(num_dense=2))
    assert len(graphs.operators) == seen[0]
    watch.close()


@pytest.mark.slow
def test_a_model_compiles_with_torchs_own_compiler():
    """Logits and gradients are the uncompiled model's; with the real compiler where there is one."""
    torch.manual_seed(0)
    tables = tables_of(None)
    model = build_model("dlrm", tables, 3, {})
    batch = batch_of(64)
    undo = Watch(model, tables, []).close
    wanted = model(batch)
    wanted.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    try:
        compilation.check_compiler(torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))
    logits = Compilation(model, 64, varying=False).call(batch)
    logits.square().sum().backward()
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], rtol=1e-3, atol=1e-5)
    undo()


def test_without_a_compiler_there_is_a_sentence(toy, tmp_path):
    environment = os.environ | {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags = ["--quiet", "--set", "training.compile=true", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "embtables", "train", str(toy.path), *flags]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    message = " ".join(found.stderr.split())
    assert found.returncode == 2 and "Traceback" not in message
    assert (
        "training.compile: torch cannot compile on this machine" in message
        and "in the environment variable CXX" in message
    )
    assert not (tmp_path / "run").exists()


def test_a_model_that_torch_cannot_compile_is_named(toy, monkeypatch, tmp_path):
    def broken(graph, example_inputs):
        if len(example_inputs) > 1:
            raise RuntimeError("no such operator")
        return graph.forward

    monkeypatch.setattr(compilation, "_BACKEND", broken)
    with pytest.raises(ValueError, match="cannot compile model DLRM .*leave training.compile at false"):
        Trainer(config_of("training.compile=true"), toy, tmp_path / "run").run()


# ---- in bfloat16 -----------------------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Shapes of what is cast to bfloat16 and of what multiplies or adds in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.cast, self.wide = [], []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "_to_copy" in str(func) and result.dtype == torch.bfloat16:
            self.cast.append(tuple(result.shape))
        if any(name in str(func) for name in ("mul", "sigmoid", "batch_norm", "mm")):
            first = result[0] if isinstance(result, tuple) else result
            if first.dtype == torch.float32 and first.is_floating_point():
                self.wide.append(tuple(first.shape))
        return result


def test_autocast_casts_what_the_tables_give_once():
    model = DLRM(tables_of(), 3)
    with Copies() as copies, torch.autocast("cpu", torch.bfloat16):
        model(batch_of(37))
    # Of two vectors of 4 components, and of the dense features; nothing else has a row for each example.
    assert sorted(shape for shape in copies.cast if shape[0] == 37) == [(37, 3), (37, 8)]
    assert copies.wide == []


def test_autocast_leaves_nothing_of_the_attention_in_float32_but_its_sum():
    from model_cases import make_batch, make_tables

    tables = make_tables(optimizer="sgd")
    model = DIN(tables, 0)
    batch = make_batch(lengths=(3, 0, 9, 6, 2, 7))  # 27 entries of two histories, 16 components
    with torch.no_grad(), Copies() as copies, torch.autocast("cpu", torch.bfloat16):
        model(batch)
    assert copies.cast.count((27, 16)) == 1
    # The weighted entries, which are added up.
    assert [shape for shape in copies.wide if shape[0] == 27] == [(27, 16)]


# ---- watched ---------------------------------------------------------------------------------------------------------


class Spoiled(nn.Module):
    """Turns what it is told to into NaN at one step."""

    def __init__(self, embeddings: EmbeddingTables, what: str, at: int) -> None:
        super().__init__()
        self.embeddings, self.what, self.at, self.step = embeddings, what, at, 0
        self.layer = nn.Linear(8, 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        self.step += 1
        vectors = self.embeddings(batch.ids)
        zero = 0.0
        if self.step == self.at:
            if self.what == "loss":
                zero = math.nan
            elif self.what == "b":  # √0: finite, and its gradient is not
                zero = (vectors[:, 4:].sum(1) * 0).sqrt()
            elif self.what == "layer.weight":
                zero = (self.layer.weight.sum() * 0).sqrt()
            elif self.what == "input":
                zero = batch.dense.sum(1)
        return self.layer(vectors).squeeze(1) + zero


SENTENCES = {
    "loss": "^step 3: the loss is nan; ",
    "input": "^step 3: the loss is nan because dense feature 'y' is NaN$",
    "b": "^step 3: the gradient of the vectors of 'b' is NaN; lower",
    "layer.weight": "^step 3: the gradient of 'layer.weight' is NaN; lower",
}


@pytest.mark.parametrize("optimizer", [None, "adagrad"])
@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("what", SENTENCES)
def test_the_first_bad_number_is_named_whenever_it_is_read(what, waits, optimizer):
    tables = tables_of(optimizer)
    model = Spoiled(tables, what, at=3)
    watch = Watch(model, tables, ["x", "y", "z"], waits=waits)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
    start = tables.to_dense("a")

    def run(number: int) -> None:
        for step in range(1, number + 1):
            watch.step = step
            batch = batch_of(16, step)
            if what == "input" and step == 3:
                batch.dense[2, 1] = math.nan
            logits = model(batch)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
            watch.loss(loss, logits, batch)
            model.zero_grad()
            loss.backward()
            watch.gradients()
            for one in optimizers:
                one.step()

    with pytest.raises(NonFiniteError, match=SENTENCES[what]):
        run(6)
        assert not waits  # the others are read here
        watch.settle()
    assert model.step == (3 if waits else 6)
    if waits and what != "layer.weight":
        assert tables.to_dense("a").isfinite().all() and not torch.equal(tables.to_dense("a"), start)
    watch.close()


def test_losses_that_are_read_late_are_the_same(toy, tmp_path, monkeypatch):
    """A run whose numbers are read at log entries, evaluations and checkpoints has the same curve and weights."""
    more = ["training.log_every=3", "training.evaluations_per_epoch=2", "training.checkpoint_seconds=1000"]
    Trainer(config_of(*more), toy, tmp_path / "each").run()
    number = []
    settle = Watch.settle

    def patient(*arguments, waits):
        return Watch(*arguments, waits=False)

    monkeypatch.setattr(loop, "Watch", patient)
    monkeypatch.setattr(Watch, "settle", lambda self: number.append(len(self._losses)) or settle(self))
    Trainer(config_of(*more), toy, tmp_path / "late").run()
    assert max(number) == 3 and sum(number) == 2 * math.ceil(toy.num_rows("train") / 400)
    assert curve_of(tmp_path / "late") == curve_of(tmp_path / "each")
    assert_weights(weights_of(tmp_path / "late"), weights_of(tmp_path / "each"), rtol=0, atol=0)


# ---- no pass over a table --------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Operators that read or make as many elements as a table has. Views and picking of rows read no whole."""

    PICKS = ("index_select", "view", "detach", "embtables", "alias", "index_add_", "index.Tensor", "index_put", "slice")

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.found = least, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in [*args, result] if isinstance(t, torch.Tensor)]
        if any(t.numel() >= self.least for t in tensors) and not any(name in str(func) for name in self.PICKS):
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad", "adam"])
@pytest.mark.parametrize("method", ["full", "hash", "compositional", "multi_hash", "unified"])
def test_a_whole_training_step_passes_over_no_table(method, optimizer, toy, tmp_path, monkeypatch):
    """With everything on that could look at weights: clipping, regularization, decay, and the watch."""
    more = [f"tables.method={method}", f"tables.optimizer={optimizer}", "tables.l2=0.01", "training.clip_norm=1"]
    config = config_of(*more, "tables.regularization=0.1", "tables.budget=" + ("null" if method == "full" else "50%"))
    configs = [TableConfig("a", 40_000, 4), TableConfig("b", 40_000, 4)]
    counts = {name: np.ones(40_000, dtype=np.int64) for name in "ab"}
    fused = {"kind": optimizer, "lr": 0.01, "l2": 0.01}
    tables = EmbeddingTables(plan(configs, method, None if method == "full" else "50%", counts, fused))
    tables.regularize(0.1, counts)
    model = DLRM(tables, 3)
    optimization = Optimization(config, model, tables)
    run = loop.Run.__new__(loop.Run)
    run.config, run.model, run.device, run.optimization, run.compilation = (
        *(config, model, torch.device("cpu"), optimization), None,
    )  # fmt: skip
    watch = Watch(model, tables, ["x", "y", "z"])
    model.train()
    batch = batch_of(32)
    run._step(batch, watch)
    smallest = min(t.shape[0] for name, t, _ in tables.store.tensors())
    assert smallest >= 100
    with Sizes(10_000) as sizes:
        run._step(batch, watch)
        watch.settle()
        optimization.learning_rates()
    watch.close()
    assert not sizes.found
    # The test can fail: a look at the weights is seen.
    with Sizes(10_000) as sizes:
        for tensor in tables.store.state_dict().values():
            tensor.isfinite()
    assert sizes.found or method == "compositional"


def test_the_watch_leaves_gradients_of_whole_tables_alone():
    """With dense gradients, whose optimizer passes over them, it makes no pass of its own."""
    tables = tables_of(None, rows=20_000)
    model = DLRM(tables, 3)
    watch = Watch(model, tables, ["x", "y", "z"])
    batch = batch_of(32)
    loss = nn.functional.binary_cross_entropy_with_logits(model(batch), batch.labels)
    loss.backward()
    with Sizes(10_000) as sizes:
        watch.loss(loss, loss, batch)
        watch.gradients()
        watch.settle()
    assert tables.store.weight_4.grad is not None and not sizes.found
    watch.close()


@pytest.mark.parametrize(("optimizer", "sparse"), [("adam", False), ("adagrad", False), ("sgd", False), ("sgd", True)])
def test_torchs_optimizers_take_one_pass_where_they_can(optimizer, sparse):
    names = [
        f"tables.optimizer={optimizer}",
        f"dense.optimizer={optimizer}",
        f"tables.sparse_gradients={str(sparse).lower()}",
    ]
    tables = EmbeddingTables(
        plan([TableConfig("a", 50, 4), TableConfig("b", 50, 4)], "full", optimizer=None), sparse=sparse
    )
    optimization = Optimization(config_of("tables.fused=false", *names), DLRM(tables, 3), tables)
    assert optimization.dense.defaults["fused"] is True
    assert optimization.tables.defaults["fused"] is (None if sparse else True)
