"""Metrics against their definitions, written out pair by pair and row by row."""

from __future__ import annotations

import math
import time
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embtables.training import metrics


def pairwise_auc(labels, scores, weights=None):
    weights = [1] * len(labels) if weights is None else weights
    won = pairs = 0.0
    for label_i, score_i, weight_i in zip(labels, scores, weights):
        for label_j, score_j, weight_j in zip(labels, scores, weights):
            if label_i == 1 and label_j == 0:
                pairs += weight_i * weight_j
                won += weight_i * weight_j * (1.0 if score_i > score_j else 0.5 if score_i == score_j else 0.0)
    return won / pairs if pairs else math.nan


def same(value, expected):
    return value == pytest.approx(expected, abs=1e-12, nan_ok=True)


rows = st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3), st.integers(0, 4)), min_size=0, max_size=40)


@settings(max_examples=300, deadline=None)
@given(rows)
def test_auc_is_the_share_of_won_pairs(rows):
    labels = np.array([row[0] for row in rows])
    scores = np.array([row[1] / 7 for row in rows])
    assert same(metrics.auc(labels, scores), pairwise_auc(labels, scores))


def test_auc_of_distinct_float32_scores():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 300).astype(np.float32)
    scores = generator.normal(size=300).astype(np.float32)
    assert same(metrics.auc(labels, scores), pairwise_auc(labels, scores))


def test_auc_conventions():
    assert metrics.auc(np.array([0, 1, 1, 0]), np.full(4, 0.3)) == 0.5
    assert metrics.auc(np.array([0, 1]), np.array([0.1, 0.2])) == 1.0
    assert math.isnan(metrics.auc(np.ones(3), np.arange(3.0)))
    assert math.isnan(metrics.auc(np.zeros(3), np.arange(3.0)))
    assert math.isnan(metrics.auc(np.zeros(0), np.zeros(0)))
    assert metrics.auc(np.array([0, 1, 1]), np.array([-np.inf, np.inf, 0.0])) == 1.0


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.1], "one length"),
        ([0, 2], [0.1, 0.2], "row 1 has 2"),
        ([0, 1], [0.1, math.nan], "NaN, first in row 1"),
    ],
)
def test_auc_refuses(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        metrics.auc(np.array(labels), np.array(scores))


def test_auc_is_fast_and_does_not_overflow_on_millions_of_rows():
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, 3_000_000)
    scores = generator.integers(0, 1000, 3_000_000).astype(np.float32)
    start = time.perf_counter()
    area = metrics.auc(labels, scores)
    assert time.perf_counter() - start < 10
    # An independent way: the integral of the ROC curve by trapezia over the 1000 levels.
    hits = np.bincount(scores[labels == 1].astype(int), minlength=1000)[::-1].cumsum() / (labels == 1).sum()
    alarms = np.bincount(scores[labels == 0].astype(int), minlength=1000)[::-1].cumsum() / (labels == 0).sum()
    hits, alarms = np.append(0, hits), np.append(0, alarms)
    assert same(area, float(np.sum(np.diff(alarms) * (hits[1:] + hits[:-1]) / 2)))


def test_log_loss_and_normalized_entropy():
    labels, probabilities = [1, 0, 1, 0, 0], [0.9, 0.2, 0.5, 0.6, 0.01]
    expected = -sum(math.log(p if y else 1 - p) for y, p in zip(labels, probabilities)) / 5
    assert same(metrics.log_loss(np.array(labels), np.array(probabilities)), expected)
    entropy = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6))
    assert same(metrics.normalized_entropy(np.array(labels), np.array(probabilities)), expected / entropy)
    assert same(metrics.normalized_entropy(np.array(labels), np.full(5, 0.4)), 1.0)
    assert math.isnan(metrics.normalized_entropy(np.ones(2), np.full(2, 0.4)))
    assert math.isnan(metrics.log_loss(np.zeros(0), np.zeros(0)))


def test_calibration():
    # 2.21 clicks are expected in five rows, of which two are clicked.
    assert same(metrics.calibration(np.array([1, 0, 1, 0, 0]), np.array([0.9, 0.2, 0.5, 0.6, 0.01])), 2.21 / 2)
    assert math.isnan(metrics.calibration(np.zeros(3), np.full(3, 0.4)))
    assert math.isnan(metrics.calibration(np.zeros(0), np.zeros(0)))


def test_log_loss_is_clipped_and_refuses_logits():
    assert same(metrics.log_loss(np.array([1]), np.array([0.0])), -math.log(metrics.CLIP))
    assert metrics.log_loss(np.array([0], np.float32), np.array([1.0], np.float32)) == pytest.approx(
        -math.log(metrics.CLIP), rel=1e-6
    )
    with pytest.raises(ValueError, match="apply sigmoid"):
        metrics.log_loss(np.array([1, 0]), np.array([2.5, 0.1]))


def test_sigmoid():
    logits = np.array([-1000.0, -20.0, -1.0, 0.0, 2.0, 1000.0])
    expected = [0.0, *(1 / (1 + math.exp(-x)) for x in (-20.0, -1.0, 0.0, 2.0)), 1.0]
    np.testing.assert_allclose(metrics.sigmoid(logits), expected, rtol=1e-6, atol=1e-16)


