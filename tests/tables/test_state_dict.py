"""State dicts: weights, the state of a fused optimizer and that of stages, for checkpoints of any framework."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from core_cases import all_methods, counted_bytes, in_turn, method_id, random_ids
from safetensors.torch import load_file
from torch import Tensor, nn

from embtables import Embedding, EmbeddingTables, TableConfig, compress_, plan
from embtables.methods import Method

OPTIMIZERS = ["sgd", "rowwise_adagrad", "adagrad", "adam"]
PREFIX = "optimizer_state."
SCRIPT = Path(__file__).parents[1] / "resume_script.py"


def small(optimizer: str | None, method: Any = "full", seed: int = 0, device: str | None = None) -> EmbeddingTables:
    tables = [TableConfig("a", 50, 4, padding_idx=0), TableConfig("b", 30, 4)]
    budget = None if method in ("full", {"kind": "full"}) or getattr(method, "kind", "") == "full" else "60%"
    counts = {"a": range(50, 0, -1), "b": range(30, 0, -1)}
    return EmbeddingTables(plan(tables, method, budget, counts, optimizer), seed=seed, device=device)


def train(tables: EmbeddingTables, steps: range) -> None:
    free = [] if tables.plan.optimizer is not None else [torch.optim.SGD(tables.parameters(), lr=0.01)]
    for step in steps:
        ids = random_ids(tables, 16, seed=step)
        ((tables(ids) - torch.linspace(-1, 1, 8)) ** 2).sum().backward()
        for optimizer in free:
            optimizer.step()
            optimizer.zero_grad()


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype and torch.equal(tensor, second[key]), key


# How they come in is alike for all methods and rules.
RESUMED = [
    pytest.param(
        method, optimizer, assigned, id=f"{method_id(method)}-{optimizer}-{'assigned' if assigned else 'copied'}"
    )
    for method, (optimizer, assigned) in in_turn(
        all_methods(), list(product(["adagrad", "adam", None], [False, True])), 2
    )
]


@pytest.mark.parametrize(("method", "optimizer", "assigned"), RESUMED)
def test_a_file_of_the_state_dict_alone_resumes_bit_for_bit(
    method: Method, optimizer: str | None, assigned: bool, tmp_path: Path
) -> None:
    """Copied, and assigned to tables on the meta device, which take everything over."""
    method = method.for_training(10)
    through = small(optimizer, method)
    train(through, range(5))
    if optimizer:
        through.set_learning_rate(0.02)
    torch.save(through.state_dict(), tmp_path / "state.pt")
    train(through, range(5, 10))
    resumed = small(optimizer, method, seed=9, device="meta" if assigned else None)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), assign=assigned)
    train(resumed, range(5, 10))
    same(through, resumed)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_keys_are_those_of_the_weights_and_of_the_state_apart(optimizer: str) -> None:
    plain, fused = small(None).state_dict(), small(optimizer).state_dict()
    keys = {key for key in fused if key.startswith(PREFIX)}
    assert set(fused) - keys == set(plain)
    state = {PREFIX + name for name in small(optimizer).optimizer_state_dict() if name != "hyper"}
    assert keys == state | {f"{PREFIX}rule", f"{PREFIX}learning_rate"}
    assert bytes(fused[f"{PREFIX}rule"].tolist()).decode() == optimizer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_alone_leave_the_state_as_it_is(optimizer: str) -> None:
    """As state dicts of embtables 0.1.0 are, strictly."""
    source, target = small(None, seed=1), small(optimizer)
    train(target, range(3))
    target.set_learning_rate(0.3)
    before = target.optimizer_state_dict()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.to_dense("a"), source.to_dense("a"))
    after = target.optimizer_state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    meta = small(optimizer, device="meta")
    meta.load_state_dict(copied(source), assign=True)
    fresh = small(optimizer).optimizer_state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in meta.optimizer_state_dict().items())


def test_the_state_of_another_optimizer_is_left_with_a_warning() -> None:
    source = small("adagrad", seed=1)
    train(source, range(3))
    for optimizer in ("sgd", "adam", "rowwise_adagrad"):
        target = small(optimizer)
        train(target, range(2))
        before = target.optimizer_state_dict()
        with pytest.warns(UserWarning, match=f"fused optimizer 'adagrad', but '{optimizer}' trains these tables"):
            target.load_state_dict(source.state_dict())
        assert torch.equal(target.to_dense("a"), source.to_dense("a"))
        assert all(torch.equal(t, before[name]) for name, t in target.optimizer_state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for target in (small(None), small(None).finalize()):
            target.load_state_dict(source.state_dict())
            assert torch.equal(target.to_dense("a"), source.to_dense("a"))
        unfused = small(None, "pruned", seed=1)
        train(unfused, range(3))
        target = small("adam", "pruned")
        target.load_state_dict(unfused.state_dict())
    assert int(target.optimizer_state_dict()["stage_0_steps"]) == 3


def test_state_that_lacks_a_part_or_does_not_fit_is_named() -> None:
    tables = small("adam")
    state = copied(tables)
    del state[f"{PREFIX}step"]
    with pytest.raises(RuntimeError, match=r"Missing key.*optimizer_state\.step"):
        tables.load_state_dict(state)
    state = {**copied(tables), f"{PREFIX}state_7_weight_4": torch.zeros(3)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*optimizer_state\.state_7_weight_4"):
        tables.load_state_dict(state)
    state = {**copied(tables), f"{PREFIX}state_0_weight_4": torch.zeros(3, 4)}
    with pytest.raises(RuntimeError, match=r"optimizer_state\.state_0_weight_4: it has shape \(3, 4\).*need \(80, 4\)"):
        tables.load_state_dict(state)


def test_of_the_hyper_parameters_the_learning_rate_alone_is_taken() -> None:
    source = small("adam")
    source.set_learning_rate(0.25)
    clipped = {"kind": "adam", "l2": 0.5, "clip_row_norm": 2.0}
    target = EmbeddingTables(plan(source.plan.tables, "full", optimizer=clipped))
    wanted = target.optimizer_state_dict()["hyper"]
    wanted[0] = 0.25
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.optimizer_state_dict()["hyper"], wanted)
    given = target.state_dict()[f"{PREFIX}learning_rate"]
    given.fill_(7.0)
    assert torch.equal(target.optimizer_state_dict()["hyper"], wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_leaves_step_and_learning_rate_their_own_types(dtype: torch.dtype) -> None:
    state = small("adam").to(dtype).state_dict()
    assert state[f"{PREFIX}learning_rate"].dtype == torch.float64
    assert state[f"{PREFIX}step"].dtype == torch.int64
    assert state["store.weight_4"].dtype == state[f"{PREFIX}state_0_weight_4"].dtype == dtype


@pytest.mark.parametrize("method", ["full", "hash", "pruned"])
def test_what_is_served_holds_no_state(method: str, tmp_path: Path) -> None:
    tables = small("adam", method)
    train(tables, range(2))
    tables.save(tmp_path / "t.safetensors")
    held = load_file(tmp_path / "t.safetensors").values()
    assert sum(t.numel() * t.element_size() for t in held) == tables.plan.inference_bytes
    for served in (EmbeddingTables.load(tmp_path / "t.safetensors"), tables.finalize() if method == "pruned" else None):
        if served is not None:
            assert [key for key in served.state_dict() if key.startswith(PREFIX)] == []
            assert counted_bytes(served) == tables.plan.inference_bytes


class Model(nn.Module):
    """Two tables of torch.nn, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.city = nn.Embedding(60, 8), nn.Embedding(40, 8)
        self.head = nn.Linear(16, 1)

    def forward(self, ids: Tensor) -> Tensor:
        vectors = [self.item(ids[:, 0]), self.city(ids[:, 1])]
        return self.head(torch.cat(vectors, 1)).squeeze(1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_compressed_models_resume(optimizer: str, tmp_path: Path) -> None:
    """Their two tables share one storage, which the state dict shows under both."""

    def model(seed: int) -> Model:
        torch.manual_seed(seed)
        made = Model()
        compress_(made, "hash", "50%", optimizer={"kind": optimizer, "lr": 0.01})
        assert isinstance(made.item, Embedding)
        return made

    def steps(made: Model, which: range) -> None:
        dense = torch.optim.SGD(made.head.parameters(), lr=0.1)
        for step in which:
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(40, (16, 2), generator=generator)
            made(ids).square().sum().backward()
            dense.step()
            dense.zero_grad()

    straight = model(0)
    steps(straight, range(3))
    torch.save(straight.state_dict(), tmp_path / "model.pt")
    steps(straight, range(3, 6))
    resumed = model(1)
    resumed.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    steps(resumed, range(3, 6))
    same(straight, resumed)


@pytest.mark.parametrize("method", ["full", "hash", "mixed_dimension"])
def test_sparse_and_dense_tables_have_the_same_keys_and_load_each_other(method: str) -> None:
    solved = small(None, method).plan
    sparse, dense = EmbeddingTables(solved, seed=1, sparse=True), EmbeddingTables(solved, seed=2)
    assert set(sparse.state_dict()) == set(dense.state_dict())
    dense.load_state_dict(sparse.state_dict())
    assert torch.equal(dense.to_dense("a"), sparse.to_dense("a"))
    again = EmbeddingTables(solved, device="meta", sparse=True)
    again.load_state_dict(copied(dense), assign=True)
    ids = random_ids(dense, 8)
    assert torch.equal(again(ids), dense(ids))
    again(ids).sum().backward()
    weights = [key for key in sparse.state_dict() if "weight_" in key]
    assert sum(parameter.grad.is_sparse for parameter in again.parameters()) == len(weights) > 0
    state = {key: tensor for key, tensor in copied(dense).items() if key not in weights}
    found = sparse.load_state_dict(state, strict=False)
    assert found.missing_keys == weights and found.unexpected_keys == []


# ---- frameworks ------------------------------------------------------------------------------------------------------


FRAMEWORKS = ["pytorch_lightning", "accelerate"]
RESUMING = ["rowwise_adagrad", "adam"]  # a state of each form


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where frameworks left what they trained: one process begins with all of them, and another resumes."""
    folder = tmp_path_factory.mktemp("resumed")
    installed = ",".join(name for name in FRAMEWORKS if importlib.util.find_spec(name))
    for how in ("begin", "resume"):
        command = [sys.executable, str(SCRIPT), str(folder), how, installed, ",".join(RESUMING)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "framework",
    [
        pytest.param(name, marks=pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"needs {name}"))
        for name in FRAMEWORKS
    ],
)
def test_a_framework_resumes_in_a_new_process_bit_for_bit(framework: str, resumed: Path) -> None:
    """Two epochs, its own checkpoint, two more in a new process: the same as four epochs."""
    for optimizer in RESUMING:
        straight, went_on, half = (
            torch.load(resumed / framework / f"{optimizer}-{which}.pt", weights_only=True)
            for which in ("straight", "resumed", "half")
        )
        assert list(straight) == list(went_on) == list(half)
        assert any(not torch.equal(tensor, half[key]) for key, tensor in straight.items())
        for key, tensor in straight.items():
            assert torch.equal(tensor, went_on[key]), f"{optimizer}: {key}"
