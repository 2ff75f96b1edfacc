"""Tables that several processes train together: replicated, sharded, and in checkpoints of torch.distributed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from core_cases import TRAINED_PROJECTIONS, all_methods, in_turn, method_id
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from embtables import Embedding, EmbeddingTables, TableConfig, plan

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

WORLD, BATCH, STEPS = 2, 8, 8
METHODS = {method_id(method): method for method in all_methods() if method.kind != "drop_feature"}
SHARDED = ("full", "hash", "compositional", "mixed_dimension", TRAINED_PROJECTIONS, "robe", "multi_hash")


class Tables(nn.Module):
    """Calls the tables in one of three ways, which give the same vectors."""

    def __init__(self, tables: EmbeddingTables, call: str) -> None:
        super().__init__()
        self.tables, self.call = tables, call

    def forward(self, ids: Tensor) -> Tensor:
        if self.call == "ids":
            return self.tables(ids)
        if self.call == "lookup":
            return torch.cat(list(self.tables.lookup(ids).values()), 1)
        return self.tables(ids.t().reshape(-1), torch.arange(ids.numel() + 1))


class OneTable(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.item = Embedding(50, 4, sparse=sparse, seed=0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.item(ids).flatten(1)


def tables(method: Any, sparse: bool = False, seed: int = 0, optimizer: str | None = None) -> EmbeddingTables:
    configs = [TableConfig("a", 50, 4), TableConfig("b", 30, 4, pooling="mean")]
    counts = {"a": range(50, 0, -1), "b": range(30, 0, -1)}
    budget = None if getattr(method, "kind", method) == "full" else "60%"
    return EmbeddingTables(plan(configs, method, budget, counts, optimizer), sparse=sparse, seed=seed)


def step(model: nn.Module, number: int, rank: int | None, optimizer: torch.optim.Optimizer) -> None:
    """A step on the whole batch, or on one process's part of it."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(30, (WORLD * BATCH, 2), generator=generator)
    target = torch.randn(WORLD * BATCH, 8, generator=generator)
    own = slice(None) if rank is None else slice(rank * BATCH, (rank + 1) * BATCH)
    (model(ids[own]) - target[own]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def distance(make: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module], rank: int) -> tuple[float, float]:
    """How far the processes' weights are from those of one process, and how far these have moved, at most."""
    alone, model = make(), make()
    begin = [parameter.detach().clone() for parameter in alone.parameters()]
    together = wrap(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (alone, together)]
    for number in range(STEPS):
        step(alone, number, None, optimizers[0])
        step(together, number, rank, optimizers[1])
    off = moved = 0.0
    for one, other, first in zip(alone.parameters(), model.parameters(), begin, strict=True):
        whole = other.full_tensor() if hasattr(other, "full_tensor") else other
        off = max(off, float((one - whole).detach().abs().max()))
        moved = max(moved, float((one - first).detach().abs().max()))
    return off, moved


