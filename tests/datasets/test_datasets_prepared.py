"""The prepared format: splits, vocabulary, writing whole or not at all, batches."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import multiprocessing
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embtables._util.files import sealed, unsealed
from embtables.datasets import PreparedDataset, Synthetic, prepare_synthetic
from embtables.datasets import prepared as prepared_module
from embtables.datasets import writing as writing_module
from embtables.datasets.splits import leave_last_out, random_split, row_uniforms, time_split
from embtables.datasets.vocabulary import MISSING, KeyCounter, Vocabulary
from embtables.datasets.writing import Contents, Writer, prepare

TOY = Synthetic(rows=3000, cardinalities=(200, 30), num_dense=2, seed=3)


def number_rows(writer: Writer) -> None:
    """1,000 training rows whose every value tells the row's number, 10 + 10 others."""
    vocabulary = Vocabulary(np.arange(2000), np.ones(2000, np.int64))
    writer.declare(Contents({"a": vocabulary, "b": vocabulary}, ["x"], group_feature="a"))
    for split, size in (("train", 1000), ("valid", 10), ("test", 10)):
        rows = np.arange(size)
        frame = {"label": rows % 2, "x": rows / 4, "a": rows, "b": rows + 500, "_group": rows + 2**40}
        for start in range(0, size, 77):
            writer.write(split, pl.DataFrame(frame).slice(start, 77))
    writer.rows_read = 1020


@pytest.fixture
def numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedDataset:
    """Shards of 128 rows."""
    monkeypatch.setattr(writing_module, "ROWS_PER_SHARD", 128)
    return prepare(tmp_path / "numbered", "test", {}, [], number_rows)


# --- splits


def splitmix(row: int, seed: int) -> float:
    z = ((row + 1) * 0x9E3779B97F4A7C15 + seed * 0xD1342543DE82EF95) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return ((z ^ (z >> 31)) >> 11) / 2**53


def test_row_uniforms_follow_the_scalar_formula_and_are_uniform() -> None:
    rows = np.arange(200_000)
    drawn = row_uniforms(rows, 5)
    assert drawn[:50].tolist() == [splitmix(row, 5) for row in range(50)]
    assert np.array_equal(row_uniforms(rows[1234:1300], 5), drawn[1234:1300])  # whatever the chunk
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 50  # chi-square, 19 degrees: p < 1e-4
    assert abs(np.corrcoef(drawn, row_uniforms(rows, 6))[0, 1]) < 0.01


def test_random_split_has_the_shares() -> None:
    split = random_split(np.arange(100_000), 1, (0.7, 0.2, 0.1))
    assert np.allclose(np.bincount(split) / 100_000, [0.7, 0.2, 0.1], atol=0.006)
    with pytest.raises(ValueError, match="add up to 1"):
        random_split(np.arange(3), 1, (0.8, 0.1, 0.2))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=60))
def test_leave_last_out_and_time_split_against_loops(log: list[tuple[int, int]]) -> None:
    users, times = (np.array(column) for column in zip(*log))
    expected = [0] * len(log)
    for user in set(users.tolist()):
        mine = sorted((time, row) for row, (u, time) in enumerate(log) if u == user)
        if len(mine) >= 3:
            expected[mine[-1][1]], expected[mine[-2][1]] = 2, 1
    assert leave_last_out(users, times).tolist() == expected

    split = time_split(times, (0.6, 0.2, 0.2))
    for row, time in enumerate(times):
        assert all(split[other] >= split[row] for other in np.flatnonzero(times >= time))
        assert all(split[other] == split[row] for other in np.flatnonzero(times == time))


# --- vocabulary


