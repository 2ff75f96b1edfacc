"""Data with known truth: Zipf ids, planted effects, and the Bayes-optimal AUC."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import polars as pl
import typer

from embtables.datasets.dense_scale import Scale
from embtables.datasets.encoding import Encoding
from embtables.datasets.options import Seed, Shares
from embtables.datasets.prepared import LABEL, PreparedDataset
from embtables.datasets.reader import Reader
from embtables.datasets.splits import DEFAULT_SHARES, SPLITS, check_shares, random_split
from embtables.datasets.vocabulary import Vocabulary
from embtables.datasets.writing import Contents, Writer

CHUNK = 2**18
MOST_IDS = 10**8  # effects and probabilities of all ids lie in memory, 8 bytes each
PROBABILITY = "_probability"


@dataclass(frozen=True)
class Synthetic(Reader):
    """Zipf ids with planted effects, whose best possible AUC the manifest holds as bayes_auc.

    Feature f takes id r = 0 … cardinality − 1 with probability ∝ 1/(r + 1)^zipf. Labels are Bernoulli with

        logit = bias + Σ_f effect_f[id_f] + Σ_{f<g} ⟨vector_f[id_f], vector_g[id_g]⟩ + dense · weights

    Effects are normal and independent of an id's rank, with standard deviation ``effect_std``, one for all or one per
    feature. The pairwise term has standard deviation ``interaction_std`` in all and rank ``interaction_rank``; the
    dense term ``dense_std``, from ``num_dense`` standard normal features. In ``valid`` and ``test`` a share ``unseen``
    of each feature's ids comes from a reserved range that training never sees; their effects are 0, the mean, so that
    the Bayes-optimal prediction stays what a model of the training data could reach.
    """

    kind: ClassVar[str] = "synthetic"
    input_help: ClassVar[str] = "- : the data is generated."
    example: ClassVar[str] = (
        "Example: embtables prepare synthetic - data/toy --rows 500000 --cardinalities 50000,5000,500 --unseen 0.02"
    )

    rows: Annotated[int, typer.Option(help="Number of rows.")] = 1_000_000
    cardinalities: Annotated[tuple[int, ...], typer.Option(help="Number of ids of each feature.")] = (
        100_000,
        10_000,
        1_000,
    )
    zipf: Annotated[float, typer.Option(help="An id of rank r is drawn with probability ∝ 1/r^ZIPF.")] = 1.05
    bias: Annotated[float, typer.Option(help="Constant part of the logit.")] = -1.0
    effect_std: Annotated[
        tuple[float, ...], typer.Option(help="Standard deviation of the ids' effects: one, or one per feature.")
    ] = (1.0,)
    interaction_std: Annotated[float, typer.Option(help="Standard deviation of the pairwise part of the logit.")] = 0.0
    interaction_rank: Annotated[int, typer.Option(help="Length of the ids' vectors in the pairwise part.")] = 4
    num_dense: Annotated[int, typer.Option(help="Number of dense features.")] = 0
    dense_std: Annotated[float, typer.Option(help="Standard deviation of the dense part of the logit.")] = 0.5
    unseen: Annotated[float, typer.Option(help="Share of ids in valid and test that training never sees.")] = 0.0
    shares: Shares = DEFAULT_SHARES
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_shares(self.shares)
        if self.rows < 1:
            raise ValueError(f"rows {self.rows}: at least 1 is needed")
        if not self.cardinalities or min(self.cardinalities) < 1 or max(self.cardinalities) > MOST_IDS:
            raise ValueError(f"cardinalities {self.cardinalities}: one or more numbers from 1 to {MOST_IDS} are needed")
        numbers = ("zipf", self.zipf), ("bias", self.bias), ("interaction_std", self.interaction_std)
        more = ("dense_std", self.dense_std), *(("effect_std", std) for std in self.effect_std)
        for name, value in (*numbers, *more):
            if not math.isfinite(value):
                raise ValueError(f"{name} {value}: a finite number is needed")
        if len(self.effect_std) not in (1, len(self.cardinalities)):
            raise ValueError(
                f"effect_std has {len(self.effect_std)} values for {len(self.cardinalities)} features: "
                "give one, or one each"
            )
        if min(*self.effect_std, self.interaction_std, self.dense_std, self.zipf, self.num_dense, self.seed) < 0:
            raise ValueError("effect_std, interaction_std, dense_std, zipf, num_dense and seed cannot be negative")
        if self.interaction_rank < 1:
            raise ValueError(f"interaction_rank {self.interaction_rank}: at least 1 is needed")
        if not 0 <= self.unseen < 1:
            raise ValueError(f"unseen {self.unseen}: a share from 0 to below 1 is needed")

    @property
    def feature_names(self) -> list[str]:
        return [f"feature_{number}" for number in range(len(self.cardinalities))]

    def inputs(self, source: Path) -> list[Path]:
        if str(source) != "-":
            raise ValueError(f"INPUT {str(source)!r}: synthetic data has no input, write - in its place")
        return []

    def write(self, source: Path, writer: Writer) -> None:
        _fill(writer, self)


class Truth:
    """The drawn effects, and the rows they give."""

    def __init__(self, config: Synthetic) -> None:
        self.config = config
        generator = np.random.default_rng([config.seed, 0])
        num_features = len(config.cardinalities)
        stds = config.effect_std if len(config.effect_std) > 1 else config.effect_std * num_features
        self.effects = [std * generator.standard_normal(n) for std, n in zip(stds, config.cardinalities)]
        pairs = num_features * (num_features - 1) // 2
        self.vectors: list[np.ndarray] = []
        if config.interaction_std > 0 and pairs:
            # the product of two vectors of N(0, a²) numbers has variance rank · a⁴
            scale = (config.interaction_std**2 / (pairs * config.interaction_rank)) ** 0.25
            shapes = [(n, config.interaction_rank) for n in config.cardinalities]
            self.vectors = [(scale * generator.standard_normal(shape)).astype(np.float32) for shape in shapes]
        weights = generator.standard_normal(config.num_dense)
        self.weights = weights * (config.dense_std / max(float(np.linalg.norm(weights)), 1e-12))
        self._cumulative = {n: _zipf_cumulative(n, config.zipf) for n in set(config.cardinalities)}

    def chunks(self) -> Iterator[tuple[np.ndarray, list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (split codes, keys per feature, dense, probabilities, labels) chunk by chunk, always the same."""
        config = self.config
        for number, start in enumerate(range(0, config.rows, CHUNK)):
            generator = np.random.default_rng([config.seed, 1, number])
            rows = np.arange(start, min(start + CHUNK, config.rows))
            split = random_split(rows, config.seed, config.shares)
            logits = np.full(len(rows), config.bias)
            keys = []
            total, squares = np.zeros((len(rows), config.interaction_rank), np.float32), np.zeros(len(rows))
            for feature, cardinality in enumerate(config.cardinalities):
                ids = np.searchsorted(self._cumulative[cardinality], generator.random(len(rows)), side="right")
                unseen = (generator.random(len(rows)) < config.unseen) & (split > 0)
                logits += np.where(unseen, 0.0, self.effects[feature][ids])
                if self.vectors:  # Σ_{f<g} ⟨v_f, v_g⟩ = (|Σ v|² − Σ |v|²) / 2
                    vector = np.where(unseen[:, None], np.float32(0), self.vectors[feature][ids])
                    total, squares = total + vector, squares + (vector * vector).sum(1)
                keys.append(np.where(unseen, cardinality + ids, ids))
            if self.vectors:
                logits += (np.square(total).sum(1) - squares) / 2
            dense = generator.standard_normal((len(rows), config.num_dense)).astype(np.float32)
            logits += dense @ self.weights
            probabilities = 1 / (1 + np.exp(-logits))
            labels = generator.random(len(rows)) < probabilities
            yield split, keys, dense, probabilities, labels


