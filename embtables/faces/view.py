"""What the modules that look up in an ``EmbeddingTables`` have in common: each may be one of several over it."""

from __future__ import annotations

from torch import nn
from typing_extensions import Self

from embtables.tables import EmbeddingTables


class View(nn.Module):
    """A module whose lookups are those of ``tables``, which other modules may share."""

    tables: EmbeddingTables
    _frozen = False

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freezes this module's lookups, or has them train again.

        With a fused optimizer it freezes the lookups of this view alone, and other views of the same tables train on;
        ``tables.requires_grad_(False)`` freezes them all, until ``True`` is said to the tables or to a view. With
        ``optimizer=None`` it acts on the parameters, which all views share.
        """
        super().requires_grad_(requires_grad)
        self._frozen = not requires_grad
        if requires_grad:
            self.tables.requires_grad_()
        return self

    @property
    def learns(self) -> bool:
        """Whether a lookup now is meant to train: in training mode, and not where this view is frozen."""
        # Parameters say it themselves, and another view may have set them free again.
        return self.training and not (self._frozen and self.tables.store.optimizer is not None)
