"""The served file: one safetensors file with the tensors of the served form, and the plan as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from embtables._util.files import replacing
from embtables.lookup.features import BlockLookup
from embtables.lookup.recipe_block import RecipeBlock
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


def check_ranks(blocks: Sequence[BlockLookup], tensors: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` for ranks out of range, in tensors that the store is about to take.

    A lookup goes where they say.
    """
    for block in blocks:
        recipes = block.block.recipes if isinstance(block.block, RecipeBlock) else []
        for table, recipe in zip(block.tables, recipes):
            if recipe.ranks is None or table.rows is None:
                continue
            name, start = recipe.ranks
            key = block.block.store.key(name)
            ranks = tensors.get(key, torch.empty(0)).reshape(-1)[start : start + table.rows]
            if ranks.numel() and not ranks.is_meta and not 0 <= ranks.min() <= ranks.max() < table.rows:
                raise ValueError(
                    f"table '{table.name}': '{name}' holds ranks {int(ranks.min())} … {int(ranks.max())}, but its "
                    f"ids have the ranks 0 … {table.rows - 1}: the file or state dict is damaged"
                )
