"""Readers of public data sets and the prepared format that they write."""

from .prepared import PreparedDataset
from .rows import Batch, Jagged
from .synthetic import Synthetic, prepare_synthetic

__all__ = ["Batch", "Jagged", "PreparedDataset", "Synthetic", "prepare_synthetic"]