def prepare_synthetic(out: str | Path, config: Synthetic = Synthetic(), *, progress: bool = False) -> PreparedDataset:
    """Generates and prepares; the manifest's ``bayes_auc`` and ``bayes_logloss`` are of the test split.

    Example::

        data = prepare_synthetic("runs/toy", Synthetic(rows=100_000, cardinalities=(1000, 100), seed=1))
    """
    return config.prepare("-", out, progress=progress)


def _fill(writer: Writer, config: Synthetic) -> None:
    truth = Truth(config)
    counts = [np.zeros(n, np.int64) for n in config.cardinalities]
    passes = writer.progress.add_task("Counting ids", total=2 * config.rows)
    for split, keys, _, _, _ in truth.chunks():
        for count, column in zip(counts, keys):
            count += np.bincount(column[split == 0], minlength=len(count))
        writer.progress.advance(passes, len(split))
    names = config.feature_names
    vocabularies = {name: Vocabulary(np.flatnonzero(count), count[count > 0]) for name, count in zip(names, counts)}
    dense_names = [f"dense_{number}" for number in range(config.num_dense)]
    largest = names[int(np.argmax(config.cardinalities))]
    writer.declare(Contents(vocabularies, dense_names, slice_feature=largest))
    writer.progress.update(passes, description="Writing rows")
    truths = []
    for split, keys, dense, probabilities, labels in truth.chunks():
        columns: dict[str, np.ndarray] = {LABEL: labels}
        columns |= {name: dense[:, number] for number, name in enumerate(dense_names)}
        columns |= {name: vocabularies[name].ids(column) for name, column in zip(names, keys)}
        columns[PROBABILITY] = probabilities
        frame = pl.DataFrame(columns)
        for code, split_name in enumerate(SPLITS):
            writer.write(split_name, frame.filter(pl.Series(split == code)))
        truths.append(probabilities[split == 2])
        writer.progress.advance(passes, len(split))
    writer.rows_read = config.rows
    test = np.concatenate(truths)
    writer.extra = {"bayes_auc": expected_auc(test), "bayes_logloss": expected_logloss(test)}
    as_it_is = Scale("none", mean=0.0, deviation=1.0, fill=0.0, missing=0)
    encoding = Encoding(
        columns={name: name for name in (*names, *dense_names)}, scales=dict.fromkeys(dense_names, as_it_is)
    )
    writer.extra["encoding"] = encoding.model_dump()


