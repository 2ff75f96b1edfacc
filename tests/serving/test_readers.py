"""The readers of served files, which use none of the code that trains: every method in every precision, bit for bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import all_methods, falling_counts, method_id, shares_scalars, shuffled_counts
from third_party.deep_hash import DeepHash
from third_party.frequent_rows import FrequentRows
from third_party.low_rank_hashes import LowRankHashes
from third_party.metadata import Metadata
from third_party.product_quantization import ProductQuantization
from torch import Tensor

from embtables import EmbeddingTables, InfeasibleBudget, TableConfig, ops, plan
from embtables.formats import FORMATS
from embtables.methods import Method
from embtables.serving import numpy_reader
from embtables.serving.numpy_reader import NumpyTables
from embtables.serving.torch_reader import TorchTables

CONFIGS = [
    TableConfig("user", 300, 16, padding_idx=0),
    TableConfig("item", 200, 10, feature_names=["item", "history"], pooling="mean", on_out_of_range="oov"),
    TableConfig("city", 12, 10),
    TableConfig("slot", 90, 6, on_out_of_range="hash", padding_idx=5, pooling="mean"),
]
COUNTS = {
    "user": falling_counts(300),
    "item": shuffled_counts(200),
    "city": falling_counts(12),
    "slot": shuffled_counts(90),
}
PRECISIONS = [*FORMATS, "int4/slab", "int2/7", "binary2/3"]
READERS = [NumpyTables, TorchTables]
# Sums have the bits of native code, which adds up from the left to the right.
exact = pytest.mark.skipif(ops.instructions() is None, reason="the native library was not built")


def served(method: Method, precision: str, path: Path, configs: list[TableConfig] = CONFIGS) -> EmbeddingTables | None:
    """Tables that were saved and opened again; ``None`` where the method has no such form."""
    optimizer = "adagrad" if shares_scalars(method) else "default"
    counts = {config.name: COUNTS[config.name] for config in configs if config.num_embeddings}
    budget: Any = None if method.kind == "full" else "12%"
    try:
        solved = plan(configs, method, budget, counts, optimizer, precision=precision)
    except InfeasibleBudget as error:
        solved = plan(configs, method, error.floor_bytes, counts, optimizer, precision=precision)
    except ValueError:
        return None
    EmbeddingTables(solved, std=0.3).save(path)
    return EmbeddingTables.load(path)


def bits(values: Any) -> Tensor:
    return torch.as_tensor(values).contiguous().view(torch.int32)


def check(tables: EmbeddingTables, path: Path) -> None:
    """Single ids, with some that are out of range, and weighted bags of all lengths."""
    generator = torch.Generator().manual_seed(0)
    configs = tables.plan.tables
    columns = {}
    for config in configs:
        most = (config.rows or 2**40) if config.on_out_of_range == "error" else 2**40
        ids = torch.randint(most, (40,), generator=generator)
        columns[config.name] = torch.cat([ids, torch.randint(12, (40,), generator=generator)])
    features = [f for config in configs for f in config.feature_names]
    by_feature = [columns[config.name] for config in configs for _ in config.feature_names]
    vectors = tables.lookup(torch.stack(by_feature, 1))
    lengths = torch.tensor([3, 0, 1, 9, 2, 40, 7, 18])
    one = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    offsets = torch.cat([one[:-1] + 80 * i for i in range(len(features))] + [torch.tensor([80 * len(features)])])
    factors = torch.rand(80, generator=generator)
    flat = torch.cat(by_feature)
    pooled = tables.lookup(flat, offsets)
    weighted = tables.lookup(flat, offsets, factors.repeat(len(features)))
    for reader in READERS:
        read = reader(path)
        for config in configs:
            for feature in config.feature_names:
                ids = columns[config.name]
                assert torch.equal(bits(read.lookup(config.name, ids)), bits(vectors[feature])), (reader, feature)
                found = read.pooled(config.name, ids, one)
                assert torch.equal(bits(found), bits(pooled[feature])), (reader, feature)
                found = read.pooled(config.name, ids, one, weights=factors)
                assert torch.equal(bits(found), bits(weighted[feature])), (reader, feature)


@exact
@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_every_precision_is_read_bit_for_bit(method: Method, tmp_path: Path) -> None:
    looked_up = 0
    for precision in PRECISIONS:
        tables = served(method, precision, tmp_path / "tables.safetensors")
        if tables is not None:
            check(tables, tmp_path / "tables.safetensors")
            looked_up += 1
    assert looked_up


@exact
@pytest.mark.parametrize(
    "method",
    [
        ProductQuantization(code_dtype="uint8"),
        ProductQuantization(remap="int32", code_dtype="int16"),
        Metadata(),
        Metadata(combine="mean", inner=3, offset_dtype="int64"),
        LowRankHashes(signs=True),
        LowRankHashes(combine="product", narrowed=True),
        LowRankHashes(combine="mean", signs=True),
        LowRankHashes(combine="concat", widened=False, num_hashes=2),
        FrequentRows(),
    ],
    ids=method_id,
)
def test_recipes_of_other_packages_are_read_bit_for_bit(method: Method, tmp_path: Path) -> None:
    """Their files need nothing of theirs to be looked up."""
    path = tmp_path / "tables.safetensors"
    for precision in ("fp32", "bf16", "int4"):
        configs = [CONFIGS[0], CONFIGS[2]]
        counts = {config.name: COUNTS[config.name] for config in configs}
        tables = EmbeddingTables(plan(configs, method, None, counts, precision=precision), std=0.3)
        tables.save(path)
        check(tables.eval().serve(), path)


@exact
@pytest.mark.parametrize("kind", ["hash", {"kind": "multi_hash", "signs": True}, "unified", "robe"])
def test_ids_without_a_vocabulary(kind: Any, tmp_path: Path) -> None:
    path, config = tmp_path / "tables.safetensors", TableConfig("query", None, 8)
    EmbeddingTables(plan([config], kind, 20_000, optimizer="adagrad"), std=0.3).save(path)
    ids = torch.tensor([0, 1, -1, 2**62, -(2**63), 2**63 - 1])
    wanted = EmbeddingTables.load(path)(ids[:, None])
    for reader in READERS:
        assert torch.equal(bits(reader(path).lookup("query", ids)), bits(wanted))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tables_that_were_cast_are_read_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "tables.safetensors"
    EmbeddingTables(plan(CONFIGS, "hash", "20%"), std=0.3).to(dtype).save(path)
    vectors = EmbeddingTables.load(path).to_dense("user").float()
    for reader in READERS:
        found = reader(path).lookup("user", torch.arange(300))
        assert torch.equal(bits(found), bits(vectors))


def test_the_numpy_reader_is_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    tables = EmbeddingTables(plan(CONFIGS, "compositional", "20%", precision="int4"), std=0.3)
    tables.save(tmp_path / "tables.safetensors")
    shutil.copy(numpy_reader.__file__, tmp_path / "reader.py")
    script = """
