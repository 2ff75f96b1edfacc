"""The served file: one safetensors file with the tensors of the served form, and the plan as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from embtables._util.files import replacing
from embtables.lookup.features import BlockLookup
from embtables.lookup.recipe import Coded, Listed
from embtables.lookup.recipe_block import RecipeBlock
from embtables.lookup.store import Store
from embtables.plan.solver import Plan

_KEY = "embtables"


def write_file(path: Path | str, stored: Mapping[str, Tensor], plan: Plan) -> None:
    """Writes the tensors of a served store, ``stored``; the file is there whole or not at all.

    Raises:
        OSError: where it cannot be written.
    """
    tensors = {name: tensor.contiguous().cpu() for name, tensor in stored.items()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={_KEY: json.dumps(plan.to_dict())})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


@contextmanager
def reading_file(path: Path | str) -> Iterator[tuple[Plan, dict[str, Tensor]]]:
    """The plan and the tensors of a file; what does not fit, here or inside the ``with`` block, is said of the file.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: naming the file, where it is damaged or no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata is None:
            raise ValueError("it holds no plan")
        yield Plan.from_dict(json.loads(metadata)), tensors
    except (SafetensorError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} holds no embedding tables that can be read: {reason}") from error


def check_codes(blocks: Sequence[BlockLookup], tensors: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` for codes out of range, in tensors that the store is about to take.

    A lookup goes where they say. Codes that the tensors lack are not looked at.
    """
    for block in blocks:
        recipes = block.block.recipes if isinstance(block.block, RecipeBlock) else []
        for table, recipe in zip(block.tables, recipes):
            if table.rows is None:
                continue
            check = _Codes(table.name, block.block.store, tensors)
            if recipe.ranks is not None:
                check.range("ranks", recipe.ranks.code, recipe.ranks.first, table.rows, table.rows)
            for address in recipe.addresses:
                if isinstance(address, Coded):
                    rows = check.store.rows(address.slab)
                    check.range("codes", address.code, address.first, table.rows, rows, address.column)
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
        given = self.tensors.get(self.store.key(name), torch.empty(0))
        if not given.numel() or given.is_meta or given.shape != self.store.code(name).shape:
            return
        codes = given.reshape(given.shape[0], -1)[first : first + count, column]
        if codes.numel() and not 0 <= codes.min() <= codes.max() < end:
            raise ValueError(
                f"table '{self.table}': '{name}' holds {what} {int(codes.min())} … {int(codes.max())}, but there are "
                f"only 0 … {end - 1}: the file or state dict is damaged"
            )
