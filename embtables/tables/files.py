"""The served file: one safetensors file with the tensors of the served form, and the plan as JSON in its header."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from embtables._util.files import followed, not_written, replacing
from embtables.formats import DTYPES, FP32
from embtables.lookup.features import BlockLookup
from embtables.lookup.recipe import Coded, Listed, Range
from embtables.lookup.recipe_block import RecipeBlock
from embtables.lookup.store import Store
from embtables.lookup.weights import Weights
from embtables.plan.solver import Plan
from embtables.serving.numpy_reader import CHECKSUM, KEY, LOOKUPS, checksum, open_file
from embtables.serving.torch_reader import tensors_of
from embtables.tables.described import lookups_of

_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write_file(path: Path | str, store: Store, blocks: Sequence[BlockLookup], plan: Plan) -> None:
    """Writes the tensors of a served store, and how its blocks look them up; the file is there whole or not at all.

    A symbolic link stays: the file that it stands for is replaced.

    Raises:
        OSError: where it cannot be written.
    """
    tensors = {name: tensor.contiguous().cpu() for name, tensor in store.stored().items()}
    described = plan.to_dict() | {LOOKUPS: lookups_of(blocks, store)}
    # In one entry with the plan: safetensors writes several of them in an order of chance.
    metadata = {KEY: json.dumps(described | {CHECKSUM: _checksum(described, tensors)})}
    with replacing(followed(path)) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise not_written(path, error) from error


@contextmanager
def reading_file(path: Path | str, *, verify: bool) -> Iterator[tuple[Plan, dict[str, Tensor]]]:
    """The plan and the tensors of a file; what does not fit, here or inside the ``with`` block, is said of the file.

    The tensors are in the memory that the file is mapped to. What is written into them is this process's alone.

    Args:
        path: of the file.
        verify: whether the tensors are read and compared with the checksum. Files that embtables 0.1.0 wrote have none.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: naming the file, where it is damaged or no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        file = open_file(path, "c")
        plan, tensors = Plan.from_dict(file.described), tensors_of(file)
        _check_shapes(plan, tensors)
        if verify:
            file.check()
        yield plan, tensors
    except OSError:
        raise
    except Exception as error:
        # A plan that no solver made may fail anywhere on its way to tables.
        reason = " ".join(str(error).split()) if isinstance(error, ValueError) else ""
        reason = reason or f"its plan and its tensors do not fit together ({type(error).__name__} {error})"
        raise ValueError(f"{path} holds no embedding tables that can be read: {' '.join(reason.split())}") from error


def read_plan(path: Path | str) -> Plan:
    """The plan in a file, whose tensors are not looked at.

    Raises:
        ValueError: naming the file, where it holds none.
    """
    try:
        return Plan.from_dict(open_file(path).described)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} holds no embedding tables that can be read: {reason}") from error


def _checksum(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    # NumPy has no bfloat16; its bytes are all that counts.
    plain = {name: t.view(torch.int16) if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}
    return checksum(described, ((name, str(t.dtype), plain[name].numpy()) for name, t in tensors.items()))


def _check_shapes(plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` unless the tensors are those of the plan's served form, before anything is allocated.

    Weights may be of another precision than the plan's, which the tables had when they were saved.
    """
    wanted = Weights([g.layout.serving for g in plan.groups], as_parameters=False, device="meta").stored()
    if set(tensors) != set(wanted):
        name = sorted(set(tensors) ^ set(wanted))[0]
        raise ValueError(
            f"it lacks the tensor '{name}' of its plan" if name in wanted else f"its plan has no tensor '{name}'"
        )
    for name, tensor in tensors.items():
        plans = wanted[name]
        same = tensor.dtype == plans.dtype or (plans.dtype == DTYPES[FP32.dtype] and tensor.dtype in _PRECISIONS)
        if not same or tensor.shape != plans.shape:
            raise ValueError(
                f"its tensor '{name}' holds {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"but its plan says {plans.dtype} of shape {tuple(plans.shape)}"
            )


def dtype_of(tensors: Mapping[str, Tensor], store: Store) -> torch.dtype:
    """The type of a file's numbers that the store has in fp32, if it has not been cast; if they differ, one for all."""
    others = store.in_other_formats()
    of_weights = [t.dtype for name, t in tensors.items() if t.is_floating_point() and name not in others]
    return functools.reduce(torch.promote_types, of_weights, of_weights[0]) if of_weights else DTYPES[FP32.dtype]


def check_codes(blocks: Sequence[BlockLookup], tensors: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` for codes out of range, in tensors that the store is about to take.

    A lookup goes where they say. Codes that the tensors lack are not looked at.
    """
    for block in blocks:
        recipes = block.block.recipes if isinstance(block.block, RecipeBlock) else []
        block.block.check_codes(lambda name, store=block.block.store: _given(name, store, tensors))  # type: ignore[misc]
        for table, recipe in zip(block.tables, recipes):
            if table.rows is None:
                continue
            check = _Codes(table.name, block.block.store, tensors)
            if recipe.ranks is not None:
                check.range("ranks", recipe.ranks.code, recipe.ranks.first, table.rows, table.rows)
            # The rest of alternatives has the ids beyond those that they hold.
            count = table.rows - sum(check.store.rows(a.slab) for a in recipe.addresses if isinstance(a, Range))
            for address in recipe.all_addresses():
                if isinstance(address, Coded):
                    rows = check.store.rows(address.slab)
                    check.range("codes", address.code, address.first, count, rows, address.column)
                elif isinstance(address, Listed):
                    length = check.store.code(address.values).shape[0]
                    check.range("offsets", address.offsets, address.first, table.rows + 1, length + 1)
                    check.range("rows", address.values, 0, length, check.store.rows(address.slab))


class _Codes(NamedTuple):
    """The codes of one table, in tensors that are about to be taken."""

    table: str
    store: Store
    tensors: Mapping[str, Tensor]

    def range(self, what: str, name: str, first: int, count: int, end: int, column: int = 0) -> None:
        """Raises ``ValueError`` unless ``count`` elements of a column from ``first`` on are 0 … end − 1."""
        given = _given(name, self.store, self.tensors)
        if given is None:
            return
        codes = given.reshape(given.shape[0], -1)[first : first + count, column]
        if codes.numel() and not 0 <= codes.min() <= codes.max() < end:
            raise ValueError(
                f"table '{self.table}': '{name}' holds {what} {int(codes.min())} … {int(codes.max())}, but there are "
                f"only 0 … {end - 1}: the file or state dict is damaged"
            )


def _given(name: str, store: Store, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """A code in tensors that are about to be taken; ``None`` where it is not there, or not of the store's shape."""
    found = tensors.get(store.key(name), torch.empty(0))
    there = found.numel() and not found.is_meta and found.shape == store.code(name).shape
    return found if there else None
