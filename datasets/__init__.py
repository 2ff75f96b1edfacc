"""Readers of public data sets and the prepared format that they write."""

from .prepared import Batch, PreparedDataset
from .synthetic import Synthetic, prepare_synthetic

__all__ = ["Batch", "PreparedDataset", "Synthetic", "prepare_synthetic"]