def expected_auc(probabilities: Sequence[float] | np.ndarray) -> float:
    """AUC of scoring independent Bernoulli rows by their own probability, in expectation over the labels.

    Σ_{i≠j} p_i (1 − p_j) [p_i > p_j, ties ½] / Σ_{i≠j} p_i (1 − p_j), in O(n log n).
    """
    p, counts = np.unique(np.asarray(probabilities, np.float64), return_counts=True)
    positives, negatives = p * counts, (1 - p) * counts
    below = np.cumsum(negatives) - negatives
    itself = (p * (1 - p) * counts).sum()  # Σ_i p_i (1 − p_i): no row is compared with itself
    concordant = (positives * (below + negatives / 2)).sum() - itself / 2
    pairs = positives.sum() * negatives.sum() - itself
    return float(concordant / pairs) if pairs > 0 else math.nan


def expected_logloss(probabilities: Sequence[float] | np.ndarray) -> float:
    """Log loss (nats) of predicting each row's own probability: the mean entropy."""
    p = np.clip(np.asarray(probabilities, np.float64), 1e-300, 1 - 1e-16)
    if len(p) == 0:
        return math.nan
    return float(-(p * np.log(p) + (1 - p) * np.log1p(-p)).mean())


def _zipf_cumulative(cardinality: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, cardinality + 1, dtype=np.float64) ** -exponent
    cumulative = np.cumsum(weights)
    cumulative /= cumulative[-1]
    return cumulative