@settings(max_examples=300, deadline=None)
@given(rows)
def test_grouped_auc(rows):
    by_group = defaultdict(list)
    for label, score, group in rows:
        by_group[group].append((label, score))
    area = {g: pairwise_auc([r[0] for r in part], [r[1] for r in part]) for g, part in by_group.items()}
    area = {g: value for g, value in area.items() if not math.isnan(value)}
    weight = sum(len(by_group[g]) for g in area)
    labels, scores, groups = (np.array([row[i] for row in rows], dtype=np.int64) for i in range(3))
    expected = sum(len(by_group[g]) * value for g, value in area.items()) / weight if area else math.nan
    assert same(metrics.gauc_weighted(labels, scores, groups), expected)
    assert same(metrics.gauc_mean(labels, scores, groups), sum(area.values()) / len(area) if area else math.nan)


def test_slices_by_hand():
    # ids                 0  1  2   3   4   5  6  7   8
    counts = np.array([0, 7, 40, 10, 25, 15, 5, 5, 0])
    # Traffic without id 1 is 100. By count: 40 and 25 start at 0 and 40 < 50 -> head; 15 at 65 and 10 at 80 -> torso;
    # 5 at 90 and 5 at 95 -> tail.
    names = [metrics.SLICES[code] for code in metrics.slice_of_ids(counts)]
    assert names == ["unseen", "unseen", "head", "torso", "head", "torso", "tail", "tail", "unseen"]
    with pytest.raises(ValueError, match="non-negative"):
        metrics.slice_of_ids(np.array([1, -1]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=30))
def test_slices_by_definition(counts):
    codes = metrics.slice_of_ids(np.array(counts))
    traffic = sum(count for i, count in enumerate(counts) if i != 1)
    before = 0
    for i in sorted((i for i in range(len(counts)) if i != 1), key=lambda i: (-counts[i], i)):
        share = before / traffic if traffic else 0
        expected = "unseen" if counts[i] == 0 else "head" if share < 0.5 else "torso" if share < 0.9 else "tail"
        assert metrics.SLICES[codes[i]] == expected
        before += counts[i]
    assert metrics.SLICES[codes[1]] == "unseen"


def test_slice_auc():
    counts = np.array([0, 0, 60, 30, 10])
    ids = np.array([2, 2, 3, 3, 3, 4, 1, 0])
    labels = np.array([1, 0, 1, 0, 0, 1, 1, 0])
    scores = np.array([0.2, 0.1, 0.5, 0.5, 0.7, 0.3, 0.1, 0.9])
    result = metrics.slice_auc(labels, scores, ids, counts)
    assert result["head"] == 1.0 and result["torso"] == 0.25 and result["unseen"] == 0.0
    assert math.isnan(result["tail"])


def test_weighted_auc_is_the_pairwise_definition():
    generator = np.random.default_rng(2)
    for _ in range(30):
        labels = generator.integers(0, 2, 25)
        scores = generator.integers(0, 6, 25) / 3
        weights = generator.integers(0, 4, 25)
        value = metrics._WeightedAuc(labels == 1, scores)(weights)
        assert same(value, pairwise_auc(labels, scores, weights))


def test_bootstrap_matches_resampling_the_rows():
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 2, 60)
    scores_a = labels + generator.normal(size=60)
    scores_b = np.round(labels + 2 * generator.normal(size=60), 1)
    result = metrics.bootstrap_auc_difference(labels, scores_a, scores_b, num_resamples=50, seed=9)
    draws = np.random.default_rng(9)
    expected = []
    for _ in range(50):
        rows = draws.integers(60, size=60, dtype=np.int32)
        expected.append(pairwise_auc(labels[rows], scores_a[rows]) - pairwise_auc(labels[rows], scores_b[rows]))
    assert same(result.difference, pairwise_auc(labels, scores_a) - pairwise_auc(labels, scores_b))
    assert result.standard_error == pytest.approx(np.std(expected, ddof=1))
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])))


def test_bootstrap_standard_error_is_the_spread_over_fresh_samples():
    def sample(generator):
        labels = generator.integers(0, 2, 2000)
        common = generator.normal(size=2000)
        return (
            labels,
            labels + common + 0.3 * generator.normal(size=2000),
            labels + common + generator.normal(size=2000),
        )

    generator = np.random.default_rng(4)
    spread = []
    for _ in range(300):
        labels, a, b = sample(generator)
        spread.append(metrics.auc(labels, a) - metrics.auc(labels, b))
    result = metrics.bootstrap_auc_difference(*sample(generator), num_resamples=400)
    assert result.standard_error == pytest.approx(np.std(spread), rel=0.2)


def test_bootstrap_of_equal_models_and_of_one_class():
    labels = np.array([0, 1, 0, 1, 1])
    result = metrics.bootstrap_auc_difference(labels, np.arange(5), np.arange(5) * 2.0, num_resamples=20)
    assert (result.difference, result.standard_error, result.low, result.high) == (0, 0, 0, 0)
    assert math.isnan(metrics.bootstrap_auc_difference(np.ones(5), np.arange(5), np.arange(5)).difference)
    with pytest.raises(ValueError, match="num_resamples"):
        metrics.bootstrap_auc_difference(labels, np.arange(5), np.arange(5), num_resamples=1)
