"""Files that earlier versions wrote are read, and mean what they meant: ``tests/data/write_files.py`` writes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from embtables import EmbeddingTables, Plan, ops

DATA = Path(__file__).parents[1] / "data"
FOLDERS = sorted(DATA.glob("files-*"))
FILES = [path for folder in FOLDERS for path in sorted(folder.glob("*.safetensors")) if path.stem != "expected"]


def name_of(path: Path) -> str:
    return path.relative_to(DATA).as_posix().removesuffix(".safetensors")


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and ops.instructions() is None:
        pytest.skip("there is no native code in this process")
    with ops.using(request.param):
        yield request.param


@cache
def expected(folder: Path) -> dict[str, dict[str, Tensor]]:
    """By file: the ids that are looked up, ``[B, F]``, and what they give."""
    by_file: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "expected.safetensors").items():
        file, name = key.split("/", 1)
        by_file.setdefault(file, {})[name] = tensor
    return by_file


def test_there_are_files() -> None:
    assert DATA / "files-0.1.0" in FOLDERS
    for folder in FOLDERS:
        assert set(expected(folder)) == {path.stem for path in FILES if path.parent == folder} | {"training"}


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_every_form_is_among_them(folder: Path) -> None:
    """Pruned tables in each of the sparse forms, ids by rank, and tables kept in full."""
    plans = [str(EmbeddingTables.load(path).plan) for path in FILES if path.parent == folder]
    forms = ("bitmap:", "compressed rows:", "entries:", "cut_off_by_rank:", "mixed_by_rank:", "dropped", "full")
    assert [form for form in forms if not any(f"  {form}" in text for text in plans)] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_served_tables(path: Path, backend: str) -> None:
    """Bit for bit, products of matrices too: the weights are such that any order of a sum gives the same."""
    wanted = dict(expected(path.parent)[path.stem])
    ids = wanted.pop("ids")
    tables = EmbeddingTables.load(path)
    for given in (ids, ids.int()):
        found = tables.lookup(given, pooling=None)
        assert found.keys() == wanted.keys()
        for name, vectors in found.items():
            assert torch.equal(vectors, wanted[name]), name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_plans_keep_their_fingerprints(path: Path) -> None:
    """By which state dicts know the plan that they belong to."""
    with safe_open(path, "pt") as file:
        written = json.loads(file.metadata()["embtables"])
    apart = ("budget_bytes", "optimizer", "sha256")
    text = json.dumps({key: value for key, value in written.items() if key not in apart}, sort_keys=True)
    assert EmbeddingTables.load(path).plan.fingerprint == hashlib.sha256(text.encode()).digest()


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_tables_in_training(folder: Path, backend: str) -> None:
    """A plan, and tables that take over weights and optimizer state under it; the next step rounds as it may."""
    wanted = expected(folder)["training"]
    solved = Plan.from_dict(json.loads((folder / "plan.json").read_text(encoding="utf-8")))
    saved = torch.load(folder / "training.pt", weights_only=True)
    tables = EmbeddingTables(solved, seed=2)
    tables.load_state_dict(saved["state_dict"])
    tables.load_optimizer_state_dict(saved["optimizer_state_dict"])
    for table in solved.tables:
        assert torch.equal(tables.to_dense(table.name), wanted[f"dense/{table.name}"]), table.name

    output = tables(wanted["ids"], pooling="sum")
    output.backward(torch.arange(1.0, output.shape[1] + 1).expand_as(output) / 8)
    for table in solved.tables:
        trained, name = tables.to_dense(table.name), f"dense after a step/{table.name}"
        torch.testing.assert_close(trained, wanted[name], rtol=0, atol=1e-6)
        assert not torch.equal(trained, wanted[f"dense/{table.name}"]), table.name
