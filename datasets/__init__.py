"""Readers of public data sets and the prepared format that they write."""

from embtables.datasets.batch import Batch, Jagged
from embtables.datasets.prepared import PreparedDataset
from embtables.datasets.readers.synthetic import Synthetic, prepare_synthetic

__all__ = ["Batch", "Jagged", "PreparedDataset", "Synthetic", "prepare_synthetic"]
