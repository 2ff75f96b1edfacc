"""What the tests of native lookups share: bags, steps, what they leave, and processes that import the package anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from core_cases import random_ids
from torch import Tensor

from embtables import EmbeddingTables, ops

NATIVE = pytest.mark.skipif(ops.backend() != "native", reason="needs the native library")
BACKENDS = ["reference", pytest.param("native", marks=NATIVE)]


def jagged(tables: EmbeddingTables, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Flat ids and offsets: bags of none to four ids, padding among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (len(tables.feature_names) * batch,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    pool = random_ids(tables, int(lengths.max()) * batch, seed).t().reshape(len(tables.feature_names), -1)
    per_feature = lengths.view(len(tables.feature_names), batch).sum(1).tolist()
    return torch.cat([ids[:n] for ids, n in zip(pool, per_feature)]), offsets


def some_ids(tables: EmbeddingTables, batch: int, seed: int, padded: str = "city") -> Tensor:
    """Few distinct ids, so that rows occur many times; some padding, and some out of range where that is allowed."""
    ids = random_ids(tables, batch, seed)
    ids[::3] = ids[0]
    column = {name: i for i, name in enumerate(tables.feature_names)}
    ids[1::7, column["user"]] = 3
    ids[2::7, column["user"]] = -5
    ids[3::7, column["item"]] = 10**12
    ids[4::7, column[padded]] = 0
    return ids


def state(tables: EmbeddingTables) -> dict[str, Tensor]:
    # A module with the name of a weight holds it where its gradients are sparse.
    named = {name.removesuffix(".weight"): parameter for name, parameter in tables.named_parameters()}
    gradients = {f"{n}.grad": p.grad.to_dense() for n, p in named.items() if p.grad is not None}
    weights = {n: t for n, t in tables.state_dict().items() if "extra_state" not in n}
    return {**weights, **tables.optimizer_state_dict(), **gradients}


# A row's occurrences are added up in another order where features share rows; a hundred of them, and products of rows,
# carry that to the fifth decimal in a few steps at a learning rate of 0.1.
def assert_same(ours: EmbeddingTables, reference: EmbeddingTables, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    expected = state(reference)
    for name, tensor in state(ours).items():
        torch.testing.assert_close(tensor, expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def step(tables: Callable[..., Tensor], arguments: tuple[Any, ...], seed: int, **options: Any) -> Tensor:
    out: Tensor = tables(*arguments, **options)
    if out.requires_grad:
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        out.backward(gradient.to(out.dtype))
    return out.detach()


ROOT = Path(__file__).resolve().parents[1]
_FORKS = """
import json, os, sys, torch

code, folder, environments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for number, environment in enumerate(environments):
    child = os.fork()
    if not child:
        for descriptor in (1, 2):
            os.dup2(os.open(f"{folder}/{number}.{descriptor}", os.O_CREAT | os.O_WRONLY), descriptor)
        os.environ.update(environment)
        exec(compile(code, "<code>", "exec"))
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run_each(code: str, environments: list[Mapping[str, str]], folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Runs code in a process for each of these environments, all forked off one that has imported PyTorch, and no more.

    That import takes seconds. What the processes print lies in the folder.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EMBTABLES_")}
    kept["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    command = [sys.executable, "-c", _FORKS, code, str(folder), json.dumps(environments)]
    done = subprocess.run(command, env=kept, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return [
        subprocess.CompletedProcess(code, int(status), *((folder / f"{i}.{each}").read_text() for each in (1, 2)))
        for i, status in enumerate(done.stdout.split())
    ]
