"""Work ahead of its use: the same items, errors in their place, and no thread that outlives its iterator."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

import polars as pl
import pytest
import torch

import embtables.datasets.writing as writing_module
from embtables._util.files import sealed, unsealed
from embtables.datasets import PreparedDataset, Synthetic, prepare_synthetic
from embtables.datasets import prepared as prepared_module
from embtables.datasets.batch import Rows
from embtables.datasets.prefetch import read_ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Numbers:
    """0, 1, …, made where asked for; `fails_at` raises."""

    def __init__(self, fails_at: int = 10**9) -> None:
        self.made: list[int] = []
        self.makers: set[str] = set()
        self.closed = False
        self.fails_at = fails_at

    def __call__(self, count: int = 10**9) -> Generator[int, None, None]:
        try:
            for number in range(count):
                self.makers.add(threading.current_thread().name)
                if number == self.fails_at:
                    raise ValueError(f"part {number} is damaged")
                self.made.append(number)
                yield number
        finally:
            self.closed = True


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_the_same_items_made_in_one_other_thread(depth: int, count: int) -> None:
    numbers = Numbers()
    assert list(read_ahead(numbers(count), depth)) == list(range(count))
    assert numbers.closed and not threads()
    assert threading.current_thread().name not in numbers.makers and len(numbers.makers) <= 1


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_items_wait(depth: int) -> None:
    numbers = Numbers()
    items = read_ahead(numbers(), depth)
    for used in range(5):
        assert next(items) == used
        wait_for(partial(lambda made: len(numbers.made) >= made, used + 1 + depth))
        time.sleep(0.01)
        assert len(numbers.made) == used + 1 + depth
    items.close()


def test_an_error_comes_in_its_place_and_ends_the_thread() -> None:
    numbers = Numbers(fails_at=3)
    items = read_ahead(numbers(), 5)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="part 3 is damaged"):
        next(items)
    assert numbers.closed and not threads()
    assert next(items, None) is None


@pytest.mark.parametrize("how", ["close", "drop", "raise"])
def test_the_thread_ends_with_the_iterator(how: str) -> None:
    numbers = Numbers()
    source = numbers()
    items = read_ahead(source, 2)
    assert next(items) == 0 and threads()
    if how == "close":
        items.close()
    elif how == "drop":
        del items
        gc.collect()
    else:
        with pytest.raises(KeyboardInterrupt):
            items.throw(KeyboardInterrupt)
    assert numbers.closed and not threads()


def test_an_iterator_that_is_never_used_starts_no_thread() -> None:
    read_ahead(Numbers()())
    assert not threads()


# --- batches


@pytest.fixture(params=[True, False], ids=["ahead", "in turn"])
def spare_core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(prepared_module, "_has_spare_core", lambda: request.param)
    return request.param


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedDataset:
    """Ten shards of 100 training rows."""
    monkeypatch.setattr(writing_module, "ROWS_PER_SHARD", 100)
    toy = Synthetic(rows=1250, cardinalities=(50, 20), num_dense=2, shares=(0.8, 0.1, 0.1))
    found = prepare_synthetic(tmp_path / "toy", toy)
    monkeypatch.setattr(prepared_module, "WINDOW_BYTES", 1)  # a window is a shard
    return found


def test_batches_are_the_same_made_ahead_or_not(data: PreparedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({}, {"seed": 3}, {"seed": 3, "skip": 4}, {"seed": 3, "epoch": 1, "drop_last": True}):
        found = []
        for spare in (True, False):
            monkeypatch.setattr(prepared_module, "_has_spare_core", partial(bool, spare))
            found.append(list(data.batches("train", 64, **options)))  # type: ignore[arg-type]
        assert len(found[0]) == len(found[1]) > 10
        for ahead, in_turn in zip(*found):
            assert all(torch.equal(a, b) for a, b in zip(ahead[:3], in_turn[:3]))


def damage(data: PreparedDataset, number: int) -> None:
    """Another label, with a checksum that fits."""
    split = data.manifest["splits"]["train"]["shards"][number]
    shard, manifest = data.path / split["file"], data.path / "manifest.json"
    rows = pl.read_parquet(shard)
    rows.with_columns(pl.lit(7.0, pl.Float32).alias("label")).write_parquet(shard)
    content = json.loads(manifest.read_text())
    content["splits"]["train"]["shards"][number] |= {
        "bytes": shard.stat().st_size,
        "sha256": hashlib.sha256(shard.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(sealed(unsealed(content))))


def test_a_damaged_shard_is_told_where_its_rows_would_come(data: PreparedDataset, spare_core: bool) -> None:
    damage(data, 6)
    batches = PreparedDataset(data.path).batches("train", 50)
    assert sum(len(next(batches).labels) for _ in range(12)) == 600
    with pytest.raises(ValueError, match="00006.parquet: column 'label' holds 7.0 in row 1"):
        next(batches)
    assert not threads()


def test_an_error_while_batches_are_made_ends_all_threads(
    data: PreparedDataset, spare_core: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = data.batches("train", 30, seed=1)
    next(batches)
    monkeypatch.setattr(Rows, "take", lambda self, rows: 1 // 0)
    with pytest.raises(ZeroDivisionError) as error:  # whose traceback holds on to everything
        list(batches)
    assert error is not None and not threads()


@pytest.mark.parametrize("how", ["close", "drop"])
def test_training_that_stops_early_leaves_no_thread(data: PreparedDataset, spare_core: bool, how: str) -> None:
    batches = data.batches("train", 30, seed=1)
    next(batches), next(batches)
    assert threads()
    if how == "close":
        batches.close()  # type: ignore[attr-defined]
    del batches
    gc.collect()
    assert not threads()


def test_two_windows_are_in_memory_and_no_more(
    data: PreparedDataset, spare_core: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[weakref.ref] = []
    original = PreparedDataset._rows

    def spy(self: PreparedDataset, split: str, window: list[prepared_module.Shard]) -> Rows:
        gc.collect()
        assert sum(reference() is not None for reference in windows) <= 1
        rows = original(self, split, window)
        windows.append(weakref.ref(rows.ids))
        return rows

    monkeypatch.setattr(PreparedDataset, "_rows", spy)
    for _ in data.batches("train", 70, seed=1):
        time.sleep(0.005)
    assert len(windows) > 9


INTERRUPTED = """
import signal, sys, time
from embtables.datasets import PreparedDataset, prepared
prepared.WINDOW_BYTES, prepared._has_spare_core = 1, lambda: True
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background begins without it
try:
    for batch in PreparedDataset(sys.argv[1]).batches("train", 10):
        print("batch", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_control_c_ends_the_process(data: PreparedDataset) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, data.path], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stdout is not None
        lines: Iterator[str] = iter(process.stdout)
        assert next(lines) == "batch\n"
        process.send_signal(signal.SIGINT)
        assert next(lines) == "interrupted\n"
        assert process.wait(60) == 0