def shard_all(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def shard_tables(model: nn.Module) -> nn.Module:
    fully_shard(model.tables)
    register_fsdp_forward_method(model.tables, "lookup")
    return fully_shard(model)


CALLS = ((shard_all, "bags"), (shard_tables, "ids"), (shard_tables, "lookup"))


def message_of(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def replicated(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[Any, Any] = {}
    # Dense gradients and sparse ones take turns: methods do not know of either.
    for name, (sparse, call) in in_turn(list(METHODS), [(False, "ids"), (True, "bags")], 1):
        found[name, call] = distance(
            lambda n=name, s=sparse, c=call: Tables(tables(METHODS[n], s), c), DistributedDataParallel, rank
        )
    for sparse in (False, True):
        found["one table", str(sparse)] = distance(lambda s=sparse: OneTable(s), DistributedDataParallel, rank)
    return found


def sharded(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in SHARDED:
        for wrap, call in CALLS:
            key = f"{name}, {wrap.__name__}, {call}"
            found[key] = distance(lambda n=name, c=call: Tables(tables(n), c), wrap, rank)

    def alone() -> object:
        return fully_shard(Tables(tables("hash"), "ids")).tables(torch.zeros(1, 2, dtype=torch.int64))

    def pruned() -> object:
        return fully_shard(Tables(tables("pruned"), "ids"))(torch.zeros(1, 2, dtype=torch.int64))

    def in_bf16() -> str:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        model = fully_shard(Tables(tables("mixed_dimension"), "ids"), mp_policy=policy)
        vectors = model(torch.zeros(4, 2, dtype=torch.int64))
        vectors.float().sum().backward()
        return str(vectors.dtype)

    found["in bf16"] = in_bf16()
    found["outside of forward"], found["pruned"] = message_of(alone), message_of(pruned)
    return found


def checkpoints(rank: int, folder: Path) -> dict[str, Any]:
    """Written by sharded and by replicated tables, and read by sharded ones of other weights."""
    found = {}
    for name, wrap in (("sharded", shard_tables), ("replicated", DistributedDataParallel)):
        model = Tables(tables("mixed_dimension"), "ids")
        together = wrap(model)
        step(together, 0, rank, torch.optim.SGD(together.parameters(), lr=0.5))
        dcp.save(get_model_state_dict(model), checkpoint_id=folder / name)
        again = shard_tables(Tables(tables("mixed_dimension", seed=1), "ids"))
        state = get_model_state_dict(again)
        dcp.load(state, checkpoint_id=folder / name)
        set_model_state_dict(again, state)
        ids = torch.arange(20).view(10, 2)
        with torch.no_grad():
            found[name] = again(ids), model(ids)
    return found


JOBS = (replicated, sharded, checkpoints)


def work(rank: int, folder: Path) -> None:
    """A process does its part of all jobs and ends, together with the others."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=WORLD)
    found = {job.__name__: job(rank, folder) for job in JOBS}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()
    # FSDP keeps the group, so that threads of gloo outlive destroy_process_group. One that meets an interpreter which
    # is taken down can abort the process (pytorch/pytorch#179291), whose work is done by now: it leaves without that.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, Any]]:
    """What each job finds in the first of the processes, which take seconds to start and so do them all."""
    context = torch.multiprocessing.start_processes(work, (folder,), WORLD, join=False, start_method="spawn")
    end = time.monotonic() + 300
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "the processes take too long"
    finally:
        for process in context.processes:
            process.kill()
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.slow
def test_replicated_tables_are_those_of_one_process_with_the_joint_batch(found: dict[str, dict[str, Any]]) -> None:
    distances = found["replicated"]
    assert len(distances) == len(METHODS) + 2
    for key, (off, moved) in distances.items():
        assert off < 1e-6 and moved > 0.01, key


@pytest.mark.slow
def test_sharded_tables_are_those_of_one_process_with_the_joint_batch(found: dict[str, dict[str, Any]]) -> None:
    distances = dict(found["sharded"])
    assert "register_fsdp_forward_method(module, 'lookup')" in distances.pop("outside of forward")
    assert "train them under DistributedDataParallel" in distances.pop("pruned")
    assert distances.pop("in bf16") == "torch.bfloat16"
    for key, value in distances.items():
        assert value[0] < 1e-6 and value[1] > 0.01, key
    assert len(distances) == len(SHARDED) * len(CALLS)


@pytest.mark.slow
def test_distributed_checkpoints(folder: Path, found: dict[str, dict[str, Any]]) -> None:
    """Of sharded and replicated tables, read into sharded ones and by one process."""
    for name, (vectors, wanted) in found["checkpoints"].items():
        assert torch.equal(vectors, wanted), name
        alone = Tables(tables("mixed_dimension", seed=2), "ids")
        state = alone.state_dict()
        dcp.load(state, checkpoint_id=folder / name, no_dist=True)
        alone.load_state_dict(state)
        assert torch.equal(alone(torch.arange(20).view(10, 2)), wanted), name


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad", "adam"])
def test_a_distributed_checkpoint_of_one_process_holds_the_state_of_a_fused_optimizer(
    optimizer: str, tmp_path: Path
) -> None:
    def train(module: EmbeddingTables, steps: range) -> None:
        for number in steps:
            ids = torch.randint(30, (8, 2), generator=torch.Generator().manual_seed(number))
            module(ids).square().sum().backward()

    straight = tables("pruned", optimizer=optimizer)
    train(straight, range(3))
    straight.set_learning_rate(0.03)
    dcp.save({"model": get_model_state_dict(nn.Sequential(straight))}, checkpoint_id=tmp_path, no_dist=True)
    train(straight, range(3, 6))
    resumed = tables("pruned", seed=1, optimizer=optimizer)
    model = nn.Sequential(resumed)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(model, state["model"])
    train(resumed, range(3, 6))
    for key, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
