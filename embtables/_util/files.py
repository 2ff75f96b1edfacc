"""Files and folders that are there whole or not at all, what a killed process left of them, and checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: processes do not see each other's locks there
    fcntl = None  # type: ignore[assignment]

PREFIX = ".embtables-"
"""Temporary folders and locks begin with it. They stand beside what they are for, in the same folder."""

_TEMPORARY = ".tmp"
_LOCK = ".lock"
_REPLACED = "replaced"
"""Where in a temporary folder the folder lies that is being replaced, under its own name."""


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yields a name to write a file to; when the block ends well that file becomes ``path``, else it is removed.

    A symbolic link at ``path`` is replaced, not followed. What killed processes left beside ``path`` is removed first.

    Raises:
        OSError: naming ``path``, which a full disk does not do by itself.
    """
    path = Path(path)
    with naming(path), temporary_folder(path.parent) as folder:
        content = folder / "content"
        yield content
        if path.is_file() and not path.is_symlink():
            shutil.copymode(path, content)
        os.replace(content, path)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder; when the block ends well it becomes the folder ``path``, else it is removed.

    Raises:
        OSError: naming ``path``.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path.parent) as folder:
            content = folder / "content"
            content.mkdir()
            yield content
            kept = folder / _REPLACED
            kept.mkdir()
            try:
                if path.is_dir() and not path.is_symlink():
                    os.replace(path, kept / path.name)
                os.replace(content, path)
            except BaseException:
                _bring_back(folder)
                raise


def followed(path: Path | str) -> Path:
    """The file that a symbolic link stands for, or ``path`` itself where it is none.

    Raises:
        OSError: where links lead round in a circle.
    """
    found = really(path) if os.path.islink(path) else Path(path)
    if found.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return found


def really(path: Path | str) -> Path:
    """Where ``path`` is, or would be, without links and ``..``."""
    return Path(os.path.realpath(path))


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Errors of the system inside the block that name no file, or a temporary one, name ``path``."""
    try:
        yield
    except OSError as error:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if error.errno is None or (names and not any(PREFIX in name for name in names)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def not_written(path: Path | str, error: Exception) -> OSError:
    """The error of the system that safetensors met when it wrote ``path``, of which it tells the number in words."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is None:
        return OSError(f"cannot write {path}: {error}")
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in one step."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Replaces ``path`` by ``content`` as JSON, in one step."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data`` in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def sha256(path: Path) -> str:
    """Hexadecimal checksum of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


# ---- checksums of records ----------------------------------------------------------------------------------------

_SEAL, _SEALED = "sha256_of_the_rest", "sealed"
"""The entries of a record, such as a manifest, that hold the checksum of the others, and say that there is one."""


def _seal_of(record: Mapping[str, Any]) -> str:
    """Hexadecimal checksum of a record of plain data, whatever the order of its entries."""
    return hashlib.sha256(json.dumps(unsealed(record), sort_keys=True).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its checksum, which ``check_seal`` compares.

    It comes first and is announced last: a file that was cut, or has lost either, still tells that something is wrong.
    """
    return {_SEAL: _seal_of(record), **record, _SEALED: True}


def unsealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without its checksum."""
    return {name: value for name, value in record.items() if name not in (_SEAL, _SEALED)}


def check_seal(record: Mapping[str, Any], path: Path) -> None:
    """``ValueError`` where a record has a checksum that is not its own; records of older releases have none."""
    try:
        plain = _SEAL not in record and _SEALED not in record
        matches = plain or (record.get(_SEALED) is True and record.get(_SEAL) == _seal_of(record))
    except TypeError:  # not plain data
        matches = False
    if not matches:
        raise ValueError(f"{path} is damaged: its entries do not match their checksum '{_SEAL}'")


# ---- what is temporary -------------------------------------------------------------------------------------------


def remove_leftovers(*folders: Path) -> None:
    """Removes the temporary folders and locks in each folder of processes that are no more; those in use stay."""
    for folder in folders:
        try:
            names = [entry.name for entry in os.scandir(folder) if entry.name.startswith(PREFIX)]
        except OSError:  # there is no such folder, or it cannot be listed
            continue
        for name in names:
            if name.endswith((_TEMPORARY, _LOCK)):
                _remove_unless_held(folder / name)


def _bring_back(folder: Path) -> None:
    """Puts what lies in a temporary folder as replaced back in its place, where nothing has taken that."""
    for old in folder.glob(f"{_REPLACED}/*"):
        if not os.path.lexists(folder.parent / old.name):
            os.replace(old, folder.parent / old.name)


def _open(path: Path, flags: int = os.O_RDONLY) -> int:
    """Opens no link, and does not wait for a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o644)


def _remove_unless_held(path: Path) -> None:
    try:
        held = _open(path)
    except OSError:
        return
    try:
        _lock(held)
        if path.name.endswith(_LOCK):
            path.unlink()
        else:
            _bring_back(path)  # whoever replaced it was killed between the two steps
            shutil.rmtree(path, ignore_errors=True)
    except OSError:  # in use, or of somebody else
        pass
    finally:
        os.close(held)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent`` for as long as the block takes; a lock on it says that it is in use."""
    remove_leftovers(parent)
    # An interrupt may come anywhere from here on, and the folder is to be gone then.
    folder, held = _new_name(parent), None
    try:
        while held is None:
            folder.mkdir()
            held = _held(folder)
            if held is None:  # taken for a leftover before it was locked, and about to be removed
                folder = _new_name(parent)
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except KeyboardInterrupt:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            if held is not None and held != _NOT_HELD:
                os.close(held)


_NOT_HELD = -1


def _new_name(parent: Path) -> Path:
    return parent / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}{_TEMPORARY}"


def _held(folder: Path) -> int | None:
    """The descriptor of a locked folder; ``_NOT_HELD`` where there are no such locks, ``None`` where it is gone.

    It is gone, or soon will be, where another process took it for a leftover before it was locked.
    """
    try:
        held = _open(folder)
    except FileNotFoundError:
        return None
    except OSError:  # Windows opens no folders
        return _NOT_HELD
    try:
        _lock(held)
    except BlockingIOError:
        os.close(held)
        return None
    except OSError:  # a file system without such locks, where nobody else gets one either
        return held
    if not folder.exists():
        os.close(held)
        return None
    return held


# ---- locks -------------------------------------------------------------------------------------------------------


def lock_in(folder: Path) -> Path:
    """The lock on a folder, inside of it."""
    return folder / f"{PREFIX}folder{_LOCK}"


def lock_beside(path: Path) -> Path:
    """The lock on an output that may not be there yet."""
    return path.parent / f"{PREFIX}{hashlib.sha256(path.name.encode()).hexdigest()[:16]}{_LOCK}"


def hold(lock: Path) -> int:
    """Takes a lock, a file that exists as long as somebody holds it; returns its descriptor.

    Raises:
        BlockingIOError: where another process holds it.
    """
    while True:
        held = _open(lock, os.O_RDWR | os.O_CREAT)
        try:
            _lock(held)
            # Who held it before may have removed it meanwhile.
            if lock.exists() and os.path.samestat(os.fstat(held), os.stat(lock)):
                os.ftruncate(held, 0)
                os.write(held, str(os.getpid()).encode())
                return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)


def let_go(lock: Path, held: int) -> None:
    """Gives a lock back, and removes its file."""
    lock.unlink(missing_ok=True)
    os.close(held)


def _lock(held: int) -> None:
    if fcntl is not None:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
