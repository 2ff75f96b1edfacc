"""Versions of served tables in a folder, which are replaced while they are read.

A version is one served file, ``000007.safetensors``. It is written aside, checked, and put beside the others; then the
file ``CURRENT``, which holds its name, is replaced in one step. So whoever looks finds a whole version that is current,
whenever a writer was killed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from embtables._util.files import PREFIX, naming, temporary_folder, write_text
from embtables._util.lock import locked
from embtables.serving.deltas import apply_delta, opened, read_delta, write_delta
from embtables.serving.numpy_reader import CHECKSUM

CURRENT = "CURRENT"
_NAME = re.compile(r"([0-9]{6,})\.safetensors")
Tables = TypeVar("Tables")


class Versions:
    """The versions in a folder.

    Args:
        folder: which holds them; ``publish`` makes it.
        keep: how many of the latest versions stay, at least 1; older ones are removed when another one is
            published or made by a delta. The current one always stays. Readers that have a removed one open go on.

    Example::

        versions = Versions("tables")
        versions.publish(tables.save)           # 1
        versions.publish(tables.save)           # 2, after more training
        versions.delta(1, "1-to-2.delta")       # the rows that changed
        Versions("copy").apply("1-to-2.delta")  # where version 1 is there
    """

    def __init__(self, folder: Path | str, keep: int = 2) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep must be a number of versions of at least 1, not {keep!r}")
        self.folder, self.keep = Path(folder), keep

    # ---- reading ---------------------------------------------------------------------------------------------------

    def current(self) -> int:
        """The number of the current version.

        Raises:
            FileNotFoundError: where the folder has none.
            ValueError: where ``CURRENT`` is damaged.
        """
        path = self.folder / CURRENT
        try:
            name = path.read_bytes()[:100].decode("ascii", "replace").strip()
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.folder} holds no versions of tables: it has no {CURRENT}") from None
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"{path} is damaged: it names no version")
        return int(found[1])

    def numbers(self) -> list[int]:
        """The numbers of the versions that are there, the oldest first."""
        found = [_NAME.fullmatch(name) for name in os.listdir(self.folder)]
        return sorted(int(match[1]) for match in found if match is not None)

    def path(self, number: int) -> Path:
        """The file of a version, which may be there or not."""
        return self.folder / f"{number:06d}.safetensors"

    # ---- writing ---------------------------------------------------------------------------------------------------

    def publish(self, write: Callable[[Path], object]) -> int:
        """Writes a new version, checks it, and makes it current.

        Args:
            write: what writes a served file to the path that it is given, such as ``tables.save``.

        Returns:
            The number of the version: one more than the largest that is there.

        Raises:
            OSError: where it cannot be written.
            ValueError: where what was written is no served file, and where another process is writing to the folder.
        """
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder), temporary_folder(self.folder) as aside:
            write(aside / "tables.safetensors")
            _check(aside / "tables.safetensors")
            number = max(self.numbers(), default=0) + 1
            self._put(aside / "tables.safetensors", number)
        return number

    def apply(self, delta: Path | str) -> int:
        """Makes the version that a delta leads to from one that is there, checks it, and makes it current.

        Returns:
            The number of the version, which is the one that it has where the delta was made.

        Raises:
            OSError: where it cannot be written.
            ValueError: for a damaged delta, where the version that it begins with is not there or is another one,
                where another version has the number that it leads to, and where another process is writing to the
                folder.
        """
        delta = Path(delta)
        read = read_delta(delta)
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder), temporary_folder(self.folder) as aside:
            self._check_there(read.since)
            there = self.path(read.to)
            if there.is_file() and opened(there).described[CHECKSUM] != read.to_sha256:
                raise ValueError(f"{delta} leads {read}, but {there} is another version of that number")
            apply_delta(self.path(read.since), delta, aside / "tables.safetensors")
            self._put(aside / "tables.safetensors", read.to)
        return read.to

    def use(self, number: int) -> None:
        """Makes another version that is there current, such as the one before.

        Raises:
            ValueError: where it is not there or damaged, and where another process is writing to the folder.
        """
        with locked(self.folder):
            self._check_there(number)
            _check(self.path(number))
            self._switch(number)

    def delta(self, since: int, path: Path | str) -> None:
        """Writes what changed from a version that is there to the current one, as one file.

        Raises:
            OSError: where it cannot be written.
            ValueError: where the version is not there, or damaged.
        """
        current = self.current()
        self._check_there(since)
        write_delta(Path(path), self.path(since), self.path(current), since, current)

    def _check_there(self, number: int) -> None:
        if not self.path(number).is_file():
            there = ", ".join(map(str, self.numbers())) or "none"
            raise ValueError(f"{self.folder} has no version {number}; the versions there: {there}")

    def _put(self, file: Path, number: int) -> None:
        _synchronize(file)
        os.replace(file, self.path(number))
        self._switch(number)
        for old in self.numbers()[: -self.keep]:
            if old != number:
                self.path(old).unlink(missing_ok=True)

    def _switch(self, number: int) -> None:
        # A version has to be on the disk before its name is in CURRENT.
        _synchronize(self.folder)
        write_text(self.folder / CURRENT, self.path(number).name + "\n")


class Reader(Generic[Tables]):
    """The current version in a folder of versions, opened; ``refresh`` goes on to a newer one.

    Args:
        folder: of the versions.
        load: what opens a served file, such as ``EmbeddingTables.load`` or ``NumpyTables``.

    Attributes:
        version: the number of the version that is open.
        tables: what ``load`` gave for it. A lookup that takes it once reads one version alone, whatever is published
            meanwhile, and from whatever thread ``refresh`` is called.

    Raises:
        FileNotFoundError: where the folder has no version.
        ValueError: where the current one is damaged.

    Example::

        reader = Reader("tables", EmbeddingTables.load)
        while serving:
            reader.refresh()          # of some ten microseconds, so that every batch may call it
            vectors = reader.tables(ids)
    """

    version: int
    tables: Tables

    def __init__(self, folder: Path | str, load: Callable[[Path], Tables]) -> None:
        self._versions, self._load = Versions(folder), load
        self._open(self._versions.current())

    def refresh(self) -> bool:
        """Opens the current version where it is another one than before, and returns whether it is.

        Raises:
            OSError, ValueError: as for a new reader; the version that was open stays so.
        """
        number = self._versions.current()
        if number == self.version:
            return False
        self._open(number)
        return True

    def _open(self, number: int) -> None:
        while True:
            try:
                tables = self._load(self._versions.path(number))
                break
            except FileNotFoundError:
                # Others may have become current since, and this one been removed.
                before, number = number, self._versions.current()
                if number == before:
                    raise
        self.tables, self.version = tables, number


def _check(path: Path) -> None:
    """Raises ``ValueError`` unless a file is a whole served file."""
    file = opened(path)
    try:
        file.check()
    except ValueError as error:
        raise ValueError(
            f"{path.name if PREFIX in str(path) else path} holds no embedding tables that can be read: {error}"
        ) from error


def _synchronize(path: Path) -> None:
    """Has what was written to a file or folder reach the disk."""
    try:
        held = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(held)
    finally:
        os.close(held)