@given(
    st.lists(st.one_of(st.none(), st.integers(-5, 10), st.integers(2**40, 2**40 + 9)), max_size=80), st.integers(1, 3)
)
def test_vocabulary_against_a_counter(values: list[int | None], min_count: int) -> None:
    keys = np.array([MISSING if value is None else value for value in values], np.int64)
    counter = KeyCounter()
    for start in range(0, len(keys), 7):
        counter.add(keys[start : start + 7])
    vocabulary = counter.vocabulary(min_count)
    counts = Counter(value for value in values if value is not None)
    kept = sorted((value for value in counts if counts[value] >= min_count), key=lambda value: (-counts[value], value))
    ids = {value: number for number, value in enumerate(kept, 2)}
    rare = sum(counts[value] for value in counts if counts[value] < min_count)
    assert vocabulary.counts.tolist() == [values.count(None), rare, *(counts[value] for value in kept)]
    probes = [*values, 77, 2**40 + 10, -(2**50), None]
    probe_keys = np.array([MISSING if value is None else value for value in probes], np.int64)
    assert vocabulary.ids(probe_keys).tolist() == [0 if value is None else ids.get(value, 1) for value in probes]
    assert vocabulary.ids(probe_keys).dtype == np.int32


# --- batches


def row_numbers(data: PreparedDataset, batch_size: int = 64, **options: int) -> list[list[int]]:
    found = []
    for batch in data.batches("train", batch_size, **options):
        rows = batch.ids[:, 0]
        assert batch.labels.dtype == torch.float32 and torch.equal(batch.labels, (rows % 2).float())
        assert batch.dense.dtype == torch.float32 and torch.equal(batch.dense, (rows / 4)[:, None].float())
        assert batch.ids.dtype == torch.int64 and torch.equal(batch.ids[:, 1], rows + 500)
        assert batch.groups is not None and torch.equal(batch.groups, rows + 2**40)
        found.append(rows.tolist())
    return found


