"""Files that are mapped into memory: opened without being read, shared by processes, written by none."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import fuzzing
import pytest
import torch
from core_cases import random_ids

from embtables import EmbeddingTables, TableConfig, plan
from embtables.serving import numpy_reader
from embtables.serving.numpy_reader import NumpyTables

TABLES = [TableConfig("user", 60_000, 16), TableConfig("item", 3000, 8, ["item", "history"])]
LINUX = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")


def saved(folder: Path, method: Any = "full", seed: int = 0, **options: Any) -> Path:
    path = folder / "tables.safetensors"
    EmbeddingTables(plan(TABLES, method, None if method == "full" else "20%", **options), seed=seed).save(path)
    return path


def pages(path: Path, process: int | str = "self") -> Counter[str]:
    """The kibibytes that a process has of a file in memory, by kind, as the system counts them."""
    found: Counter[str] = Counter()
    inside = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.endswith(" kB"):
            name, _, size = line.partition(":")
            found[name] += int(size.split()[0])
    return found


@LINUX
def test_opening_reads_nothing_and_a_lookup_its_rows_alone(tmp_path: Path) -> None:
    path = saved(tmp_path)
    tables = EmbeddingTables.load(path)
    assert pages(path)["Size"] * 1024 >= path.stat().st_size > 3_000_000
    assert pages(path)["Rss"] <= 256  # the system maps the pages around the header's along with it
    tables(torch.zeros(1, 3, dtype=torch.int64))
    assert pages(path)["Rss"] <= 1024 and pages(path)["Anonymous"] == 0
    tables.to_dense("user")
    assert pages(path)["Rss"] >= 60_000 * 16 * 4 // 1024


SHARING = """
import sys
import numpy
sys.path.append(sys.argv[1])
from numpy_reader import NumpyTables
NumpyTables(sys.argv[2]).lookup("user", numpy.arange(60_000))
tables = NumpyTables(sys.argv[2])
tables.lookup("user", numpy.arange(60_000))
print("ready", flush=True)
sys.stdin.readline()
"""


@LINUX
def test_processes_share_what_they_read(tmp_path: Path) -> None:
    path = saved(tmp_path)
    tables = EmbeddingTables.load(path)
    tables.to_dense("user")
    alone = pages(path)
    assert alone["Pss"] >= alone["Rss"] - 64
    command = [sys.executable, "-c", SHARING, str(Path(numpy_reader.__file__).parent), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for found in (pages(path), pages(path, process.pid)):
            assert found["Rss"] >= 60_000 * 16 * 4 // 1024
            assert found["Pss"] <= 0.55 * found["Rss"] and found["Anonymous"] == 0
        process.communicate("\n")


@pytest.mark.parametrize("method", ["full", {"kind": "hash", "precision": "int4"}, "pruned", "mixed_dimension"])
def test_what_is_written_into_tables_never_reaches_the_file(method: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, method)
    whole = path.read_bytes()
    tables, others = EmbeddingTables.load(path), EmbeddingTables.load(path)
    ids = random_ids(tables, 40)
    before = others(ids)
    for tensor in tables.store.stored().values():
        tensor.zero_()
    assert not tables(ids).any() and torch.equal(others(ids), before)
    assert path.read_bytes() == whole
    for cast in (others.half(), others.double(), EmbeddingTables.load(path).to("cpu")):
        assert cast(ids).shape == before.shape
    assert path.read_bytes() == whole
    with pytest.raises(ValueError, match="read-only"):
        next(iter(numpy_reader.open_file(path).arrays.values()))[...] = 0


def test_loaded_tables_are_not_trained(tmp_path: Path) -> None:
    tables = EmbeddingTables.load(saved(tmp_path)).train()
    before = tables.to_dense("user")
    vectors = tables(random_ids(tables, 40))
    assert not vectors.requires_grad and list(tables.parameters()) == []
    with pytest.raises(ValueError, match="served tables are not trained"):
        tables.fake_quantize()
    assert torch.equal(tables.to_dense("user"), before)


def test_a_file_that_is_replaced_stays_what_it_was_for_those_that_have_it_open(tmp_path: Path) -> None:
    path = saved(tmp_path, seed=1)
    tables, read = EmbeddingTables.load(path), NumpyTables(path)
    ids = torch.arange(3000)
    before = tables.to_dense("item")
    saved(tmp_path, seed=2)
    assert torch.equal(tables.to_dense("item"), before)
    assert torch.equal(torch.from_numpy(read.lookup("item", ids)), before)
    assert not torch.equal(EmbeddingTables.load(path).to_dense("item"), before)
    path.unlink()
    assert torch.equal(tables.to_dense("item"), before)


def test_a_damaged_weight_is_found_where_it_is_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[-1000] ^= 1
    path.write_bytes(whole)
    assert EmbeddingTables.load(path).plan.tables[0].name == "user"
    with pytest.raises(ValueError, match="tables.safetensors holds no .*: its contents do not match its checksum"):
        EmbeddingTables.load(path, verify=True)


@pytest.mark.parametrize("method", ["hash", "pruned", "mixed_dimension", {"kind": "unified", "precision": "int4"}])
def test_damage_of_any_kind_is_a_sentence_or_wrong_vectors(method: Any, tmp_path: Path) -> None:
    """Without ``verify``: nothing worse comes of it, whatever the readers."""
    tables = [TableConfig("a", 60, 8), TableConfig("b", 30, 4, ["b", "c"])]
    path = tmp_path / "t.safetensors"
    EmbeddingTables(plan(tables, method, "40%")).save(path)
    whole, refused, accepted = path.read_bytes(), 0, 0
    for number in range(60):
        fuzzing.damage(path, whole, f"mapped-{number}")
        for load in (EmbeddingTables.load, NumpyTables):
            try:
                found = load(path)
            except ValueError as error:
                assert path.name in str(error) and "\n" not in str(error)
                refused += 1
                continue
            try:
                if isinstance(found, EmbeddingTables):
                    found(torch.zeros(3, len(found.feature_names), dtype=torch.int64))
                else:
                    found.lookup("a", [0, 1])
                accepted += 1
            except (IndexError, KeyError, TypeError, ValueError):
                pass
    assert refused > 30 and accepted > 5


def test_headers_of_strangers(tmp_path: Path) -> None:
    path = saved(tmp_path, "hash")
    whole, random_bytes = path.read_bytes(), random.Random(0).randbytes(1000)
    for damaged, told in (
        (b"", "its header is damaged or cut"),
        (whole[:100], "its header is damaged or cut"),
        (random_bytes, "its header is damaged or cut"),
        ((2).to_bytes(8, "little") + b"{}", "it holds no plan"),
        ((2).to_bytes(8, "little") + b"[]", "its header is damaged"),
        ((30_000).to_bytes(8, "little") + b"[" * 30_000, "its header is damaged"),
        (whole[:-1], "it was cut or damaged"),
        (whole + b"\0", "it was cut or damaged"),
        (whole.replace(b'"F32"', b'"F31"', 1), "of the type 'F31', which no tables have"),
        (whole.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1), "should be"),
    ):
        path.write_bytes(damaged)
        for load in (EmbeddingTables.load, NumpyTables):
            with pytest.raises(ValueError, match=f"tables.safetensors holds no .*: .*{told}"):
                load(path)
