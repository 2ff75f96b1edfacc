"""Readers of public data sets and the prepared format that they write."""

from .prepared import Batch, Jagged, PreparedDataset
from .synthetic import Synthetic, prepare_synthetic

__all__ = ["Batch", "Jagged", "PreparedDataset", "Synthetic", "prepare_synthetic"]
