"""From tables, a method and a budget to exact sizes and bytes: ``solver`` has ``Plan`` and ``plan``.

Nothing here allocates a tensor of a table.
"""

from embtables.plan.solver import Plan, plan

__all__ = ["Plan", "plan"]
