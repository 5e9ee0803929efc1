"""USL-T: clusters that are trained, not computed, and what makes them agree between views and neighbors.

    weak view ──► confident? ──► its cluster ────────────────► cross-entropy of the strong view   (global)
    neighbor ──► less what is common anyway, sharpened ──────► divergence of the strong view      (local)

Wang, Lian and Yu (ECCV 2022, section 3.2), with the constants of their code; what is wrong there (an epoch of
one step, clusters never repaired) is not repeated. Heads are several classifiers on the same features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F

from selective_ray import augment, batch_norm, views
from selective_ray.optimization import add_gradients, summed
from selective_ray.views import Views

# What the prior and the sizes of clusters keep of themselves in a step, and the noise that parts a cluster
# from the one that was copied to it.
KEEP_PRIOR, KEEP_SIZES, NOISE = 0.5, 0.9, 1e-7


@dataclass(frozen=True)
class Recipe:
    """How heads are trained; defaults are those published for ImageNet-100."""

    threshold: float = 0.0
    local_weight: float = 0.5
    adjustment: float = 2.5
    temperature: float = 0.5
    reweight: str = "renorm"
    mean_of_all: bool = True
    repair_after: int | None = 124
    repair_below: int = 50
    repair_above: int = 500


class Heads(nn.Module):
    """Logits of clusters: cosines times a fixed scale, or linear functions of the features."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features [b, d] to logits [h, b, c]; weights are [h, c, d]."""
        if self.bias is None:
            x, weight = F.normalize(x, dim=1), F.normalize(self.weight, dim=2)
            return self.scale * torch.einsum("bd,hcd->hbc", x, weight)
        return torch.einsum("bd,hcd->hbc", x, self.weight) + self.bias[:, None]


def linear(heads: int, clusters: int, width: int) -> Heads:
    """Return linear heads as torch draws the weights of a linear layer."""
    layers = [nn.Linear(width, clusters) for _ in range(heads)]
    weight, bias = (
        torch.stack([getattr(one, part).detach() for one in layers]) for part in ("weight", "bias")
    )
    return Heads(weight, bias, 1.0)


@dataclass(frozen=True)
class Seen:
    """What the weak view says: clusters int64 [h, b], which are confident, and how many of each [h, c]."""

    clusters: torch.Tensor
    confident: torch.Tensor
    counts: torch.Tensor


def seen(weak: torch.Tensor, threshold: float) -> Seen:
    """Read the clusters off logits [h, b, c]; those of a probability above the threshold are confident."""
    confidence, clusters = torch.softmax(weak, 2).max(2)
    confident = confidence > threshold
    counts = weak.new_zeros((weak.shape[0], weak.shape[2]))
    return Seen(clusters, confident, counts.scatter_add(1, clusters, confident.to(weak.dtype)))


def global_loss(
    told: Seen, strong: torch.Tensor, counts: torch.Tensor, *, reweight: str, mean_of_all: bool, batch: int
) -> torch.Tensor:
    """Teach the strong views [h, b, c] the clusters of confident weak ones; returns the sum over heads.

    counts [h, c] of confident images over the whole step of `batch` images, of which these may be a part.
    reweight: "none"; "count": an image counts n / count of its cluster; "renorm": that over the number of
    clusters that have any. mean_of_all: over the batch; else over the weights of what is confident.
    """
    total = counts.sum(1, keepdim=True)
    present = (counts > 0).sum(1, keepdim=True)
    match reweight:
        case "count":
            weights = total / counts.clamp(min=1)
        case "renorm":
            weights = total / (present * counts.clamp(min=1)).clamp(min=1)
        case _:
            weights = torch.ones_like(counts)
    each = F.cross_entropy(strong.transpose(1, 2), told.clusters, reduction="none")
    weighted = each * weights.gather(1, told.clusters) * told.confident
    over = batch if mean_of_all else (weights * counts).sum(1).clamp(min=1e-12)
    return (weighted.sum(1) / over).sum()


