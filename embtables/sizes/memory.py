"""Bytes, counted from the storages that exist, by kind and by phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors."""
    # Storages on the meta device all begin at 0, so an address does not tell them apart.
    storages = [t.untyped_storage() for t in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def format_bytes(num_bytes: int) -> str:
    """``1536`` → ``"1.54 kB"``: decimal units, as budgets are written."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{num_bytes} B" if unit == "B" else f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


@dataclass(frozen=True)
class Memory:
    """What the tables occupy.

    ``inference_bytes``: the served form. ``training_bytes``: weights and the fused optimizer's state, or weights and
    their gradient where there is no fused optimizer (the state of a ``torch.optim`` optimizer comes on top).
    ``full_bytes``: the equivalent full fp32 tables, ``None`` where a table has no vocabulary. ``by_kind``: the present
    form's bytes. ``constants``: seeds, sizes and offsets of every lookup, which follow from the plan, are in no file
    and count in none of the others. ``dense_gradient_bytes``: of the gradients that each step fills as a whole,
    whatever it looks up; 0 with a fused optimizer, with sparse gradients, and where nothing trains. ``ops``: what these
    tables' ids go through, ``"native"`` code from ids to vectors or the ``"reference"`` in PyTorch.
    """

    inference_bytes: int
    training_bytes: int
    full_bytes: int | None
    by_kind: Mapping[str, int]
    constants: int
    dense_gradient_bytes: int = 0
    ops: str = "reference"

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {format_bytes(n)}" for kind, n in self.by_kind.items())
        ratio = f" ({self.inference_bytes / self.full_bytes:.2%} of full)" if self.full_bytes else ""
        return (
            f"inference {format_bytes(self.inference_bytes)}{ratio}: {kinds}; "
            f"training {format_bytes(self.training_bytes)}; constants {format_bytes(self.constants)}; ops {self.ops}"
            f"{self._cost_of_dense_gradients()}"
        )

    def _cost_of_dense_gradients(self) -> str:
        """A line of its own, where there are any."""
        size = self.dense_gradient_bytes
        if not size:
            return ""
        # The gradient is zeroed; weights and gradient are read, and weights written. Adam reads and writes two moments.
        sgd, adam = format_bytes(4 * size), format_bytes(8 * size)
        return (
            f"\noptimizer=None: each step fills a gradient of {format_bytes(size)}, and torch.optim passes over it, "
            f"the weights and its state, whatever is looked up (SGD moves {sgd}, Adam {adam}); a fused optimizer such "
            'as optimizer="rowwise_adagrad", or sparse=True with SparseAdam or Adagrad, moves only the rows looked up'
        )
