"""The part of ``EmbeddingTables`` that takes on the forms of a plan: the trained one, and those that are served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from typing_extensions import Self

from embtables.lookup.store import Store
from embtables.methods.base import Stage
from embtables.plan.solver import Plan
from embtables.tables.averages import mean_of
from embtables.tables.build import build_blocks, build_stages
from embtables.tables.looking_up import TableLookup


class PlannedTables(TableLookup):
    """Tables of a plan, in the form that is trained or in one that is served.

    Attributes:
        plan: what they are.
        seed: of the initial weights.
        std: of the initial outputs, where it was given.
    """

    plan: Plan
    seed: int
    std: float | None

    def _build(self, store: Store, stages: list[Stage] | None = None) -> None:
        """The lookup over a store: a block for each group, variant and dimension; stages begin, or are these."""
        blocks, order = build_blocks(self.plan, store, self.feature_names, served=self.served)
        if stages is None:
            stages = [] if self.served else build_stages(self.plan, store)
        self._look_up_in(store, blocks, order, stages)
        self.train(self.training)  # new modules begin in training mode

    @torch.no_grad()
    def serve(self, plan: Plan | None = None) -> Self:
        """The tables in the form that is exported; the same object where that is the trained form.

        Args:
            plan: another plan of the same training, such as one of another precision, to whose form they are brought;
                ``None`` for their own. Served tables take another one where their form is that of the training.

        Raises:
            ValueError: for a plan whose tables train otherwise, and another one than their own for served tables that
                lost something.
        """
        target = self._checked_plan(plan)
        if target is self.plan and (self.served or _serves_what_it_trains(target)):
            return self
        return self._served_from(self.store, target)

    @torch.no_grad()
    def averaged(self, plan: Plan | None = None) -> Self:
        """The running mean of the weights in the form that is exported, as new tables; these stay as they are.

        With a plan whose optimizer keeps one (``embtables.optimizers.averaged``).

        Args:
            plan: as in ``serve``.

        Raises:
            ValueError: where the optimizer keeps none, for served tables, and for a plan as in ``serve``.
        """
        target = self._checked_plan(plan)
        optimizer = self.plan.optimizer
        if self.served or optimizer is None or not optimizer.keeps_mean:
            raise ValueError(
                "these tables keep no running mean of their weights: plan with "
                "optimizer=embtables.optimizers.averaged(Adam(), horizon=1000)"
            )
        return self._served_from(mean_of(self.store, self.plan), target)

    def _checked_plan(self, plan: Plan | None) -> Plan:
        """The plan by which these tables are to be served."""
        if plan is not None and not isinstance(plan, Plan):
            raise TypeError(f"tables are served by a plan, not a {type(plan).__name__}")
        if plan is None or plan is self.plan or plan.fingerprint == self.plan.fingerprint:
            return self.plan
        if self.served and not _serves_what_it_trains(self.plan):
            raise ValueError("served tables stay in the form that they have")
        if plan.training_fingerprint != self.plan.training_fingerprint:
            raise ValueError(
                "the tables of that plan train otherwise, so that these cannot be served in its form: plans may differ "
                "in precision, and in the budget of a method that trains the same for every budget, as matryoshka does"
            )
        return plan

    def _served_from(self, trained: Store, plan: Plan) -> Self:
        served = self._empty_served(plan, trained.device)
        served.to(trained.dtype)
        for g in plan.groups:
            g.method.serve(g.layout, g.group, trained, served.store)
        return served.train(self.training)

    def finalize(self) -> Self:
        """Takes on the served form, in place, and returns this module; nothing changes where it is the trained one."""
        served = self.serve()
        if served is not self:
            self.served = True
            self._build(served.store)
        return self

    @contextmanager
    def as_served(self) -> Iterator[None]:
        """Within this ``with`` block lookups give what ``finalize`` would make of them; afterwards all is as before."""
        if self.served:
            yield
            return
        trained, stages = self.store, self.stages
        self.finalize()
        try:
            yield
        finally:
            self.served = False
            self._build(trained, stages)

    @classmethod
    def _empty_served(cls, plan: Plan, device: torch.device | str | None) -> Self:
        return cls._served_over(plan, _served_store(plan, device))

    @classmethod
    def _served_with(cls, plan: Plan, tensors: Mapping[str, Tensor], device: torch.device | str | None) -> Self:
        """Tables that hold these tensors, by their attributes in the store, which are not copied on their device."""
        store = _served_store(plan, "meta")
        device = torch.get_default_device() if device is None else torch.device(device)
        store.leave_meta(device)
        store.take({name: tensor.to(device) for name, tensor in tensors.items()})
        return cls._served_over(plan, store)

    @classmethod
    def _served_over(cls, plan: Plan, store: Store) -> Self:
        tables = cls.__new__(cls)
        TableLookup.__init__(tables, plan.tables, served=True)
        tables.plan, tables.seed, tables.std = plan, 0, None
        tables._build(store)
        return tables


def _served_store(plan: Plan, device: torch.device | str | None) -> Store:
    return Store([g.layout.serving for g in plan.groups], None, trainable=False, device=device)


def _serves_what_it_trains(plan: Plan) -> bool:
    return all(g.layout.serving == g.layout.training for g in plan.groups)
