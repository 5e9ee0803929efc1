"""What every training does with its gradients: rate of a step, SGD, sums over workers, moving averages."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import distributed, nn


class Recipe(Protocol):
    """What a training sets of this."""

    steps: int
    lr: float
    warmup: int
    schedule: str
    momentum: float
    weight_decay: float


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the rate of a step: warmed up in a line, then by the schedule.

    "cosine": lr · cos(7 π t / 16 T), as published; "steps": a tenth after 0.6 T, and again after 0.8 T, as
    EMAN's; "half-cosine": lr · (1 + cos(π t / T)) / 2, as SimCLR's and MoCo v2's; "constant".
    """
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    match recipe.schedule:
        case "cosine":
            return recipe.lr * math.cos(7 * math.pi / 16 * share)
        case "half-cosine":
            return recipe.lr * (1 + math.cos(math.pi * share)) / 2
        case "steps":
            return recipe.lr * 0.1 ** sum(step >= part * recipe.steps for part in (0.6, 0.8))
        case _:
            return recipe.lr


def optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Return SGD with Nesterov's momentum, whose weight decay spares biases and norms."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    spared = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": spared}]
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, keep: float, *, statistics: bool) -> None:
    """Move the average: average ← keep · average + (1 - keep) · network.

    statistics: batch statistics are averaged as well (EMAN); else they are copied.
    """
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - keep)
    for mine, theirs in zip(average.buffers(), network.buffers(), strict=True):
        if statistics and mine.is_floating_point():
            mine.lerp_(theirs, 1 - keep)
        else:
            mine.copy_(theirs)


def summed(x: torch.Tensor) -> torch.Tensor:
    """Add up a tensor over all workers; without a gradient."""
    x = x.detach().clone()
    if distributed.is_initialized():
        distributed.all_reduce(x)
    return x


def add_gradients(network: nn.Module) -> None:
    """Add up the gradients of all workers in one message."""
    given = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in given])
    distributed.all_reduce(flat)
    for gradient, summed in zip(given, flat.split([g.numel() for g in given]), strict=True):
        gradient.copy_(summed.view_as(gradient))
