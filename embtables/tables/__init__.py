"""The module that users hold, ``EmbeddingTables``: built from a plan, looked up, saved and loaded."""

from embtables.tables.module import EmbeddingTables

__all__ = ["EmbeddingTables"]
