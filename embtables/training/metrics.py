"""Metrics of a binary classifier, exact and vectorized (numpy only).

Shapes: ``labels`` [N] of 0 and 1, ``scores`` [N] of any finite monotone score (logits or probabilities), ``groups`` [N]
integers. Wrong input (lengths that differ, labels other than 0 and 1, NaN scores) raises ``ValueError``.
A metric that is not defined on the rows it is given (one class only, no rows) is ``nan``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CLIP",
    "SLICES",
    "AucDifference",
    "auc",
    "bootstrap_auc_difference",
    "calibration",
    "gauc_mean",
    "gauc_weighted",
    "log_loss",
    "normalized_entropy",
    "sigmoid",
    "slice_auc",
    "slice_of_ids",
]

CLIP = 1e-7
"""Probabilities are clipped to [CLIP, 1 - CLIP] before a logarithm: a sure mistake costs 16.1, not infinity."""

SLICES = ("head", "torso", "tail", "unseen")
"""Names of the slices of :func:`slice_of_ids`, in the order of its codes."""


def _checked(labels: NDArray, scores: NDArray) -> tuple[NDArray[np.bool_], NDArray]:
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"labels and scores must be 1-D and of one length, not {labels.shape} and {scores.shape}")
    positive = labels == 1
    if not np.all(positive | (labels == 0)):
        row = int(np.argmin(positive | (labels == 0)))
        raise ValueError(f"labels must be 0 or 1, but row {row} has {labels[row]}")
    if np.isnan(scores).any():
        raise ValueError(f"scores hold NaN, first in row {int(np.argmax(np.isnan(scores)))}")
    return positive, scores


def sigmoid(logits: NDArray) -> NDArray[np.float64]:
    """1 / (1 + exp(-logits)) in float64, without overflow."""
    half = 0.5 * np.asarray(logits, dtype=np.float64)
    return 0.5 * (1.0 + np.tanh(half))


def auc(labels: NDArray, scores: NDArray) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative) + P(equal) / 2.

    Exact for every pattern of ties; constant scores give 0.5; ``nan`` when only one class is present.
    """
    positive, scores = _checked(labels, scores)
    order = np.argsort(scores)
    ordered = scores[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))) if len(ordered) else np.empty(0, int)
    total = np.diff(np.append(starts, len(ordered)))
    positives = np.add.reduceat(positive[order].astype(np.int64), starts) if len(starts) else np.empty(0, np.int64)
    negatives = total - positives
    num_positives, num_negatives = int(positives.sum()), int(negatives.sum())
    if num_positives == 0 or num_negatives == 0:
        return float("nan")
    below = np.cumsum(negatives) - negatives
    # Twice the number of won pairs is an integer: exact in int64 up to 2e9 rows of each class.
    twice_won = int(np.dot(positives, 2 * below + negatives))
    return twice_won / (2 * num_positives * num_negatives)


def log_loss(labels: NDArray, probabilities: NDArray) -> float:
    """Mean binary cross-entropy in nats, probabilities clipped to [CLIP, 1 - CLIP]; ``nan`` without rows."""
    positive, probabilities = _checked(labels, probabilities)
    if len(positive) == 0:
        return float("nan")
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise ValueError("log_loss takes probabilities in [0, 1]; apply sigmoid to logits first")
    clipped = np.clip(probabilities.astype(np.float64), CLIP, 1 - CLIP)
    return float(-np.mean(np.log(np.where(positive, clipped, 1 - clipped))))


def normalized_entropy(labels: NDArray, probabilities: NDArray) -> float:
    """Log loss over the entropy of these rows' own base rate (He et al., ADKDD 2014): 1 = no better than the base rate.

    ``nan`` when only one class is present, where that entropy is 0.
    """
    loss = log_loss(labels, probabilities)
    rate = float(np.mean(np.asarray(labels) == 1)) if len(labels) else float("nan")
    if not 0 < rate < 1:
        return float("nan")
    return loss / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))


def calibration(labels: NDArray, probabilities: NDArray) -> float:
    """Mean prediction over the rate of positives: above 1 too many are expected, below 1 too few.

    ``nan`` without a positive row.
    """
    positive, probabilities = _checked(labels, probabilities)
    return float(probabilities.mean(dtype=np.float64) / positive.mean()) if positive.any() else float("nan")


def _auc_by_group(labels: NDArray, scores: NDArray, groups: NDArray) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """AUC and rows of every group that holds both classes."""
    positive, scores = _checked(labels, scores)
    groups = np.asarray(groups)
    if groups.shape != positive.shape:
        raise ValueError(f"groups must have the shape of labels, not {groups.shape} against {positive.shape}")
    if len(groups) == 0:
        return np.empty(0), np.empty(0, np.int64)
    order = np.lexsort((scores, groups))
    positive, scores, groups = positive[order].astype(np.int64), scores[order], groups[order]
    new_group = np.concatenate(([True], groups[1:] != groups[:-1]))
    tie_starts = np.flatnonzero(new_group | np.concatenate(([True], scores[1:] != scores[:-1])))
    tie_total = np.diff(np.append(tie_starts, len(groups)))
    tie_positives = np.add.reduceat(positive, tie_starts)
    tie_negatives = tie_total - tie_positives
    group_starts = np.flatnonzero(new_group[tie_starts])  # in units of ties
    group_of_tie = np.cumsum(new_group[tie_starts]) - 1
    below = np.cumsum(tie_negatives) - tie_negatives
    below -= below[group_starts][group_of_tie]
    twice_won = np.add.reduceat(tie_positives * (2 * below + tie_negatives), group_starts)
    num_positives = np.add.reduceat(tie_positives, group_starts)
    num_negatives = np.add.reduceat(tie_negatives, group_starts)
    both = (num_positives > 0) & (num_negatives > 0)
    area = twice_won[both] / (2.0 * num_positives[both] * num_negatives[both])
    return area, (num_positives + num_negatives)[both]


