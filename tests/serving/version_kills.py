"""Kills writers of versions while readers look up: ``python version_kills.py FOLDER KILLS``.

In version n every other vector is n, and the others are 0. A writer publishes the next version, brings a copy of the
folder there by a delta, and now and then a second copy by several deltas in one. It is killed at random moments of each
of these works, and the next one goes on from what it finds. Four readers follow the folders meanwhile: whatever they
look up is of the version that they have open, and versions rise.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embtables import EmbeddingTables, TableConfig, plan
from embtables._util.files import PREFIX, remove_leftovers
from embtables.serving import NumpyTables, Reader, Versions, compact

ROWS = {"user": 20_000, "item": 5000}
PLAN = plan([TableConfig(name, rows, 16) for name, rows in ROWS.items()], "full", optimizer=None)
FOLDERS = ("source", "copy", "jumps")
WORKS = ("publish", "delta", "apply", "compact")
# What the writer is at, for who kills it.
at_work = mmap.mmap(-1, 1)


def tables_of(version: int) -> EmbeddingTables:
    tables = EmbeddingTables(PLAN)
    with torch.no_grad():
        for _, slab in tables.store.named_slabs():
            slab[::2], slab[1::2] = version, 0
    return tables


def write_once(folder: Path) -> None:
    """The next version, and the copies brought as far as there are deltas."""
    source, copy, jumps = (Versions(folder / name, keep=50) for name in FOLDERS)
    number = max(source.numbers(), default=0) + 1
    tables = tables_of(number)
    at_work[0] = WORKS.index("publish")
    assert source.publish(tables.save) == number
    at_work[0] = WORKS.index("delta")
    step = delta(folder, source, copy.current())
    at_work[0] = WORKS.index("apply")
    copy.apply(step)
    chain, at = [], jumps.current()
    while ends := [int(path.stem.split("-")[1]) for path in folder.glob(f"{at}-*.delta")]:
        chain.append(folder / f"{at}-{max(ends)}.delta")
        at = max(ends)
    if len(chain) > 1:
        at_work[0] = WORKS.index("compact")
        compact(chain, folder / "chain.delta")
        jumps.apply(folder / "chain.delta")
    elif not chain:
        jumps.apply(delta(folder, source, jumps.current()))


def delta(folder: Path, source: Versions, since: int) -> Path:
    path = folder / f"{since}-{source.current()}.delta"
    source.delta(since, path)
    return path


def read(folder: Path, load: Callable[[Path], Any], seed: int, stop: Path) -> str:
    """What is wrong with the versions that are looked up until there is a file ``stop``; empty where nothing is."""
    generator, seen, lookups = random.Random(seed), [0], 0
    reader: Reader[Any] = Reader(folder, load)
    while not stop.exists():
        reader.refresh()
        if reader.version < seen[-1]:
            return f"version {reader.version} after {seen[-1]}"
        if reader.version > seen[-1]:
            seen.append(reader.version)
        tables = reader.tables
        for name, rows in ROWS.items():
            ids = torch.tensor([generator.randrange(rows) for _ in range(200)])
            if isinstance(tables, EmbeddingTables):
                found = tables.to_dense(name, slice(0, rows, 97)) if lookups % 50 == 0 else vectors(tables, name, ids)
                ids = torch.arange(0, rows, 97) if lookups % 50 == 0 else ids
            else:
                found = torch.from_numpy(tables.lookup(name, ids))
            wanted = torch.where(ids % 2 == 0, float(reader.version), 0.0)
            if not torch.equal(found, wanted[:, None].expand_as(found)):
                return f"version {reader.version} has {found.unique().tolist()}"
        lookups += 1
    return "" if len(seen) > 2 and lookups > 10 else f"only the versions {seen} in {lookups} lookups"


def vectors(tables: EmbeddingTables, name: str, ids: torch.Tensor) -> torch.Tensor:
    both = torch.stack([ids % rows for rows in ROWS.values()], 1)
    return tables.lookup(both)[name]


def forked(work: Callable[[], str]) -> int:
    """The number of a process that does the work, and says what it returned."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        if said := work():
            print(said, flush=True)
        else:
            code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path, kills: int) -> None:
    stop, generator = folder / "stop", random.Random(0)
    for name in FOLDERS:
        Versions(folder / name).publish(tables_of(1).save)
    began = time.monotonic()
    for _ in range(3):
        write_once(folder)
    seconds = (time.monotonic() - began) / 3
    follow = [("source", EmbeddingTables.load), ("source", NumpyTables), ("copy", EmbeddingTables.load)]
    loads: list[tuple[str, Callable[[Path], Any]]] = [*follow, ("jumps", NumpyTables)]
    readers = [
        forked(lambda name=name, load=load, seed=seed: read(folder / name, load, seed, stop))  # type: ignore[misc]
        for seed, (name, load) in enumerate(loads)
    ]

    killed: Counter[int] = Counter()

    def write() -> str:
        while True:
            write_once(folder)

    for number in range(kills):
        at_work[0] = len(WORKS)
        writer = forked(write)
        while at_work[0] != number % len(WORKS):
            time.sleep(0.0002)
        # A work takes less than that on a quiet machine.
        time.sleep(generator.random() * seconds / 3)
        killed[at_work[0]] += 1
        os.kill(writer, signal.SIGKILL)
        ended = os.waitpid(writer, 0)[1]
        assert os.WIFSIGNALED(ended), f"a writer ended by itself: {ended}"
        for name in FOLDERS:
            versions = Versions(folder / name)
            tables = EmbeddingTables.load(versions.path(versions.current()), verify=True)
            assert tables.store.slab("user")[0, 0] == versions.current()
    for _ in range(3):
        write_once(folder)
    time.sleep(5 * seconds)  # for the readers
    stop.touch()
    codes = [os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) for reader in readers]
    assert codes == [0] * 4, codes
    source, copy, jumps = (Versions(folder / name) for name in FOLDERS)
    assert copy.current() == source.current()
    for versions in (copy, jumps):
        number = versions.current()
        assert versions.path(number).read_bytes() == source.path(number).read_bytes()
    remove_leftovers(folder)
    left = [path for path in folder.rglob("*") if path.name.startswith(PREFIX)]
    assert not left, left
    met = ", ".join(f"{killed[i]} in {work}" for i, work in enumerate(WORKS))
    print(f"{kills} kills ({met}), {source.current()} versions")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