@pytest.mark.parametrize("window", [2**31, 24 * 300, 24 * 128, 24])  # all, two shards, a shard, less than a shard
def test_batches(numbered: PreparedDataset, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(prepared_module, "WINDOW_BYTES", window)
    assert len(numbered.manifest["splits"]["train"]["shards"]) == 8
    in_order = row_numbers(numbered)
    assert sum(in_order, []) == list(range(1000))
    assert [len(batch) for batch in in_order] == [64] * 15 + [40]
    assert row_numbers(numbered, drop_last=True) == in_order[:-1]

    shuffled = row_numbers(numbered, seed=1, epoch=0)
    assert [len(batch) for batch in shuffled] == [64] * 15 + [40]
    assert sorted(sum(shuffled, [])) == list(range(1000))
    assert row_numbers(PreparedDataset(numbered.path), seed=1, epoch=0) == shuffled
    others = [row_numbers(numbered, seed=1, epoch=1), row_numbers(numbered, seed=2, epoch=0), in_order]
    assert all(other != shuffled for other in others)
    if window == 2**31:  # rows of the whole split meet in a batch
        assert min(max(batch) - min(batch) for batch in shuffled) > 600

    for skip in range(18):
        assert row_numbers(numbered, skip=skip) == in_order[skip:]
        assert row_numbers(numbered, seed=1, epoch=0, skip=skip) == shuffled[skip:]
    for size in (1, 300, 1000, 5000):
        assert sum(row_numbers(numbered, size, seed=4), []) != list(range(1000))
        assert sum(row_numbers(numbered, size, seed=4, skip=1), []) == sum(row_numbers(numbered, size, seed=4)[1:], [])


def test_skipping_reads_no_shard_that_is_not_needed(numbered: PreparedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_module, "WINDOW_BYTES", 24)
    read: list[str] = []
    original = PreparedDataset._read

    def spy(self: PreparedDataset, file: prepared_module.File) -> bytes:
        read.append(file.file)
        return original(self, file)

    monkeypatch.setattr(PreparedDataset, "_read", spy)
    assert len(list(numbered.batches("train", 128, skip=6))) == 2
    assert read == ["train/00006.parquet", "train/00007.parquet"]


def test_a_batch_is_the_callers_to_change(numbered: PreparedDataset) -> None:
    def tensors(seed: int | None) -> list[torch.Tensor]:
        found = []
        for batch in numbered.batches("train", 100, seed=seed):
            assert batch.groups is not None
            found += [batch.labels, batch.dense, batch.ids, batch.groups]
        return found

    for seed in (None, 1):
        before = tensors(seed)
        copies = [tensor.clone() for tensor in before]
        for tensor in before:
            tensor.fill_(-7)
        assert all(torch.equal(a, b) for a, b in zip(copies, tensors(seed)))


def test_bad_arguments(numbered: PreparedDataset) -> None:
    with pytest.raises(ValueError, match="batch_size 0"):
        numbered.batches("train", 0)
    with pytest.raises(ValueError, match="skip -1"):
        numbered.batches("train", 1, skip=-1)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        numbered.batches("dev", 1)


# --- damage


def test_frequencies_and_table_configs(numbered: PreparedDataset) -> None:
    assert numbered.num_embeddings == {"a": 2002, "b": 2002}
    assert numbered.frequencies["b"].tolist() == [0, 0] + [1] * 2000
    configs = numbered.table_configs(8)
    assert [(c.name, c.num_embeddings, c.embedding_dim, list(c.feature_names)) for c in configs] == [
        ("a", 2002, 8, ["a"]),
        ("b", 2002, 8, ["b"]),
    ]


def test_a_damaged_shard_is_named(numbered: PreparedDataset) -> None:
    numbered.verify()
    shard = numbered.path / "train" / "00003.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="00003.parquet.*checksum"):
        numbered.verify()
    with pytest.raises(ValueError, match="00003.parquet.*checksum"):
        list(PreparedDataset(numbered.path).batches("train", 10))
    shard.write_bytes(content[:-9])
    with pytest.raises(ValueError, match="00003.parquet: .* bytes where manifest.json says"):
        PreparedDataset(numbered.path)
    shard.unlink()
    with pytest.raises(ValueError, match="00003.parquet: the shard is missing"):
        PreparedDataset(numbered.path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "other"}, "field 'format'"),
        ({"version": 99}, "version 99"),
        ({"rows_read": "many"}, "field 'rows_read'"),
        ({"features": [{"name": "a"}]}, "field 'features.0.num_embeddings'"),
        ({"dense_features": ["a"]}, "two features are named 'a'"),
        ({"slice_feature": "z"}, "field 'slice_feature': 'z' is none of the features a, b"),
        ({"splits": {}}, "'train' is missing"),
    ],
)
def test_a_wrong_manifest_names_file_and_field(numbered: PreparedDataset, change: dict, sentence: str) -> None:
    path = numbered.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="manifest.json") as error:
        PreparedDataset(numbered.path)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        (pl.Series("a", [0] * 127 + [2002], dtype=pl.Int32), "column 'a' holds 2002 in row 128, outside 0 … 2001"),
        (pl.Series("a", [-1] * 128, dtype=pl.Int32), "column 'a' holds -1 in row 1,"),
        (pl.Series("a", [2**40] * 128), "column 'a' holds 1099511627776 in row 1,"),
        (pl.Series("a", [3, None] * 64, dtype=pl.Int32), "column 'a' is empty in some rows"),
        (pl.Series("a", ["3"] * 128), "column 'a' is of type"),
        (pl.Series("label", [1.0, 2.0] * 64, dtype=pl.Float32), "column 'label' holds 2.0 in row 2, outside 0 or 1"),
        (pl.Series("label", [float("nan")] * 128, dtype=pl.Float32), "column 'label' holds nan in row 1,"),
        (None, "no column 'b'"),
    ],
)
def test_values_that_another_writer_got_wrong(
    numbered: PreparedDataset, column: pl.Series | None, sentence: str
) -> None:
    shard, path = numbered.path / "train" / "00003.parquet", numbered.path / "manifest.json"
    rows = pl.read_parquet(shard)
    (rows.drop("b") if column is None else rows.with_columns(column)).write_parquet(shard)
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][3] |= {
        "bytes": shard.stat().st_size,
        "sha256": hashlib.sha256(shard.read_bytes()).hexdigest(),
    }
    path.write_text(json.dumps(sealed(unsealed(manifest))))
    with pytest.raises(ValueError, match="00003.parquet: ") as error:
        list(PreparedDataset(numbered.path).batches("train", 10))
    assert sentence in str(error.value)


