"""The lookup and its fused optimizers, under ``torch.library``.

``embtables::lookup`` gathers rows and, in its backward, hands their gradient to ``embtables::update_``; in compiled
graphs ``embtables::lookup_of_some`` and ``embtables::update_some_`` do so where rows may be missing. ``reference``
gives both their meaning in plain PyTorch, wherever PyTorch runs; ``native`` has kernels of both for CPUs, ``gpu`` for
CUDA. ``look_up`` does all lookups of a module at once, in native code alone. ``embtables::refuse_ids`` raises for ids
out of range inside compiled graphs; exported ones hold none of these operators.

``EMBTABLES_OPS=native`` insists on native code, ``EMBTABLES_OPS=reference`` leaves it aside; without either it is used
where it was built. ``EMBTABLES_INSTRUCTIONS=baseline``, ``avx2`` or ``avx512`` names the instruction set, which is the
best that the processor has otherwise.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from embtables.ops import fused, gpu, native, reference
from embtables.ops.fused import (
    check,
    differentiate,
    look_up,
    look_up_in_graph,
    look_up_values,
    update_in_backward,
)
from embtables.ops.ids import raise_for_id, raise_for_ids, ranges, refuse_ids
from embtables.ops.native import Refused, fits, has_native_form, state_places, takes_state, told
from embtables.ops.reference import (
    coalesce,
    fused_dense,
    fused_lookup,
    fused_lookup_of_some,
    fused_rows,
    gather,
    summing,
    training_lock,
    unpacking,
    update,
    update_once,
    update_rows,
)

__all__ = [
    "Refused",
    "backend",
    "check",
    "coalesce",
    "differentiate",
    "fits",
    "fused_dense",
    "fused_lookup",
    "fused_lookup_of_some",
    "fused_rows",
    "gather",
    "has_native_form",
    "huge_pages",
    "instructions",
    "look_up",
    "look_up_in_graph",
    "look_up_values",
    "raise_for_id",
    "raise_for_ids",
    "ranges",
    "refuse_ids",
    "state_places",
    "summing",
    "takes_state",
    "told",
    "training_lock",
    "unpacking",
    "update",
    "update_in_backward",
    "update_once",
    "update_rows",
    "using",
]

_VARIABLE = "EMBTABLES_OPS"


def _choose() -> native.Library | None:
    wanted = os.environ.get(_VARIABLE, "")
    if wanted not in ("", "native", "reference"):
        raise ValueError(f"{_VARIABLE} must be native or reference, not {wanted!r}")
    if wanted == "reference":
        return None
    try:
        return native.Library(native.load())
    except native.LibraryMissing as error:
        if wanted == "native":
            raise ImportError(f"{_VARIABLE}=native: {error}") from None
        warnings.warn_explicit(
            f"embtables looks tables up in plain PyTorch, which is several times slower: {error} "
            f"({_VARIABLE}=reference says that it is meant so)",
            UserWarning,
            *_importer(),
        )
        return None


def _importer() -> tuple[str, int]:
    """File and line of who imports embtables."""
    inside = (f"{Path(__file__).parents[1]}{os.sep}", "<frozen importlib")
    frames = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None))
    return next((place for place in frames if not place[0].startswith(inside)), (__file__, 0))


_library = _choose()
_in_use = _library is not None


def backend() -> str:
    """What looks up tables on the CPU: ``"native"`` or ``"reference"``."""
    return "native" if _in_use else "reference"


def instructions() -> str | None:
    """The instruction set that native code uses on this machine, ``None`` where there is none."""
    return None if _library is None else _library.instructions


@contextmanager
def using(name: str) -> Iterator[None]:
    """Within the ``with`` block lookups go through ``"native"`` or ``"reference"``, to compare the two.

    It holds for the whole process: lookups of other threads go that way, too.

    Raises:
        ValueError: for another name.
        RuntimeError: for native code where there is none.
    """
    global _in_use
    if name not in ("native", "reference"):
        raise ValueError(f"the operators are native or reference, not {name!r}")
    if name == "native" and _library is None:
        raise RuntimeError("there is no native code in this process")
    before, _in_use = _in_use, name == "native"
    try:
        yield
    finally:
        _in_use = before


if _library is not None:
    fused.use(_library)
    reference.before_updates.append(fused.settle)
    native.register(_library, lambda: _in_use, fused_lookup, update)

gpu.register()


def huge_pages(fresh: Tensor) -> Tensor:
    """The tensor, to which nothing has been written yet, on huge pages where native code is used and it is large."""
    return fresh if _library is None else _library.huge_pages(fresh)
