"""Prepared data sets, the readers that make them, and what the author of a reader needs."""

from embtables.datasets.batch import Batch, Jagged
from embtables.datasets.prepared import PreparedDataset
from embtables.datasets.reader import Reader, RowReader
from embtables.datasets.readers.synthetic import Synthetic, prepare_synthetic
from embtables.datasets.rejections import Rejections
from embtables.datasets.row_keys import Schema
from embtables.datasets.text import Block, Format, read_lines, read_text
from embtables.datasets.writing import Writer

__all__ = [
    "Batch",
    "Block",
    "Format",
    "Jagged",
    "PreparedDataset",
    "Reader",
    "Rejections",
    "RowReader",
    "Schema",
    "Synthetic",
    "Writer",
    "prepare_synthetic",
    "read_lines",
    "read_text",
]