def adjusted(
    neighbor: torch.Tensor, prior: torch.Tensor, adjustment: float, temperature: float
) -> torch.Tensor:
    """Return the target [h, b, c] of neighbors' logits: less the logarithm of the prior [h, c], sharpened."""
    logits = neighbor - adjustment * prior.log()[:, None]
    return torch.softmax(F.log_softmax(logits, 2) / temperature, 2)


def local_loss(target: torch.Tensor, strong: torch.Tensor, batch: int) -> torch.Tensor:
    """Divergence of the strong views' clusters [h, b, c] from the target's, summed over heads."""
    entropy = torch.xlogy(target, target).sum()
    return (entropy - (target * F.log_softmax(strong, 2)).sum()) / batch


def next_prior(prior: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Move the prior [h, c] towards the mean of what neighbors say before it is adjusted."""
    moved = KEEP_PRIOR * prior + (1 - KEEP_PRIOR) * mean
    return moved / moved.sum(1, keepdim=True)


@torch.no_grad()
def repair(heads: Heads, sizes: torch.Tensor, below: float, above: float, noise: torch.Tensor) -> list[int]:
    """Split a head's largest cluster in two, in place of its smallest, where that is under `below`.

    And only where the largest is over `above`. sizes [h, c] are expected of all images, and halved in place;
    noise [h, d]. Returns the heads that were.
    """
    repaired = []
    for head, counts in enumerate(sizes):
        small, large = int(counts.argmin()), int(counts.argmax())
        if counts[small] < below and counts[large] > above:
            heads.weight[head, small] = heads.weight[head, large] + NOISE * noise[head]
            heads.weight[head, large] -= NOISE * noise[head]
            if heads.bias is not None:
                heads.bias[head, small] = heads.bias[head, large]
            counts[small] = counts[large] = counts[large] / 2
            repaired.append(head)
    return repaired


class Learner:
    """Heads in training on the features of an encoder, and that encoder where it learns, too.

    encode: pixels uint8 [b, h, w, 3] to unit rows float32 [b, d], of a frozen encoder; or trunk, a network
    that is trained and takes pixels normalized by `colors` (mean, deviation). start float32 [h, c, d]: where
    heads of cosines begin, None: linear heads. images: how many there are, for the sizes of clusters. `state`
    and `load` hold everything that the next step depends on.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        clusters: int,
        count: int,
        start: torch.Tensor | None,
        scale: float,
        encode: Callable[[np.ndarray], np.ndarray] | None,
        trunk: nn.Module | None,
        colors: tuple[tuple[float, ...], tuple[float, ...]],
        strong: str,
        lr: float,
        weight_decay: float,
        images: int,
        image_size: int,
        device: str = "cpu",
    ) -> None:
        self.recipe, self.device, self.encode, self.strong = recipe, torch.device(device), encode, strong
        self.draws = views.DRAWS if strong == "moco" else augment.STRONG_DRAWS
        self.views = Views(blur=0.5)
        self.mean, self.std = (torch.tensor(part, device=device)[:, None, None] for part in colors)
        self.workers = distributed.get_world_size() if distributed.is_initialized() else 1
        self.trunk = None
        if trunk is not None:
            shared = batch_norm.synchronized(trunk, device) if self.workers > 1 else trunk
            self.trunk = shared.to(device, memory_format=torch.channels_last)
        width = self._features(np.zeros((2, image_size, image_size, 3), np.uint8), train=False).shape[1]
        heads = linear(count, clusters, width) if start is None else Heads(start.clone(), None, scale)
        self.heads = heads.to(device, next(trunk.parameters()).dtype if trunk is not None else None)
        self.learning = nn.ModuleList([self.heads] + ([] if self.trunk is None else [self.trunk]))
        parameters = self.learning.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay)
        like = {"device": device, "dtype": self.heads.weight.dtype}
        self.prior = torch.full((count, clusters), 1 / clusters, **like)
        self.images = images
        # Begun as if all clusters were as large.
        self.sizes = torch.full((count, clusters), images / clusters, **like)
        self.repaired = 0

    def step(
        self,
        t: int,
        pixels: np.ndarray,
        neighbors: np.ndarray,
        draws: list[np.ndarray],
        batch: int,
        seed: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take step t on images uint8 [b, h, w, 3] and a neighbor of each, of a step of `batch` images.

        draws float64 [b, self.draws] for the strong views of both. Returns this part's share of the global
        and of the local loss, and how many images and heads were confident.
        """
        recipe = self.recipe
        with torch.no_grad():
            weak = self.heads(self._features(pixels, train=True))
            near = self.heads(self._features(self._stronger(neighbors, draws[1]), train=True))
        strong = self.heads(self._features(self._stronger(pixels, draws[0]), train=True, learn=True))
        told = seen(weak, recipe.threshold)
        counts = summed(told.counts)
        how = {"reweight": recipe.reweight, "mean_of_all": recipe.mean_of_all, "batch": batch}
        globally = global_loss(told, strong, counts, **how)
        target = adjusted(near, self.prior, recipe.adjustment, recipe.temperature)
        locally = local_loss(target, strong, batch)
        self.optimizer.zero_grad(set_to_none=True)
        (globally + recipe.local_weight * locally).backward()
        if self.workers > 1:
            add_gradients(self.learning)
        self.optimizer.step()
        self.prior = next_prior(self.prior, summed(torch.softmax(near, 2).sum(1)) / batch)
        assigned = torch.zeros_like(self.sizes).scatter_add(
            1, told.clusters, torch.ones_like(told.clusters, dtype=self.sizes.dtype)
        )
        expected = summed(assigned) * (self.images / batch)
        self.sizes = KEEP_SIZES * self.sizes + (1 - KEEP_SIZES) * expected
        if recipe.repair_after is not None and t + 1 > recipe.repair_after:
            # The same noise on every worker.
            generator = torch.Generator().manual_seed(seed * 2**20 + t)
            noise = torch.randn((len(self.sizes), self.heads.weight.shape[2]), generator=generator)
            below, above = recipe.repair_below, recipe.repair_above
            self.repaired += len(repair(self.heads, self.sizes, below, above, noise.to(self.heads.weight)))
        return globally.detach(), locally.detach(), told.confident.sum()

    def _stronger(self, pixels: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Return the strong view of images, as pixels again: an encoder takes nothing else."""
        x = torch.tensor(pixels).to(self.device).permute(0, 3, 1, 2)
        if self.strong == "moco":
            x = (255 * views.view(x, draws, self.views)).round().to(torch.uint8)
        else:
            x = augment.strong(x, draws)
        return x.permute(0, 2, 3, 1).cpu().numpy()

    def _features(self, pixels: np.ndarray, *, train: bool, learn: bool = False) -> torch.Tensor:
        if self.encode is not None:
            # A view may be of one color, which has no direction.
            features = np.nan_to_num(self.encode(np.ascontiguousarray(pixels)))
            return torch.from_numpy(features).to(self.device)
        dtype = next(self.trunk.parameters()).dtype
        x = torch.tensor(pixels).to(self.device, dtype).permute(0, 3, 1, 2)
        # Weak views and neighbors go through with the statistics of their batch, too, as published.
        self.trunk.train(train)
        with torch.set_grad_enabled(learn):
            return self.trunk((x / 255 - self.mean.to(dtype)) / self.std.to(dtype))

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on, by name."""
        return {
            "learning": self.learning.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "prior": self.prior,
            "sizes": self.sizes,
            "repaired": self.repaired,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.learning.load_state_dict(state["learning"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.prior = state["prior"].to(self.device)
        self.sizes = state["sizes"].to(self.device)
        self.repaired = state["repaired"]