def gauc_weighted(labels: NDArray, scores: NDArray, groups: NDArray) -> float:
    """AUC inside each group, averaged with the group's rows as weight.

    Groups with one class only have no AUC: they are left out, and their rows do not count in the weights.
    ``nan`` when no group is left.
    """
    area, rows = _auc_by_group(labels, scores, groups)
    return float(np.dot(area, rows) / rows.sum()) if len(area) else float("nan")


def gauc_mean(labels: NDArray, scores: NDArray, groups: NDArray) -> float:
    """AUC inside each group, all groups counting the same; one-class groups are left out, ``nan`` when none is left."""
    area, _ = _auc_by_group(labels, scores, groups)
    return float(area.mean()) if len(area) else float("nan")


def slice_of_ids(counts: NDArray, *, unseen_id: int = 1) -> NDArray[np.int8]:
    """Slice (a code into :data:`SLICES`) of every id of a feature, from its training counts [num_embeddings].

    Ids are ordered by count, ties by id. Head: the ids that carry the first half of the training traffic, that is,
    those before which less than 50 % of it lies; torso: the next 40 %; tail: the rest. Unseen: ``unseen_id``
    (whose traffic counts nowhere) and every id with count 0.
    """
    counts = np.array(counts, dtype=np.int64)
    if counts.ndim != 1 or (counts < 0).any():
        raise ValueError("training counts must be a 1-D array of non-negative integers")
    if 0 <= unseen_id < len(counts):
        counts[unseen_id] = 0
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    total = counts.sum()
    # In tenths, so that the bounds are compared in integers.
    codes = np.where(10 * before < 5 * total, 0, np.where(10 * before < 9 * total, 1, 2))
    slices = np.empty(len(counts), dtype=np.int8)
    slices[order] = codes
    slices[counts == 0] = 3
    return slices


def slice_auc(labels: NDArray, scores: NDArray, ids: NDArray, counts: NDArray) -> dict[str, float]:
    """AUC over the rows whose id (column of the slice feature, [N]) is in each slice; ``nan`` where undefined."""
    codes = slice_of_ids(counts)[np.asarray(ids)]
    labels, scores = np.asarray(labels), np.asarray(scores)
    return {name: auc(labels[codes == code], scores[codes == code]) for code, name in enumerate(SLICES)}


@dataclass(frozen=True)
class AucDifference:
    """AUC of A minus AUC of B on the same rows: the estimate, its bootstrap standard error and percentile interval."""

    difference: float
    standard_error: float
    low: float
    high: float


class _WeightedAuc:
    """AUC under row weights, sorted once and evaluated in O(N) for every weighting."""

    def __init__(self, positive: NDArray[np.bool_], scores: NDArray) -> None:
        rows = np.arange(len(scores))
        self.positives = rows[positive][np.argsort(scores[positive])]
        self.negatives = rows[~positive][np.argsort(scores[~positive])]
        ordered = scores[self.negatives]
        self.below = np.searchsorted(ordered, scores[self.positives], side="left")
        self.up_to = np.searchsorted(ordered, scores[self.positives], side="right")

    def __call__(self, weights: NDArray[np.int64]) -> float:
        cumulative = np.concatenate(([0], np.cumsum(weights[self.negatives])))
        positive_weights = weights[self.positives]
        twice_won = np.dot(positive_weights, cumulative[self.below] + cumulative[self.up_to])
        pairs = positive_weights.sum() * cumulative[-1]
        return float(twice_won / (2 * pairs)) if pairs else float("nan")


def bootstrap_auc_difference(
    labels: NDArray,
    scores_a: NDArray,
    scores_b: NDArray,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> AucDifference:
    """Paired bootstrap of AUC(A) - AUC(B): rows are drawn with replacement, the same rows for both.

    Both score vectors are sorted once; a resample is a vector of multinomial counts under which the weighted AUC, exact
    with ties, is read off in O(N). Resamples with one class only are left out; one-class rows give ``nan`` throughout.
    The drawn rows depend on ``seed`` and N alone, so that differences of several models are comparable.
    """
    if num_resamples < 2 or not 0 < confidence < 1:
        raise ValueError(f"need num_resamples >= 2 and 0 < confidence < 1, not {num_resamples} and {confidence}")
    positive, scores_a = _checked(labels, scores_a)
    _, scores_b = _checked(labels, scores_b)
    num_rows = len(positive)
    if positive.all() or not positive.any():
        return AucDifference(*[float("nan")] * 4)
    area_a, area_b = _WeightedAuc(positive, scores_a), _WeightedAuc(positive, scores_b)
    generator = np.random.default_rng(seed)
    differences = np.empty(num_resamples)
    for resample in range(num_resamples):
        weights = np.bincount(generator.integers(num_rows, size=num_rows, dtype=np.int32), minlength=num_rows)
        differences[resample] = area_a(weights) - area_b(weights)
    differences = differences[np.isfinite(differences)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    ones = np.ones(num_rows, dtype=np.int64)
    return AucDifference(area_a(ones) - area_b(ones), float(differences.std(ddof=1)), float(low), float(high))
