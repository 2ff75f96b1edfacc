"""One module used by several threads at once: lookups are right, and updates come one after another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from core_cases import TRAINED_PROJECTIONS, falling_counts, random_ids
from torch import Tensor

from embtables import SGD, Adam, Embedding, EmbeddingTables, InfeasibleBudget, TableConfig, ops, plan
from embtables.optimizers import FusedOptimizer

BACKENDS = ["native", "reference"] if ops.backend() == "native" else ["reference"]
# One of each way to find rows and to combine them; products, projections and lists among them.
METHODS = pytest.mark.parametrize(
    "method", ["full", "hash", "compositional", TRAINED_PROJECTIONS, "pruned", "robe", "frequency_cutoff"], ids=str
)
THREADS, LOOKUPS = 8, 100


class _Counting(FusedOptimizer):
    """Counts the updates of each row."""

    kind = "counting"

    @classmethod
    def state_widths(cls, width: int) -> tuple[int, ...]:
        return (1,)

    @staticmethod
    def update(
        grad: Tensor, weight: Tensor, state: Sequence[Tensor], hyper: Mapping[str, Tensor], step: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        time.sleep(1e-4)
        return torch.zeros_like(grad), (state[0] + 1,)


def make(method: Any, optimizer: FusedOptimizer | None = None) -> EmbeddingTables:
    configs = [TableConfig("item", 300, 8, ["item", "history"]), TableConfig("user", 200, 8)]
    counts = {config.name: falling_counts(config.num_embeddings or 0) for config in configs}
    try:
        solved = plan(configs, method, None if method == "full" else "40%", counts, optimizer)
    except InfeasibleBudget as error:
        solved = plan(configs, method, error.floor_bytes, counts, optimizer)
    return EmbeddingTables(solved, std=0.3)


def in_threads(work: Callable[[int], None]) -> None:
    """Runs ``work(number of the thread)`` in all threads at once, and raises what one of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(THREADS)

    def run(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("backend", BACKENDS)
@METHODS
def test_inference(method: str, backend: str) -> None:
    with ops.using(backend):
        tables = make(method).eval()
        ids = [random_ids(tables, 5, seed) for seed in range(THREADS)]
        with torch.no_grad():
            expected = [tables(each) for each in ids]
            dense = tables.to_dense("item")

        def work(number: int) -> None:
            with torch.inference_mode():
                for i in range(LOOKUPS):
                    which = (number + i) % THREADS
                    if i % 2:
                        assert torch.equal(tables(ids[which], pooling=("sum", "mean")[i % 4 // 2]), expected[which])
                    else:
                        view = Embedding.of(tables, "item").eval()  # views come into being as they are asked for
                        torch.testing.assert_close(view(ids[which][:, 0]), dense[ids[which][:, 0]])

        in_threads(work)


@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_come_one_after_another(backend: str) -> None:
    """A rule that takes its time between reading state and writing it, which others must not do meanwhile."""
    with ops.using(backend):
        tables = make("full", _Counting(1.0))

        def work(number: int) -> None:
            for _ in range(20):
                tables(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()

        in_threads(work)
        (counts,) = tables.store.slab_state("user")
        assert counts[0] == 20 * THREADS and not counts[1:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["hash", "robe"])
def test_no_update_is_lost(method: str, backend: str) -> None:
    """Steps of SGD commute, and gradients that are small integers add up exactly, in whatever order."""
    with ops.using(backend):
        tables, one = make(method, SGD(1.0)), make(method, SGD(1.0))
        with torch.no_grad():
            for each in (tables, one):
                each.store.tensor(each.store.weight_names[0]).zero_()
        ids = random_ids(tables, 64) % 7

        def work(number: int) -> None:
            for _ in range(LOOKUPS):
                tables(ids).sum().backward()

        in_threads(work)
        (one(ids).sum() * (THREADS * LOOKUPS)).backward()
        weights = [each.store.tensor(each.store.weight_names[0]) for each in (tables, one)]
        assert torch.equal(*weights) and weights[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@METHODS
def test_training_raises_nothing_and_counts_all_steps(method: str, backend: str) -> None:
    """Products too, whose gradients depend on rows that other threads update; and two modules at once."""
    with ops.using(backend):
        modules = [make(method, Adam(1e-3)), make(method, Adam(1e-3))]

        def work(number: int) -> None:
            tables = modules[number % 2]
            ids = random_ids(tables, 16, number)
            for _ in range(LOOKUPS // 4):
                output = tables(ids).square().sum()
                if output.requires_grad:
                    output.backward()

        in_threads(work)
        for tables in modules:
            assert int(tables.optimizer_state_dict()["step"]) == THREADS // 2 * (LOOKUPS // 4)
            assert all(t.isfinite().all() for _, t, is_code in tables.store.tensors() if not is_code)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_parameters_add_up(backend: str) -> None:
    """Views of shared parameters, whose gradients go through one name of a weight."""
    with ops.using(backend):
        tables, one = make("hash"), make("hash")
        ids = random_ids(tables, 64)[:, 0] % 7

        def loss(of: EmbeddingTables) -> Tensor:
            return Embedding.of(of, "item")(ids).sum() + Embedding.of(of, "user")(ids).sum()

        def work(number: int) -> None:
            for _ in range(LOOKUPS // 4):
                loss(tables).backward()

        in_threads(work)
        (loss(one) * (THREADS * (LOOKUPS // 4))).backward()
        for found, expected in zip(tables.parameters(), one.parameters()):
            assert found.grad is not None and expected.grad is not None and torch.equal(found.grad, expected.grad)
