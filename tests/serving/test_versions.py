"""Versions of tables in a folder, what changed between them, and many deltas in one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzzing
import pytest
import torch
from core_cases import all_methods, method_id, random_ids, shuffled_counts

from embtables import EmbeddingTables, TableConfig, plan
from embtables._util.files import PREFIX
from embtables._util.lock import locked
from embtables.cli.app import run as main
from embtables.serving import NumpyTables, Reader, Versions, compact
from embtables.serving.deltas import read_delta

TABLES = [TableConfig("user", 3000, 16, padding_idx=0), TableConfig("item", 900, 8, ["item", "history"])]
COUNTS = {"user": shuffled_counts(3000), "item": shuffled_counts(900)}
KILLS = int(os.environ.get("EMBTABLES_KILLS", "12"))


def tables_of(method: Any = "full", precision: str = "fp32", seed: int = 0, budget: Any = "20%") -> EmbeddingTables:
    budget = None if method == "full" or getattr(method, "kind", "") == "full" else budget
    return EmbeddingTables(plan(TABLES, method, budget, COUNTS, precision=precision), seed=seed, std=0.3)


def train(tables: EmbeddingTables, seed: int) -> None:
    loss = tables(random_ids(tables, 20, seed)).square().sum()
    if loss.requires_grad:
        loss.backward()


def test_a_reader_goes_on_to_what_is_published(tmp_path: Path) -> None:
    tables, versions = tables_of(), Versions(tmp_path / "tables")
    with pytest.raises(FileNotFoundError, match="tables holds no versions of tables: it has no CURRENT"):
        Reader(tmp_path / "tables", EmbeddingTables.load)
    assert versions.publish(tables.save) == 1
    reader, other = Reader(tmp_path / "tables", EmbeddingTables.load), Reader(tmp_path / "tables", NumpyTables)
    first = reader.tables
    before = tables.to_dense("user").clone()
    assert not reader.refresh() and reader.tables is first and reader.version == 1
    train(tables, 1)
    assert versions.publish(tables.save) == 2
    assert torch.equal(reader.tables.to_dense("user"), before)
    assert reader.refresh() and reader.version == 2 and other.refresh()
    assert torch.equal(reader.tables.to_dense("user"), tables.to_dense("user"))
    assert torch.equal(torch.from_numpy(other.tables.lookup("user", range(3000))), tables.to_dense("user"))
    assert torch.equal(first.to_dense("user"), before)  # who took the old one has it whole
    versions.use(1)
    assert reader.refresh() and reader.version == 1 and torch.equal(reader.tables.to_dense("user"), before)


def test_old_versions_stay_as_many_as_are_kept(tmp_path: Path) -> None:
    tables, versions = tables_of("hash"), Versions(tmp_path, keep=3)
    for number in range(1, 6):
        assert versions.publish(tables.save) == number
    assert versions.numbers() == [3, 4, 5] and versions.current() == 5
    versions.use(3)
    assert versions.numbers() == [3, 4, 5] and versions.current() == 3
    versions.publish(tables.save)
    assert versions.numbers() == [4, 5, 6] and versions.current() == 6
    Versions(tmp_path, keep=1).publish(tables.save)
    assert versions.numbers() == [7]
    assert sorted(os.listdir(tmp_path)) == ["000007.safetensors", "CURRENT"]
    for keep in (0, True, 1.5):
        with pytest.raises(ValueError, match="keep must be a number of versions of at least 1"):
            Versions(tmp_path, keep=keep)  # type: ignore[arg-type]


def test_what_is_no_whole_file_is_never_current(tmp_path: Path) -> None:
    tables, versions = tables_of("hash"), Versions(tmp_path / "tables")
    versions.publish(tables.save)

    def cut(path: Path) -> None:
        tables.save(path)
        path.write_bytes(path.read_bytes()[:-1])

    def damaged(path: Path) -> None:
        tables.save(path)
        path.write_bytes(path.read_bytes()[:-1] + b"\0")

    def failing(path: Path) -> None:
        tables.save(path)
        raise OSError("the disk is gone")

    old = Path(__file__).parents[1] / "data" / "files-0.1.0" / "hash.safetensors"
    for write, told in (
        (cut, "it was cut or damaged"),
        (damaged, "its contents do not match its checksum"),
        (failing, "the disk is gone"),
        (lambda path: shutil.copy(old, path), "written before files had checksums"),
        (lambda path: None, "tables"),
    ):
        with pytest.raises((ValueError, OSError), match=told):
            versions.publish(write)
        assert versions.current() == 1 and sorted(os.listdir(versions.folder)) == ["000001.safetensors", "CURRENT"]
    with locked(versions.folder), pytest.raises(ValueError, match="is in use by process"):
        versions.publish(tables.save)
    (versions.folder / "CURRENT").write_text("../../etc/passwd\n")
    with pytest.raises(ValueError, match="CURRENT is damaged: it names no version"):
        versions.current()
    (versions.folder / "CURRENT").write_text("000009.safetensors\n")
    with pytest.raises(FileNotFoundError, match="000009"):
        Reader(versions.folder, EmbeddingTables.load)


@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_a_base_and_deltas_are_the_full_file_bit_for_bit(method: Any, tmp_path: Path) -> None:
    precision = "int4" if method.kind != "banded" else "fp32"
    tables = tables_of(method, precision)
    source, copied, jumped = (Versions(tmp_path / name, keep=9) for name in ("source", "copy", "jumped"))
    source.publish(tables.save)
    for versions in (copied, jumped):
        versions.publish(lambda path: shutil.copy(source.path(1), path))
    deltas = []
    for number in range(2, 5):
        train(tables, number)
        source.publish(tables.save)
        deltas.append(tmp_path / f"{number}.delta")
        source.delta(number - 1, deltas[-1])
        assert copied.apply(deltas[-1]) == number == copied.current()
        assert copied.path(number).read_bytes() == source.path(number).read_bytes()
    whole = compact(deltas, tmp_path / "whole.delta")
    assert (whole.since, whole.to) == (1, 4)
    assert jumped.apply(tmp_path / "whole.delta") == 4
    assert jumped.path(4).read_bytes() == source.path(4).read_bytes()
    source.delta(1, tmp_path / "direct.delta")
    assert (tmp_path / "direct.delta").stat().st_size <= (tmp_path / "whole.delta").stat().st_size
    if method.kind == "full":  # of at most 60 users and 40 items a step
        assert (tmp_path / "4.delta").stat().st_size < 0.5 * source.path(4).stat().st_size


def test_a_delta_takes_the_bytes_of_the_rows_that_changed(tmp_path: Path) -> None:
    tables, versions = EmbeddingTables(plan([TableConfig("user", 100_000, 16)], "full")), Versions(tmp_path / "tables")
    versions.publish(tables.save)
    with torch.no_grad():
        tables.store.slab("user")[[5, 99_999, 70_000]] += 1
    versions.publish(tables.save)
    versions.delta(1, tmp_path / "delta")
    delta = read_delta(tmp_path / "delta")
    assert delta.tensors["weight_16/rows"].tolist() == [5, 70_000, 99_999] and set(delta.tensors) == {
        "header",
        "weight_16/rows",
        "weight_16/values",
    }
    assert (tmp_path / "delta").stat().st_size < 10_000
    versions.delta(2, tmp_path / "nothing")
    assert set(read_delta(tmp_path / "nothing").tensors) == {"header"}


def test_tables_of_another_plan(tmp_path: Path) -> None:
    """Tensors that come, go and change their shape between versions."""
    versions, copied = Versions(tmp_path / "tables", keep=9), Versions(tmp_path / "copy", keep=9)
    forms = [("full", "fp32"), ("hash", "int4"), ("pruned", "int8"), ("full", "fp32"), ("mixed_dimension", "fp32")]
    for number, (method, precision) in enumerate(forms, 1):
        versions.publish(tables_of(method, precision, seed=number).save)
    for number in range(2, 6):
        versions.use(number)
        versions.delta(number - 1, tmp_path / f"{number}.delta")
    compact([tmp_path / f"{n}.delta" for n in range(2, 6)], tmp_path / "whole.delta")
    copied.publish(lambda path: shutil.copy(versions.path(1), path))
    assert copied.apply(tmp_path / "whole.delta") == 5
    assert copied.path(5).read_bytes() == versions.path(5).read_bytes()


def test_deltas_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tables = tables_of("hash")
    source, other = Versions(tmp_path / "source", keep=9), Versions(tmp_path / "other", keep=9)
    for number in range(1, 5):
        train(tables, number)
        source.publish(tables.save)
        if number > 1:
            source.delta(number - 1, tmp_path / f"{number}.delta")
    with pytest.raises(ValueError, match="other has no version 1; the versions there: none"):
        other.apply(tmp_path / "2.delta")
    other.publish(tables_of("hash", seed=7).save)
    with pytest.raises(ValueError, match=r"2\.delta leads from version 1 to 2, and .*000001.* is another file"):
        other.apply(tmp_path / "2.delta")
    shutil.copy(source.path(1), other.path(1))
    other.publish(tables_of("hash", seed=8).save)
    with pytest.raises(ValueError, match=r"but .*000002.safetensors is another version of that number"):
        other.apply(tmp_path / "2.delta")
    with pytest.raises(ValueError, match=r"4\.delta leads from version 3 to 4, and the one before it .* 1 to 2: they"):
        compact([tmp_path / "2.delta", tmp_path / "4.delta"], tmp_path / "whole")
    with pytest.raises(ValueError, match="there is no delta"):
        compact([], tmp_path / "whole")
    with pytest.raises(ValueError, match=r"source has no version 17; the versions there: 1, 2, 3, 4"):
        source.delta(17, tmp_path / "delta")
    with pytest.raises(ValueError, match="000001.safetensors holds no delta that can be read"):
        other.apply(source.path(1))
    assert not (tmp_path / "whole").exists() and not (tmp_path / "delta").exists()


def test_damaged_deltas_are_refused_and_change_nothing(tmp_path: Path) -> None:
    tables, source = tables_of("hash"), Versions(tmp_path / "source", keep=9)
    source.publish(tables.save)
    base = source.path(1).read_bytes()
    train(tables, 1)
    source.publish(tables.save)
    delta = tmp_path / "d.safetensors"
    source.delta(1, delta)
    whole, meant, refused = delta.read_bytes(), source.path(2).read_bytes(), 0
    for number in range(60):
        fuzzing.damage(delta, whole, f"delta-{number}")
        folder = Versions(tmp_path / str(number))
        folder.publish(lambda path: path.write_bytes(base))
        try:
            found = folder.apply(delta)
            assert folder.path(found).read_bytes() == meant
        except ValueError as error:
            assert "\n" not in str(error) and "d.safetensors" in str(error)
            assert folder.current() == 1 and folder.path(1).read_bytes() == base
            refused += 1
        assert not [name for name in os.listdir(folder.folder) if name.startswith(PREFIX)]
    assert refused > 30


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables, file, folder = tables_of("hash"), tmp_path / "t.safetensors", tmp_path / "tables"
    copied = tmp_path / "copy"
    for number in range(1, 4):
        train(tables, number)
        tables.save(file)
        assert main(["versions", "publish", str(folder), str(file)]) == 0
        if number == 1:
            assert main(["versions", "publish", str(copied), str(file)]) == 0
        else:
            out = str(tmp_path / f"{number}.delta")
            assert main(["versions", "delta", str(folder), "--since", str(number - 1), "--out", out]) == 0
    assert main(["versions", "list", str(folder)]) == 0
    assert "2 " in (out := capsys.readouterr().out) and out.rstrip().endswith("bytes (current)")
    deltas = [str(tmp_path / f"{number}.delta") for number in (2, 3)]
    assert main(["versions", "compact", *deltas, "--out", str(tmp_path / "whole.delta")]) == 0
    assert main(["versions", "apply", str(copied), str(tmp_path / "whole.delta")]) == 0
    assert Versions(copied).path(3).read_bytes() == file.read_bytes()
    assert main(["versions", "use", str(copied), "1"]) == 0 and Versions(copied).current() == 1
    assert Versions(copied).numbers() == [1, 3]
    capsys.readouterr()
    assert main(["versions", "use", str(copied), "2"]) == 2
    assert "copy has no version 2; the versions there: 1, 3" in capsys.readouterr().err
    assert main(["versions", "publish", str(folder), str(tmp_path / "missing")]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_of_writers_while_others_read(tmp_path: Path) -> None:
    """Writers of versions, deltas and compactions are killed at random moments while four readers look up."""
    paths = os.pathsep.join(path for path in sys.path if path)
    script = Path(__file__).parent / "version_kills.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(KILLS)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
