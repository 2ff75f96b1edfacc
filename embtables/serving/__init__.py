"""The served file: mapped into memory, read without the code that trains, replaced under its readers."""

from embtables.serving.deltas import compact
from embtables.serving.numpy_reader import NumpyTables
from embtables.serving.torch_reader import TorchTables
from embtables.serving.versions import Reader, Versions

__all__ = ["NumpyTables", "Reader", "TorchTables", "Versions", "compact"]
