"""Batch norm where a step is shared by several workers, or where groups of its images are to differ."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed, nn
from torch.nn import functional as F

from selective_ray.optimization import summed


class _Summed(torch.autograd.Function):
    """The sum over all workers; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        distributed.all_reduce(gradient)
        return gradient


def _take_over(module: nn.Module, layer: nn.modules.batchnorm._BatchNorm) -> None:
    """Give a module what a layer knows, by the same names, so that either reads the other's state."""
    module.weight, module.bias, module.eps = layer.weight, layer.bias, layer.eps
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        module.register_buffer(name, getattr(layer, name))


class GlobalBatchNorm(nn.Module):
    """Batch norm over the batches of all workers, on the CPU, where torch's SyncBatchNorm does not run.

    Takes the parameters and statistics of the layer in whose place it stands. Mean first and then the mean
    of squared differences: sums of squares alone would cancel.
    """

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        _take_over(self, layer)
        self.momentum = layer.momentum

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize [b, c, h, w]."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        dims = (0, 2, 3)
        size = torch.tensor([x.numel() / x.shape[1]], dtype=x.dtype)
        total = _Summed.apply(torch.cat([x.sum(dims), size]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centered = x - mean[:, None, None]
        variance = _Summed.apply((centered * centered).sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centered * scale[:, None, None] + self.bias[:, None, None]


class GroupedBatchNorm(nn.Module):
    """Batch norm by the statistics of groups of images, which workers share; for networks that only infer.

    Takes the parameters of the layer in whose place it stands, and its running statistics, which it keeps as
    they are. To be set before images [b, …] come: groups int64 [b], of each image, and count, how many
    groups there are.
    """

    groups: torch.Tensor
    count: int

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        _take_over(self, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize [b, c, h, w]."""
        # Of images, and then of them: all are of one size. Not in bfloat16, on GPUs.
        wide = x.float() if x.dtype.itemsize < 4 else x
        centered = wide - self._mean(wide.mean((2, 3)))[..., None, None]
        variance = self._mean((centered * centered).mean((2, 3)))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias[:, None, None], centered, scale[..., None, None]).to(x.dtype)

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        """Return for each image the mean [b, c] over those of its group."""
        ones = x.new_ones((len(x), 1))
        sums = x.new_zeros((self.count, x.shape[1] + 1)).index_add(0, self.groups, torch.cat([x, ones], 1))
        sums = summed(sums)
        return (sums[:, :-1] / sums[:, -1:].clamp(min=1))[self.groups]


def synchronized(network: nn.Module, device: str) -> nn.Module:
    """Let the batch norms of a network use the statistics of all workers' batches."""
    if device.startswith("cuda"):
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return _replaced(network, GlobalBatchNorm)


def grouped(network: nn.Module) -> nn.Module:
    """Let the batch norms of a network use the statistics of groups of images (`GroupedBatchNorm`)."""
    return _replaced(network, GroupedBatchNorm)


def _replaced(network: nn.Module, kind: Callable[[nn.BatchNorm2d], nn.Module]) -> nn.Module:
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, kind(child))
    return network
