"""Activations by name, and batch normalization for batches of any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "BatchNorm", "Dice", "make_activation"]

ACTIVATIONS = ("relu", "sigmoid", "prelu", "dice")


class BatchNorm(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over [n, C] that takes any n.

    Fewer than two rows have no variance: in training they are normalized with the running statistics, which they leave
    as they are.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and inputs.shape[0] < 2:
            return F.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(inputs)


class Dice(nn.Module):
    """The data-adaptive activation of DIN, eq. 3: f(s) = p·s + (1 − p)·α·s with p = σ((s − E[s]) / √(Var[s] + ε)).

    [n, C] -> [n, C]. Mean and variance of every channel are the batch's in training and running ones after it; α, one
    a channel, is learned from 0. The authors' released code also learns a factor β before the σ; the paper has none,
    and neither has this. ε is 10⁻⁸, as in the paper: with the 10⁻⁵ of ``nn.BatchNorm1d`` p would be ½ everywhere as
    long as the embeddings are small.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm(num_channels, eps=1e-8, affine=False)
        self.alpha = nn.Parameter(torch.zeros(num_channels))

    def forward(self, inputs: Tensor) -> Tensor:
        share = self.norm(inputs).sigmoid()
        # In the inputs' precision: under autocast a float32 α would turn every [n, C] here into float32.
        alpha = self.alpha.to(inputs.dtype)
        return inputs * torch.addcmul(alpha, 1 - alpha, share)


def make_activation(name: str, num_channels: int) -> nn.Module:
    """The module [n, num_channels] -> [n, num_channels] of that name; ``prelu`` learns a slope a channel, from ¼."""
    if name == "dice":
        return Dice(num_channels)
    if name == "prelu":
        return nn.PReLU(num_channels)
    return {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}[name]()
