"""Synthetic data: the truth that is planted is the truth that is written."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embtables.datasets import PreparedDataset, Synthetic, prepare_synthetic
from embtables.datasets.readers.synthetic import Truth, expected_auc, expected_logloss


@given(st.lists(st.sampled_from([0.01, 0.2, 0.2, 0.5, 0.9]), min_size=2, max_size=12))
def test_expected_auc_and_logloss_against_loops(p: list[float]) -> None:
    concordant = pairs = 0.0
    for i, positive in enumerate(p):
        for j, negative in enumerate(p):
            if i != j:
                weight = positive * (1 - negative)
                pairs += weight
                concordant += weight * (1 if positive > negative else 0.5 if positive == negative else 0)
    assert expected_auc(p) == pytest.approx(concordant / pairs, abs=1e-12)
    entropy = [-q * math.log(q) - (1 - q) * math.log(1 - q) for q in p]
    assert expected_logloss(p) == pytest.approx(sum(entropy) / len(p), abs=1e-12)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    ranks = pl.Series(scores).rank("average").to_numpy()
    positives = labels.sum()
    return (ranks[labels > 0].sum() - positives * (positives + 1) / 2) / (positives * (len(labels) - positives))


def test_manifest_tells_the_auc_of_the_true_probabilities(tmp_path: Path) -> None:
    config = Synthetic(rows=300_000, cardinalities=(500, 50), num_dense=3, interaction_std=0.7, shares=(0.4, 0.1, 0.5))
    data = prepare_synthetic(tmp_path / "toy", config)
    test = pl.DataFrame(pl.from_arrow(data.read("test")))
    p, labels = test["_probability"].to_numpy(), test["label"].to_numpy()
    assert abs(auc(p, labels) - data.manifest["bayes_auc"]) < 0.004  # five standard errors at 150,000 rows
    logloss = -np.where(labels > 0, np.log(p), np.log1p(-p)).mean()
    assert abs(logloss - data.manifest["bayes_logloss"]) < 0.005
    for low in np.arange(0.05, 0.95, 0.1):  # labels are drawn from the probabilities
        inside = (p > low) & (p < low + 0.1)
        assert abs(labels[inside].mean() - p[inside].mean()) < 5 * 0.5 / math.sqrt(inside.sum())


def test_logits_are_the_sum_that_is_promised() -> None:
    config = Synthetic(rows=2000, cardinalities=(40, 30, 20), num_dense=2, interaction_std=0.8, unseen=0.3, bias=-0.7)
    truth = Truth(config)
    split, keys, dense, probabilities, _ = next(truth.chunks())
    for row in range(300):
        logit = -0.7 + sum(float(dense[row, d]) * truth.weights[d] for d in range(2))
        known = [f for f in range(3) if keys[f][row] < config.cardinalities[f]]
        assert len(known) == 3 or split[row] > 0
        for f in known:
            logit += truth.effects[f][keys[f][row]]
            for g in known:
                if f < g:
                    logit += float(truth.vectors[f][keys[f][row]] @ truth.vectors[g][keys[g][row]])
        assert probabilities[row] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6)


def test_the_parts_of_the_logit_have_the_chosen_spread() -> None:
    quiet = dict(rows=1, zipf=0.0, bias=0.0)
    effects = Truth(Synthetic(cardinalities=(50_000, 50_000), effect_std=(2.0, 0.5), **quiet)).effects
    assert [effect.std() for effect in effects] == [pytest.approx(2.0, rel=0.02), pytest.approx(0.5, rel=0.02)]
    ranks = np.arange(50_000)
    assert abs(np.corrcoef(ranks, effects[0])[0, 1]) < 0.02 and abs(np.corrcoef(ranks, abs(effects[0]))[0, 1]) < 0.02
    config = Synthetic(rows=200_000, cardinalities=(9999,) * 3, zipf=0.0, effect_std=(0.0,), interaction_std=1.5)
    p = np.concatenate([chunk[3] for chunk in Truth(config).chunks()])
    assert np.std(np.log(p / (1 - p))) == pytest.approx(1.5, rel=0.05)
    config = Synthetic(rows=200_000, cardinalities=(9,), effect_std=(0.0,), num_dense=5, dense_std=0.6)
    p = np.concatenate([chunk[3] for chunk in Truth(config).chunks()])
    assert np.std(np.log(p / (1 - p))) == pytest.approx(0.6, rel=0.02)


def test_zipf_unseen_share_and_frequencies(tmp_path: Path) -> None:
    config = Synthetic(rows=200_000, cardinalities=(300, 20), zipf=1.2, unseen=0.1, shares=(0.6, 0.2, 0.2))
    data = prepare_synthetic(tmp_path / "toy", config)
    weights = np.arange(1, 301) ** -1.2
    counts = data.frequencies["feature_0"]
    train = pl.DataFrame(pl.from_arrow(data.read("train")))
    assert np.array_equal(counts, np.bincount(train["feature_0"], minlength=302))
    assert counts[2] / counts.sum() == pytest.approx(weights[0] / weights.sum(), rel=0.02)
    assert counts[:2].tolist() == [0, 0] and (np.diff(counts[2:]) <= 0).all()
    assert data.num_embeddings == {"feature_0": 302, "feature_1": 22}
    for split in ("valid", "test"):
        for name in data.feature_names:
            share = float((data.read(split, [name]).column(name).to_numpy() == 1).mean())
            assert share == pytest.approx(0.1, abs=0.006)
    assert data.slice_feature == "feature_0" and data.dense_features == [] and data.group_feature is None
    batch = next(data.batches("train", 10))
    assert batch.dense.shape == (10, 0) and batch.ids.shape == (10, 2) and batch.groups is None


def test_more_rows_begin_with_the_same_rows_and_seeds_differ() -> None:
    few = next(Truth(Synthetic(rows=1000, seed=1)).chunks())
    other = next(Truth(Synthetic(rows=1000, seed=2)).chunks())
    assert not np.array_equal(few[1][0], other[1][0])
    again = next(Truth(Synthetic(rows=1000, seed=1)).chunks())
    assert all(np.array_equal(a, b) for a, b in zip(few[1], again[1])) and np.array_equal(few[4], again[4])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rows": 0}, "rows 0"),
        ({"cardinalities": ()}, "cardinalities"),
        ({"cardinalities": (5, 0)}, "cardinalities"),
        ({"cardinalities": (5, 10**12)}, "numbers from 1 to 100000000"),
        ({"bias": float("nan")}, "bias nan: a finite number"),
        ({"effect_std": (1.0, float("inf"), 1.0)}, "effect_std inf"),
        ({"effect_std": (1.0, 1.0)}, "2 values for 3 features"),
        ({"unseen": 1.0}, "unseen 1.0"),
        ({"zipf": -1.0}, "cannot be negative"),
        ({"shares": (0.5, 0.5)}, "shares"),
    ],
)
def test_bad_options(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Synthetic(**options)


def test_a_path_as_text(tmp_path: Path) -> None:
    assert PreparedDataset(str(prepare_synthetic(str(tmp_path / "x"), Synthetic(rows=500)).path)).name == "x"
