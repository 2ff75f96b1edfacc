"""Scores of a model on a split, the metrics of them, and the latency of a lookup."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from embtables.datasets import Batch, Jagged, PreparedDataset
from embtables.models.blocks import bags
from embtables.tables import EmbeddingTables
from embtables.training import metrics

__all__ = ["Scored", "all_metrics", "forward", "lookup_latency_us", "main_metrics", "score", "table_norms", "to_device"]


class Scored(NamedTuple):
    """A split in file order: logits and labels float32 [N], groups and ids of the slice feature int64 [N] or None."""

    logits: NDArray[np.float32]
    labels: NDArray[np.float32]
    groups: NDArray[np.int64] | None
    slice_ids: NDArray[np.int64] | None


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with what a model reads on ``device``; groups stay where they are."""
    if device.type == "cpu":
        return batch
    lists = {name: Jagged(values.to(device), offsets.to(device)) for name, (values, offsets) in batch.lists.items()}
    return Batch(batch.labels.to(device), batch.dense.to(device), batch.ids.to(device), batch.groups, lists)


def slice_feature(data: PreparedDataset) -> str | None:
    """The feature whose training frequency slices the rows: the manifest's, else the one with most ids.

    ``None`` where the manifest's is left out: the slices of another would stand under the same names.
    """
    wanted = data.manifest.get("slice_feature")
    if wanted is not None:
        return wanted if wanted in data.feature_names else None
    return max(data.feature_names, key=lambda name: data.num_embeddings[name])


@torch.no_grad()
def forward(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, where: str
) -> Iterator[tuple[Batch, NDArray[np.float32]]]:
    """Each batch with its logits, float32 [B], of a model in evaluation mode.

    Args:
        where: what the batches are of, in words.

    Raises:
        ValueError: the model does not return one logit a row.
        FloatingPointError: a logit is NaN or infinite; the sentence names the row, counted from 0.
    """
    row = 0
    for batch in batches:
        output = model(to_device(batch, device))
        check_logits(model, output, batch)
        logits = output.float().cpu().numpy()
        if not np.isfinite(logits).all():
            wrong = int(np.argmin(np.isfinite(logits)))
            raise FloatingPointError(f"the logit of row {row + wrong} of {where} is {logits[wrong]}")
        row += len(logits)
        yield batch, logits


def score(
    model: nn.Module,
    data: PreparedDataset,
    split: str,
    batch_size: int,
    device: torch.device,
    most: int | None = None,
) -> Scored:
    """Logits of all rows of ``split``, or of whole batches up to ``most`` rows. The model is left in evaluation mode.

    Raises:
        ValueError: the split has no rows, or the model does not return one logit a row.
        FloatingPointError: a logit is NaN or infinite.
    """
    model.eval()
    sliced_by = slice_feature(data)
    column = None if sliced_by is None else data.feature_names.index(sliced_by)
    logits, labels, groups, ids = [], [], [], []
    batches = data.batches(split, batch_size)
    if most is not None:
        batches = islice(batches, max(1, most // batch_size))
    for batch, found in forward(model, batches, device, f"split '{split}'"):
        logits.append(found)
        labels.append(batch.labels.numpy())
        if column is not None:
            ids.append(batch.ids[:, column].numpy())
        if batch.groups is not None:
            groups.append(batch.groups.numpy())
    if not logits:
        raise ValueError(f"split '{split}' of {data.path} has no rows")
    return Scored(
        np.concatenate(logits),
        np.concatenate(labels),
        np.concatenate(groups) if groups else None,
        np.concatenate(ids) if ids else None,
    )


def check_logits(model: nn.Module, logits: torch.Tensor, batch: Batch) -> None:
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        found = logits.dtype if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"model {type(model).__name__} must return a tensor of floating-point logits, not {found}")
    if logits.shape != batch.labels.shape:
        raise ValueError(
            f"model {type(model).__name__} must return one logit a row, shape {tuple(batch.labels.shape)}, "
            f"not {tuple(logits.shape)}"
        )


def main_metrics(scored: Scored) -> dict[str, float | None]:
    """AUC, log loss and both grouped AUCs, ``None`` where one is not defined on these rows."""
    labels, logits, groups = scored.labels, scored.logits, scored.groups
    return _defined(
        {
            "auc": metrics.auc(labels, logits),
            "logloss": metrics.log_loss(labels, metrics.sigmoid(logits)),
            "gauc_weighted": math.nan if groups is None else metrics.gauc_weighted(labels, logits, groups),
            "gauc_mean": math.nan if groups is None else metrics.gauc_mean(labels, logits, groups),
        }
    )


def all_metrics(scored: Scored, data: PreparedDataset) -> dict[str, float | None]:
    """Every metric of a split, ``None`` where it is not defined on these rows."""
    labels, probabilities = scored.labels, metrics.sigmoid(scored.logits)
    further = {
        "normalized_entropy": metrics.normalized_entropy(labels, probabilities),
        "calibration": metrics.calibration(labels, probabilities),
    }
    return {**main_metrics(scored), **_defined(further), **slice_metrics(scored, data)}


def slice_metrics(scored: Scored, data: PreparedDataset) -> dict[str, float | None]:
    """The AUC of each slice of ids by their frequency in training, ``None`` where it is not defined on these rows."""
    sliced = dict.fromkeys(metrics.SLICES, math.nan)
    sliced_by = slice_feature(data)
    if sliced_by is not None and scored.slice_ids is not None:
        sliced = metrics.slice_auc(scored.labels, scored.logits, scored.slice_ids, data.frequencies[sliced_by])
    return _defined({f"auc_{name}": value for name, value in sliced.items()})


def _defined(values: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}


@torch.no_grad()
def lookup_latency_us(tables: EmbeddingTables, batch: Batch, repeats: int = 50) -> float:
    """Median microseconds to look up all ids of ``batch`` in ``tables``, pooled, after a warm-up."""
    tables.eval()
    ids, offsets = bags(batch, tables.feature_names)
    seconds: list[float] = []
    for _ in range(repeats + 5):
        start = time.perf_counter()
        tables(ids, offsets)
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        seconds.append(time.perf_counter() - start)
    return 1e6 * median(seconds[5:])


def table_norms(tables: EmbeddingTables) -> dict[str, float]:
    """Root mean square of the weights of every slab and of other parameters of the tables."""
    store = tables.store
    slabs = dict(store.named_slabs())
    # The store lists its slabs by width, many tables in one tensor; here every table is of interest.
    weights = set(store.weight_names)
    extras = {name: tensor for name, tensor, is_code in store.tensors() if not is_code and name not in weights}
    return {
        f"rms/{name}": float(tensor.detach().float().square().mean().sqrt())
        for name, tensor in (slabs | extras).items()
        if tensor.numel()
    }


def share_of_colliding_ids(tables: EmbeddingTables) -> float | None:
    """Mean of the tables' ``collision_share``, weighted by their ids; ``None`` where a table has no vocabulary."""
    rows: list[Any] = [table.rows for table in tables.plan.tables]
    if None in rows:
        return None
    shares = [tables.collision_share(table.name) for table in tables.plan.tables]
    return sum(n * share for n, share in zip(rows, shares)) / sum(rows)
