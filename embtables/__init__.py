"""embtables: memory-efficient embedding tables for click-through-rate models, planned to a byte budget."""

from embtables.config import TableConfig
from embtables.faces.compress.report import Compression, SwappedTable
from embtables.faces.compress.swap import compress_
from embtables.faces.embedding import Embedding, EmbeddingBag
from embtables.optimizers import SGD, Adagrad, Adam, RowWiseAdagrad
from embtables.plan.solver import Plan, plan
from embtables.sizes.budget import InfeasibleBudget
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
