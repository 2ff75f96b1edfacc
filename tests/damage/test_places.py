"""Where outputs go: through links, under long names, and without anything that stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import embtables
from embtables import EmbeddingTables, TableConfig, plan
from embtables._util import files
from embtables._util.files import PREFIX, followed, remove_leftovers, replacing, replacing_folder, write_text
from embtables._util.lock import locked, only_one
from embtables.cli.app import run as main
from embtables.training import load_served

LONG = "x" * 250
QUICK = ["--model", "mlp", "--epochs", "1", "--embedding-dim", "4", "--quiet"]


def tables() -> EmbeddingTables:
    return EmbeddingTables(plan([TableConfig("a", 20, 4)], "full"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_save_goes_through_links(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "link"
    link.symlink_to("far/tables.safetensors")
    for _ in range(2):  # the file is not there yet, and then it is
        tables().save(link)
        assert link.is_symlink() and names(tmp_path / "far") == ["tables.safetensors"]
    assert EmbeddingTables.load(link).plan.tables[0].name == "a"
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pytest.raises(OSError, match="round"):
        followed(tmp_path / "round")


@pytest.mark.parametrize("name", [LONG, "link"])
def test_commands_write_to_links_and_long_names(name: str, tmp_path: Path) -> None:
    places = [tmp_path / place for place in ("data", "run", "export", "tables")]
    for place in places:
        place.mkdir()
        if name == "link":
            (place / name).symlink_to(place / "target")
    data, run, export, saved = (place / name for place in places)
    made = ["prepare", "synthetic", "-", str(data), "--rows", "2000", "--cardinalities", "30,20"]
    assert main(made) == 0 == main(made)
    trained = ["train", str(data), "--out", str(run), *QUICK]
    assert main(trained) == 0 == main(trained)
    assert main(["export", str(run), str(export)]) == 0 == main(["export", str(run), str(export), "--overwrite"])
    tables().save(saved)
    assert EmbeddingTables.load(saved).plan.tables[0].name == "a" and load_served(export)
    kept = ["link", "target"] if name == "link" else [name]
    assert [names(place) for place in places] == [kept] * 4


# The files and locks alone: the package itself would take seconds to import PyTorch.
ALONE = f"""
import sys, types
sys.modules["embtables"] = types.ModuleType("embtables")
sys.modules["embtables"].__path__ = {list(embtables.__path__)!r}
"""

STOPPED = """
import os, sys
from embtables._util import files
def stop(*names): os.write(1, b"here"); os.kill(os.getpid(), 19)
files.os.replace = stop
with files.replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
"""


def test_leftovers_go_when_their_process_has_gone(tmp_path: Path) -> None:
    """What a living process writes stays, whoever comes by; what a dead one left goes with the next write."""
    process = subprocess.Popen([sys.executable, "-c", ALONE + STOPPED, str(tmp_path / "a")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read(4) == b"here"
    (left,) = names(tmp_path)
    assert left.startswith(PREFIX)
    write_text(tmp_path / "b", "whole")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [left, "b"]
    process.kill()
    process.wait()
    process.stdout.close()
    write_text(tmp_path / "c", "whole")
    assert names(tmp_path) == ["b", "c"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_folder_is_back_where_replacing_it_was_interrupted(
    killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its two renames there is a moment without it: an interrupt, or the next command after a kill, ends it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "a" and Path(source).name == "content":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    if killed:  # what the killed process would have done afterwards does not happen
        monkeypatch.setattr(files, "_bring_back", lambda folder: None)
        monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "a") as temporary:
        (temporary / "new").write_text("new")
    monkeypatch.undo()
    assert (names(tmp_path) == ["a"]) != killed
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["old"]


def test_a_new_folder_that_is_taken_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may lock it first and remove it a moment later: what is written goes to another place."""
    opened, lock = files._open, files._lock
    taken: list[int] = []

    def slow(held: int) -> None:
        if not taken:  # somebody else was faster
            taken.append(opened(next(tmp_path.glob(f"{PREFIX}*.tmp"))))
            lock(taken[0])
        lock(held)

    monkeypatch.setattr(files, "_lock", slow)
    with replacing(tmp_path / "a") as temporary:
        (removed,) = (path for path in tmp_path.glob(f"{PREFIX}*.tmp") if path != temporary.parent)
        removed.rmdir()
        temporary.write_text("whole")
    os.close(taken[0])
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "whole"


def test_a_pipe_among_leftovers_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{PREFIX}x.lock")
    code = ALONE + "from pathlib import Path; from embtables._util.files import write_text\n"
    code += "write_text(Path(sys.argv[1]), 'x')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], timeout=60, check=True)
    assert names(tmp_path) == ["a"]


def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    (tmp_path / "a").chmod(0o600)
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_locks_are_gone_when_nobody_holds_them(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert len(names(tmp_path)) == 1
        remove_leftovers(tmp_path)  # one that is held stays
        assert len(names(tmp_path)) == 1
        with pytest.raises(ValueError, match=f"is in use by process {os.getpid()}"), locked(tmp_path):
            pass
    assert names(tmp_path) == []
    (tmp_path / f"{PREFIX}folder.lock").write_text("1")  # of a process that was killed
    with locked(tmp_path):
        pass
    assert names(tmp_path) == []


COUNTING = """
import sys, time
from pathlib import Path
from embtables._util.lock import only_one
path = Path(sys.argv[1])
for _ in range(30):
    with only_one(path, lambda: None):
        number = int(path.read_text())
        time.sleep(0.001)
        path.write_text(str(number + 1))
"""


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """Locks whose files come and go count as well as ones that stay."""
    path = tmp_path / "number"
    path.write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", ALONE + COUNTING, str(path)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert path.read_text() == "90" and names(tmp_path) == ["number"]
    with only_one(path, lambda: None):
        assert len(names(tmp_path)) == 2


READ_ONLY: dict[str, Callable[[Path], object]] = {
    "text": lambda folder: write_text(folder / "a.txt", "x"),
    "save": lambda folder: tables().save(folder / "a.safetensors"),
    "lock": lambda folder: locked(folder).__enter__(),
}


@pytest.mark.parametrize("kind", READ_ONLY)
def test_errors_of_the_system_name_the_output(kind: str, tmp_path: Path) -> None:
    """Not a temporary name, which says nothing to anyone."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:
        READ_ONLY[kind](tmp_path / "file" / "inside")
    assert "inside" in str(error.value.filename) and PREFIX not in str(error.value)
