"""Checkpoints: one file, replaced in one step, that holds everything an exact resume needs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embtables._util.files import replacing
from embtables._util.names import has_patterns
from embtables._util.reading import check_archive, inside

__all__ = ["identity_of", "load_checkpoint", "restore_random_state", "save_checkpoint", "random_state"]

FORMAT, VERSION = "embtables-checkpoint", 1


def save_checkpoint(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write ``state`` (nested dicts and lists of tensors, numbers and strings), and whose state it is.

    Raises:
        OSError: the file cannot be written.
    """
    content = {"format": FORMAT, "version": VERSION, "identity": identity, "state": state}
    with replacing(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"cannot write {path}: is the disk full? ({str(error).splitlines()[0]})") from error


def load_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state written by :func:`save_checkpoint`, on the CPU.

    Raises:
        ValueError: the file is damaged, or belongs to a run with another ``identity``; the sentence names the first
            entry that differs.
    """
    try:
        check_archive(inside(path.parent, path.name))
    except ValueError as error:
        raise ValueError(f"{error}: delete it to start again") from None
    try:
        # weights_only: tensors and plain values, never code.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a damaged pickle leads to is of any type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}): delete it to start again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of embtables")
    if content.get("version") != VERSION:
        raise ValueError(f"{path} has version {content.get('version')!r}; this release reads version {VERSION}")
    if not isinstance(content.get("identity"), dict) or not isinstance(content.get("state"), dict):
        raise ValueError(f"{path} is damaged (it says of no run how far it is): delete it to start again")
    check_identity(str(path), content["identity"], identity)
    state: dict[str, Any] = content["state"]
    return state


def identity_of(path: Path) -> dict[str, Any] | None:
    """Whose state a checkpoint holds, of which no tensor is read; ``None`` where it is damaged, or there is none."""
    try:
        identity = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["identity"]
    except Exception:  # as in load_checkpoint, which says what is wrong
        return None
    return identity if isinstance(identity, dict) else None


def check_identity(where: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """``ValueError`` that names the first entry in which two runs differ; of patterns the order counts as well."""
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        # As text: a damaged checkpoint may hold what cannot be compared.
        if _text(found.get(name)) != _text(wanted.get(name)):
            old, new = _short(found.get(name)), _short(wanted.get(name))
            raise ValueError(
                f"{where} belongs to another run: {name} was {old} and is now {new}; "
                "give another --out, or delete that folder to start again"
            )


def _text(value: object) -> str:
    """Plain data as text, whatever the order of its entries but for patterns, the first of which that fits counts."""
    by_name = isinstance(value, dict) and not has_patterns(value)
    return json.dumps(value, sort_keys=by_name, default=repr)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators that a model may draw from: torch's (and the device's), numpy's and Python's."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(words), python_gauss],
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Sets the generators as they were.

    Raises:
        ValueError: the state is none that ``random_state`` gave.
    """
    name, keys, position, has_gauss, gauss = state["numpy"]
    if keys.shape != (624,) or not 0 <= position <= 624:
        raise ValueError(f"the state of numpy's generator has {keys.numel():,} words, and stands at word {position}")
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, python_gauss = state["python"]
    random.setstate((version, tuple(words), python_gauss))
