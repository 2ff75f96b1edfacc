"""embtables: memory-efficient embedding tables for click-through-rate models, planned to a byte budget."""

from embtables.budget import InfeasibleBudget
from embtables.config import TableConfig
from embtables.optimizers import SGD, Adagrad, Adam, RowWiseAdagrad
from embtables.plan import Plan, plan
from embtables.tables import EmbeddingTables

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "EmbeddingTables",
    "InfeasibleBudget",
    "Plan",
    "RowWiseAdagrad",
    "TableConfig",
    "plan",
]