import sys
import numpy
import reader
assert not {"torch", "embtables", "safetensors"} & set(sys.modules)
tables = reader.NumpyTables("tables.safetensors")
numpy.save("vectors.npy", tables.lookup("user", numpy.arange(300)))
"""
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.append('.'){script}"], cwd=tmp_path)
    assert done.returncode == 0
    assert np.array_equal(np.load(tmp_path / "vectors.npy"), tables.serve().to_dense("user").numpy())


@pytest.mark.parametrize("reader", READERS)
def test_what_cannot_be_looked_up_is_one_sentence(reader: Any, tmp_path: Path) -> None:
    path = tmp_path / "tables.safetensors"
    EmbeddingTables(plan(CONFIGS[:3], "hash", "20%")).save(path)
    tables = reader(path)
    with pytest.raises(IndexError, match=r"id 300 is out of range: table 'user' has ids 0 … 299"):
        tables.lookup("user", [3, 300])
    with pytest.raises(KeyError, match="nonesuch"):
        tables.lookup("nonesuch", [3])
    assert tables.lookup("user", []).shape == (0, 16) and tables.pooled("city", [], [0]).shape == (0, 10)
    EmbeddingTables(plan(CONFIGS[:1], DeepHash(), "50%")).save(path)
    with pytest.raises(ValueError, match="table 'user' is looked up by its method's own code, which no file holds"):
        reader(path).lookup("user", [3])
    with pytest.raises(ValueError, match="hash.safetensors holds no .*: it was written before files said how"):
        reader(Path(__file__).parents[1] / "data" / "files-0.1.0" / "hash.safetensors")
    with pytest.raises(FileNotFoundError):
        reader(tmp_path / "missing")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="tables.safetensors holds no .* it was cut or damaged"):
        reader(path)
