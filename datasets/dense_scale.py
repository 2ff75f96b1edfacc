"""The scale of dense features, from the training rows alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SCALES = ("standard", "log", "none")


@dataclass(frozen=True)
class Scale:
    """How a column of numbers becomes a dense feature.

    With ``kind`` "standard" it is (x − mean) / deviation, with "log" ln(1 + max(x, 0)), with "none" x itself. Where x
    is missing the feature has its mean over the training rows, which is 0 with "standard".
    """

    kind: str
    mean: float  # of x in the training rows
    deviation: float  # of x in the training rows; 1 where all are alike
    fill: float  # of the feature, where x is missing
    missing: int  # training rows without x

    @staticmethod
    def of(numbers: np.ndarray, kind: str) -> Scale:
        """The scale of the training rows' numbers, float64, NaN where one is missing."""
        present = numbers[~np.isnan(numbers)]
        mean = float(present.mean()) if len(present) else 0.0
        deviation = float(present.std()) if len(present) else 0.0
        deviation = deviation if deviation > 1e-9 * abs(mean) and np.isfinite(deviation) else 1.0
        filled = Scale(kind, mean, deviation, 0.0, len(numbers) - len(present))
        fill = float(filled._scaled(present).mean()) if kind != "standard" and len(present) else 0.0
        return Scale(kind, mean, deviation, fill, filled.missing)

    def apply(self, numbers: np.ndarray) -> np.ndarray:
        """The feature, float32."""
        return np.where(np.isnan(numbers), self.fill, self._scaled(numbers)).astype(np.float32)

    def _scaled(self, numbers: np.ndarray) -> np.ndarray:
        if self.kind == "log":
            return np.log1p(np.maximum(numbers, 0))
        return (numbers - self.mean) / self.deviation if self.kind == "standard" else numbers