def test_not_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prepared data set here"):
        PreparedDataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        PreparedDataset(tmp_path)


# --- whole or not at all


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_run_reuses_and_another_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "toy"
    prepare_synthetic(out, TOY)
    before = files(out)
    with monkeypatch.context() as context:
        context.setattr(writing_module, "Writer", None)  # whoever writes now, fails
        again = prepare_synthetic(out, TOY, progress=True)
        assert "reused" in capsys.readouterr().err
        assert again.num_rows("train") > 0
        with pytest.raises(ValueError, match="was prepared with seed = 3, not 4: choose another OUT"):
            prepare_synthetic(out, Synthetic(rows=3000, cardinalities=(200, 30), num_dense=2, seed=4))
        with pytest.raises(ValueError, match="of kind 'synthetic', not 'other'"):
            prepare(out, "other", {}, [], lambda writer: None)
    assert files(out) == before

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a prepared data set"):
        prepare_synthetic(tmp_path / "home", TOY)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert files(prepare_synthetic(tmp_path / "empty", TOY).path).keys() == before.keys()


def test_a_changed_input_is_refused_and_a_touched_one_reused(tmp_path: Path) -> None:
    source = tmp_path / "input"
    source.write_text("one")
    prepare(tmp_path / "out", "test", {}, [source], number_rows)
    source.write_text("one")  # another time, the same content
    prepare(tmp_path / "out", "test", {}, [source], number_rows)
    source.write_text("two")
    with pytest.raises(ValueError, match="another input or an older version"):
        prepare(tmp_path / "out", "test", {}, [source], number_rows)
    with pytest.raises(ValueError, match="nothing: no such file"):
        prepare(tmp_path / "out", "test", {}, [tmp_path / "nothing"], number_rows)


@pytest.mark.parametrize("failing_file", [1, 3, 5])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_file: int) -> None:
    numbers = itertools.count(1)  # files are written by several threads
    original = writing_module._write_parquet

    def full(rows: pl.DataFrame, path: Path) -> None:
        number = next(numbers)
        original(rows, path)
        if number == failing_file:
            raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")

    monkeypatch.setattr(writing_module, "_write_parquet", full)
    with pytest.raises(OSError, match="toy: No space left on device; nothing was written"):
        prepare_synthetic(tmp_path / "toy", TOY)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_interruption_leaves_nothing_and_leftovers_of_a_kill_are_cleared(tmp_path: Path) -> None:
    def interrupted(writer: Writer) -> None:
        number_rows(writer)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", "test", {}, [], interrupted)
    assert list(tmp_path.iterdir()) == []
    left = tmp_path / ".embtables-1-0.tmp" / "content" / "train"
    left.mkdir(parents=True)
    (left / "00000.parquet").write_text("half")
    prepare(tmp_path / "out", "test", {}, [], number_rows).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    config = Synthetic(rows=400_000, cardinalities=(1000, 100))
    processes = [context.Process(target=prepare_synthetic, args=(tmp_path / "toy", config)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    PreparedDataset(tmp_path / "toy").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_an_empty_split_and_a_reserved_column_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split 'valid' would be empty"):
        prepare_synthetic(tmp_path / "tiny", Synthetic(rows=1, cardinalities=(3,), shares=(0.999, 0.0005, 0.0005)))
    assert not (tmp_path / "tiny").exists()
    vocabulary = Vocabulary(np.arange(3), np.ones(3, np.int64))
    with pytest.raises(ValueError, match="column 'label' would occur twice"):
        Contents({"label": vocabulary}).check()
    with pytest.raises(ValueError, match="column 'past' would occur twice: label, _group, past are reserved"):
        Contents({"a": vocabulary, "past": vocabulary}, histories={"past": "a"}).check()


def test_the_same_input_and_options_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (prepare_synthetic(tmp_path / folder / "toy", TOY).path for folder in "ab")
    assert files(first) == files(second)
