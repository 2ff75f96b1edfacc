"""The first weights of a model's linear layers, by the name that ``torch.nn.init`` gives the rule."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["INITIALIZATIONS", "initialize"]

INITIALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "xavier_normal": nn.init.xavier_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "orthogonal": nn.init.orthogonal_,
}
"""Rules that need no more than a matrix. Glorot & Bengio, AISTATS 2010 (xavier); He et al., ICCV 2015 (kaiming)."""


def initialize(model: nn.Module, name: str | None) -> None:
    """Draws the weights of every ``nn.Linear`` anew and sets its bias to 0; ``None`` leaves a model as it was built.

    Raises:
        KeyError: for a name that is not in ``INITIALIZATIONS``.
    """
    if name is None:
        return
    for module in model.modules():
        if isinstance(module, nn.Linear):
            INITIALIZATIONS[name](module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
