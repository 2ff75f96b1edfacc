"""What a lookup is given: ids, offsets, weights and pooling, checked before anything happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

# The pooling of each table's own config.
CONFIG = "config"

# ``CONFIG``, one mode for all features, or a mode for some; ``None`` leaves a feature's vectors unpooled.
PoolingLike: TypeAlias = str | Mapping[str, str | None] | None


class Input(NamedTuple):
    """The ids of a lookup, and their offsets and weights where there are any, as in ``EmbeddingTables.forward``.

    ``rest``: whether ids may follow the last bag, which belong to none; only graphs take such input.
    """

    ids: Tensor
    offsets: Tensor | None = None
    weights: Tensor | None = None
    rest: bool = False

    def batch(self, num_features: int) -> int:
        """The number of examples."""
        return self.ids.shape[0] if self.offsets is None else (self.offsets.numel() - 1) // num_features

    def bounds(self, num_features: int) -> list[int]:
        """Where the flat ids of each feature begin, and where the last one's end."""
        assert self.offsets is not None
        batch = self.batch(num_features)
        if torch.compiler.is_compiling():  # a step of a slice would fix the size of the batch
            places = torch.arange(num_features + 1, device=self.offsets.device) * batch
            return self.offsets[places].tolist()
        return self.offsets[::batch].tolist() if batch else [0] * (num_features + 1)

    def copied(self) -> Input:
        """Offsets, as int64, and weights of its own: a backward reads them again, and their owner may refill them."""
        offsets = None if self.offsets is None else self.offsets.to(torch.int64, copy=True)
        return Input(self.ids, offsets, None if self.weights is None else self.weights.clone(), self.rest)


def check_input(ids: Tensor, offsets: Tensor | None, weights: Tensor | None, feature_names: Sequence[str]) -> None:
    """Raises ``TypeError`` or ``ValueError``, naming the argument whose type or shape does not fit."""
    num_features = len(feature_names)
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a tensor, not a {type(ids).__name__}")
    for name, value in ("offsets", offsets), ("per_sample_weights", weights):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not a {type(value).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, not {ids.dtype}")
    if weights is not None and weights.shape != ids.shape:
        raise ValueError(f"per_sample_weights have shape {tuple(weights.shape)}, but ids {tuple(ids.shape)}")
    if offsets is None:
        if ids.ndim != 2 or ids.shape[1] != num_features:
            raise ValueError(
                f"ids must be [batch, {num_features}], a column for each of {', '.join(feature_names[:8])}"
                f"{', …' if num_features > 8 else ''}, or flat with offsets; they have shape {tuple(ids.shape)}"
            )
        return
    if ids.ndim != 1:
        raise ValueError(f"ids must be flat where offsets are given; they have shape {tuple(ids.shape)}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets must be int32 or int64, not {offsets.dtype}")
    if offsets.ndim != 1 or (offsets.numel() - 1) % num_features or not offsets.numel():
        raise ValueError(
            f"offsets must be 1-D with {num_features}·batch + 1 elements for {num_features} features; "
            f"they have shape {tuple(offsets.shape)}"
        )


def check_offsets(ids: Tensor, offsets: Tensor | None, *, rest: bool = False) -> None:
    """Raises ``ValueError`` for offsets that do not rise from 0 to the number of ids: unlike shapes, this is data.

    A graph, which cannot look at data, holds an assertion of PyTorch instead. ``rest``: as in ``Input``.
    """
    if offsets is None:
        return
    if torch.compiler.is_compiling():
        ends_well = offsets[-1] <= ids.numel() if rest else offsets[-1] == ids.numel()
        rise = (offsets[0] == 0) & ends_well & (offsets.diff() >= 0).all()
        torch._assert_async(rise, "offsets must rise from 0 to the number of ids")
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != ids.numel() or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"offsets must rise from 0 to the number of ids, {ids.numel()}; they run from {first} to {last}"
            f"{'' if bool((offsets.diff() >= 0).all()) else ' and fall in between'}"
        )


def check_pooling(pooling: PoolingLike, feature_names: Sequence[str]) -> None:
    """Raises ``ValueError``, naming the unknown feature or pooling."""
    if pooling == CONFIG:
        return
    given = pooling if isinstance(pooling, Mapping) else {"": pooling}
    for feature, mode in given.items():
        if feature and feature not in feature_names:
            raise ValueError(f"pooling names the feature '{feature}', which no table has")
        if mode not in ("sum", "mean", None):
            raise ValueError(f"pooling must be 'sum', 'mean' or None, not {mode!r}")
