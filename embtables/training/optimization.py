"""The optimizers of the tables and of the rest: clipping, learning rates, and what a checkpoint keeps of them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from embtables.tables import EmbeddingTables
from embtables.training.config import TORCH_OPTIMIZERS, RunConfig

__all__ = ["Optimization", "clip_gradients"]


class Optimization:
    """What happens between two gradients. Tables with a fused optimizer are updated in backward, the rest in ``step``.

    Raises:
        ValueError: an optimizer of the tables that cannot do what is asked of it.
    """

    def __init__(self, config: RunConfig, model: nn.Module, tables: EmbeddingTables) -> None:
        self.config, self.fused = config, tables
        of_tables = list(tables.parameters())
        ours = {id(parameter) for parameter in of_tables}
        of_rest = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in ours}
        self.parameters = [*of_tables, *of_rest.values()]
        self.tables = self._of_tables(of_tables) if of_tables else None
        dense = config.dense
        self.dense = (
            _optimizer(dense.optimizer, _groups(of_rest, dense.weight_decay), lr=dense.learning_rate)
            if of_rest
            else None
        )
        self.table_rate, self.dense_rate = config.tables.learning_rate, dense.learning_rate

    def _of_tables(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """For tables that are ordinary parameters."""
        tables = self.config.tables
        assert tables.learning_rate is not None  # resolved by the configuration
        if tables.optimizer_kind == "adam" and tables.sparse_gradients:
            return torch.optim.SparseAdam(parameters, lr=tables.learning_rate)
        if tables.sparse_gradients:
            return TORCH_OPTIMIZERS[tables.optimizer_kind](parameters, lr=tables.learning_rate, weight_decay=tables.l2)
        groups = [{"params": parameters, "weight_decay": tables.l2}]
        return _optimizer(tables.optimizer_kind, groups, lr=tables.learning_rate)

    def _each(self) -> list[torch.optim.Optimizer]:
        return [optimizer for optimizer in (self.dense, self.tables) if optimizer is not None]

    def zero_grad(self) -> None:
        for optimizer in self._each():
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        if self.config.training.clip_norm is not None:
            clip_gradients(self.parameters, self.config.training.clip_norm)
        for optimizer in self._each():
            optimizer.step()

    # ---- learning rates ------------------------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, float | None]:
        return {
            "learning_rate/tables": self.table_rate,
            "learning_rate/dense": self.dense_rate if self.dense is not None else None,
        }

    def lower_learning_rates(self, factor: float, least: float) -> None:
        """Both rates times ``factor``, but not below ``least``; a rate that is below it already stays."""
        assert self.table_rate is not None
        self._set_rates(*(min(rate, max(rate * factor, least)) for rate in (self.table_rate, self.dense_rate)))

    def _set_rates(self, tables: float, dense: float) -> None:
        self.table_rate, self.dense_rate = tables, dense
        if self.config.tables.fused:
            self.fused.set_learning_rate(tables)
        for optimizer, rate in ((self.tables, tables), (self.dense, dense)):
            for group in optimizer.param_groups if optimizer is not None else []:
                group["lr"] = rate

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The optimizers of dense gradients and the learning rates; the model holds the state of a fused one."""
        return {
            "tables": self.tables and self.tables.state_dict(),
            "dense": self.dense and self.dense.state_dict(),
            "learning_rates": [self.table_rate, self.dense_rate],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rates = [float(rate) for rate in state["learning_rates"]]
        if not all(0 <= rate < math.inf for rate in rates):
            raise ValueError(f"its learning rates are {rates}")
        for name, optimizer in (("tables", self.tables), ("dense", self.dense)):
            if optimizer is not None:
                _check_state(optimizer, state[name])
                optimizer.load_state_dict(state[name])
        self._set_rates(*rates)


# What each optimizer keeps of a parameter that it has stepped: a tensor of its shape, a scalar as a tensor, a number.
_KEPT: dict[type[torch.optim.Optimizer], dict[str, str]] = {
    torch.optim.Adam: {"step": "scalar", "exp_avg": "alike", "exp_avg_sq": "alike"},
    torch.optim.SparseAdam: {"step": "number", "exp_avg": "alike", "exp_avg_sq": "alike"},
    torch.optim.Adagrad: {"step": "scalar", "sum": "alike"},
    torch.optim.SGD: {},
}


def _check_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for a state that is not this optimizer's: its kernels trust the sizes that they find."""
    own, groups = optimizer.state_dict()["param_groups"], state["param_groups"]
    same = len(groups) == len(own) and all(
        name == "lr" or (name in group and group[name] == value)
        for group, ours in zip(groups, own)
        for name, value in ours.items()
    )
    if not same:
        raise ValueError(f"its groups of parameters are those of another {type(optimizer).__name__}")
    parameters, kinds = [p for group in optimizer.param_groups for p in group["params"]], _KEPT[type(optimizer)]
    for number, kept in state["state"].items():
        if number not in range(len(parameters)) or (kept and set(kept) != set(kinds)):
            raise ValueError(f"its optimizer keeps {', '.join(map(str, kept))} of parameter {number}")
        for name, value in kept.items():
            shape = parameters[number].shape if kinds[name] == "alike" else torch.Size([])
            if kinds[name] == "number":
                good = isinstance(value, int)
            else:
                good = isinstance(value, Tensor) and value.shape == shape and value.dtype == torch.float32
            if not good:
                raise ValueError(f"its optimizer keeps a {name} of parameter {number} that does not fit it")


def _groups(parameters: Mapping[str, nn.Parameter], weight_decay: float | Mapping[str, float]) -> list[dict[str, Any]]:
    """The parameters by their weight decay: where patterns say it, that of the first that fits a name, else none.

    Raises:
        ValueError: a pattern that fits no parameter.
    """
    if not isinstance(weight_decay, Mapping):
        return [{"params": list(parameters.values()), "weight_decay": weight_decay}]
    for pattern in weight_decay:
        if not fnmatch.filter(parameters, pattern):
            raise ValueError(
                f"dense.weight_decay: no parameter is named as {pattern!r}; there is {', '.join(parameters)}"
            )
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = next((decay for pattern, decay in weight_decay.items() if fnmatch.fnmatchcase(name, pattern)), 0.0)
        groups.setdefault(decay, []).append(parameter)
    return [{"params": members, "weight_decay": decay} for decay, members in groups.items()]


def _optimizer(name: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """The optimizer of dense gradients, in one pass over each parameter where torch can do it so."""
    devices = {"cpu"} if name == "adagrad" else {"cpu", "cuda"}
    fused = all(p.is_floating_point() and p.device.type in devices for group in groups for p in group["params"])
    # ``None`` is torch's own choice among the others.
    return TORCH_OPTIMIZERS[name](groups, lr=lr, fused=fused or None)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Scale all gradients together so that their global Euclidean norm is at most ``most``; sparse ones too."""
    gradients: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # a row that occurs twice counts by its sum
            gradients.append(parameter.grad.values())
        else:
            gradients.append(parameter.grad)
    if not gradients:
        return
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
