"""Not a way to store tables, but to choose one: what ``plan`` puts another method in the place of."""

from __future__ import annotations

from typing import Any, ClassVar

from embtables.methods.banded import Banded
from embtables.methods.base import Floor, Method
from embtables.methods.full import Full
from embtables.optimizers import FusedOptimizer
from embtables.sizes.layout import Group, Layout

# int8 costs no accuracy that is seen on the data sets of docs/results, and leaves room for four times the rows.
_PRECISION = "int8"


class Auto(Method):
    """The method that costs least within the budget, chosen by ``plan``, which says what it chose: ``Plan.explain``.

    With a probe of the data it is the winner of the race whose budget is nearest. Without one it is a rule that goes by
    the counts of ids alone: ``banded``, the most frequent ids of all tables first and in most bits; and ``full`` where
    the budget holds all tables as they are.

    Args:
        precision: of the largest rows that the rule gives; int8 by default. A method that won a race has its own.
    """

    kind: ClassVar[str] = "auto"
    chooses: ClassVar[bool] = True

    @property
    def rule(self) -> Banded:
        """The method that counts alone speak for."""
        return Banded(precision=self.precision or _PRECISION)

    def without_probe(self, group: Group, limit: int, worth: dict[str, float] | None = None) -> str | dict[str, Any]:
        """What the rule says of tables within a budget, as ``plan`` takes it; ``worth``: theirs, if it is known."""
        if self.precision is None and limit >= group.full_bytes:
            return Full.kind
        return {"kind": Banded.kind, "precision": self.rule.precision} | ({} if worth is None else {"worth": worth})

    def check(self, group: Group, optimizer: FusedOptimizer | None) -> None:
        self.rule.check(group, optimizer)

    def floor(self, group: Group) -> Floor:
        return self.rule.floor(group)

    def fit(self, group: Group, limit: int) -> Layout:
        return self.rule.fit(group, limit)
