"""embtables: memory-efficient embedding tables for click-through-rate models, planned to a byte budget."""

from embtables.budget import InfeasibleBudget
from embtables.compress import compress_
from embtables.compression.report import Compression, SwappedTable
from embtables.config import TableConfig
from embtables.embedding import Embedding, EmbeddingBag
from embtables.optimizers import SGD, Adagrad, Adam, RowWiseAdagrad
from embtables.plan import Plan, plan
from embtables.tables import EmbeddingTables

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "Compression",
    "Embedding",
    "EmbeddingBag",
    "EmbeddingTables",
    "InfeasibleBudget",
    "Plan",
    "RowWiseAdagrad",
    "SwappedTable",
    "TableConfig",
    "compress_",
    "plan",
]
