"""Contrastive learning of features: the losses of SimCLR, MoCo v2 and CLD, and a network that learns by them.

    simclr   two views of an image find each other among all views of the step
    moco     a view finds its image's key among those of the last steps, by a network that follows slowly
    cld      that, from two views, and each view finds the group that the other's image is in

Everything here is of one process; where torch.distributed runs, it is one of several that share each step:
worker r of w has the images r, r + w, … of the step, and losses are over the images of all.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F

from selective_ray import batch_norm, views
from selective_ray.batch_norm import GroupedBatchNorm
from selective_ray.fixmatch import MEAN, STD
from selective_ray.inference import autocast_dtype
from selective_ray.networks import NormedLinear
from selective_ray.optimization import add_gradients, follow, learning_rate, optimizer
from selective_ray.views import Views

# Width of what the losses compare (SimCLR, MoCo v2, CLD).
DIMENSION = 128
# Keys have the batch statistics of so many groups of a step's images, as MoCo's have those of eight GPUs; of
# fewer groups, but at least two, where they would be of fewer images than the second number.
KEY_GROUPS, KEY_GROUP = 8, 16
# Views of an image in a step.
VIEWS = {"simclr": 2, "moco": 2, "cld": 3}


@dataclass(frozen=True)
class Recipe:
    """How features are learned.

    keep: what the network of the keys keeps of itself in a step. queue: keys that are kept. groups of K-Means
    iterations in each step, and what their loss counts (CLD).
    """

    method: str = "simclr"
    steps: int = 20_000
    temperature: float = 0.1
    lr: float = 0.4
    warmup: int = 0
    schedule: str = "half-cosine"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    keep: float = 0.999
    queue: int = 4096
    groups: int = 100
    group_iterations: int = 5
    group_temperature: float = 0.2
    group_weight: float = 0.25


def _share() -> tuple[int, int]:
    """Return this process's number and how many share the step."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


class _Gathered(torch.autograd.Function):
    """The rows of all workers in the order of the step; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, batch: int) -> torch.Tensor:
        rank, workers = _share()
        every = x.new_zeros((batch, *x.shape[1:]))
        every[rank::workers] = x
        # Adding zeros gives each row back as it is.
        distributed.all_reduce(every)
        return every

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        rank, workers = _share()
        gradient = gradient.clone()
        distributed.all_reduce(gradient)
        return gradient[rank::workers], None


def gathered(x: torch.Tensor, batch: int) -> torch.Tensor:
    """Return the rows [batch, …] of all workers, of which x are this one's."""
    return x if _share()[1] == 1 else _Gathered.apply(x, batch)


def _places(batch: int, device: torch.device) -> torch.Tensor:
    """Places of this worker's images in the step."""
    return torch.arange(batch, device=device)[slice(_share()[0], None, _share()[1])]


@dataclass(frozen=True)
class Loss:
    """This worker's part of a mean over the step, and how many of its images found their own first."""

    loss: torch.Tensor
    found: torch.Tensor


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float, batch: int) -> Loss:
    """Compute equation 1 of SimCLR, its mean over both views of all `batch` images.

    first, second: unit rows [b, d], this worker's images in two views. An image is found where both of its
    views are nearest to each other.
    """
    everyone = torch.cat([gathered(first, batch), gathered(second, batch)])
    own = _places(batch, first.device)
    own = torch.cat([own, own + batch])
    other = (own + batch) % (2 * batch)
    logits = torch.cat([first, second]) @ everyone.T / temperature
    logits = logits.scatter(1, own[:, None], -torch.inf)
    loss = F.cross_entropy(logits, other, reduction="sum") / (2 * batch)
    nearest = (logits.detach().argmax(1) == other).view(2, -1)
    return Loss(loss, nearest.all(0).sum())


def info_nce(
    queries: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor, temperature: float, batch: int
) -> Loss:
    """Compute equation 1 of MoCo (He et al., 2020): a query finds its key among those of the queue.

    queries, keys: unit rows [b, d] of the same images; queue: unit rows [k, d] of others. Only queries have
    a gradient.
    """
    keys, queue = keys.detach(), queue.detach()
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], 1) / temperature
    own = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    loss = F.cross_entropy(logits, own, reduction="sum") / batch
    return Loss(loss, (logits.detach().argmax(1) == own).sum())


def groups(x: torch.Tensor, count: int, iterations: int) -> torch.Tensor:
    """Group rows [b, d] by K-Means from the first `count` of them; returns labels int64 [b].

    An empty group stays at the origin, as in the published code.
    """
    with torch.no_grad():
        centroids = x[:count]
        for _ in range(iterations):
            labels = torch.cdist(x, centroids).argmin(1)
            centroids = means(x, labels, count)
        if _share()[1] > 1:
            # Workers must agree to the last of them, whatever their products round to.
            distributed.broadcast(labels, 0)
    return labels


def means(x: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Return the mean [count, d] of the rows of each label, zero where there are none."""
    sums = x.new_zeros((count, x.shape[1])).index_add(0, labels, x)
    return sums / torch.bincount(labels, minlength=count).clamp(min=1)[:, None]


def group_loss(
    first: torch.Tensor, second: torch.Tensor, count: int, iterations: int, temperature: float, batch: int
) -> torch.Tensor:
    """Compute equation 4 of CLD (Wang, Liu and Yu, 2021): each view finds the other's group.

    first, second: unit rows [b, d], this worker's images in two views. Gradients flow through the means of
    the groups, too, as in the published code. Returns this worker's part of the mean.
    """
    own, count = _places(batch, first.device), min(count, batch)
    views = gathered(first, batch), gathered(second, batch)
    labels = [groups(x.detach(), count, iterations) for x in views]
    centers = [means(x, of, count) for x, of in zip(views, labels, strict=True)]
    losses = [
        F.cross_entropy(x @ centers[other].T / temperature, labels[other][own], reduction="sum")
        for x, other in ((first, 1), (second, 0))
    ]
    return sum(losses) / (2 * batch)


class Projected(nn.Module):
    """A trunk, what the losses compare of its features, and for CLD what they group."""

    def __init__(self, trunk: nn.Module, head: nn.Module, group: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk, self.head, self.group = trunk, head, group

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map normalized [b, 3, h, w] to unit rows [b, DIMENSION], and to those that are grouped, or None."""
        features = self.trunk(x)
        grouped = None if self.group is None else F.normalize(self.group(features), dim=1)
        return F.normalize(self.head(features), dim=1), grouped


def projected(method: str, trunk: nn.Module, width: int) -> Projected:
    """Put the heads of a method on a trunk that gives features [b, width], of random weights."""
    if method == "cld":
        return Projected(trunk, NormedLinear(width, DIMENSION), NormedLinear(width, DIMENSION))
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, DIMENSION))
    return Projected(trunk, head)


class Learner:
    """Networks that learn features: weights, keys, queue and optimizer.

    `state` and `load` hold everything that the next step depends on. The keys are of a network whose weights
    follow slowly, with the batch statistics of groups of the step's images, while queries have those of all:
    so no key is found by the statistics it shares with its query, which MoCo prevents by shuffling images
    among GPUs. Averaged statistics (EMAN; Cai et al., 2021) would prevent it, too, but lag behind a network
    that learns quickly: in 600 steps little was learned with them (benchmarks/README.md, "Learned features").
    """

    def __init__(
        self,
        network: Projected,
        recipe: Recipe,
        how: Views,
        *,
        device: str = "cpu",
        precision: str = "auto",
        average: nn.Module | None = None,
    ) -> None:
        self.recipe, self.how, self.device = recipe, how, torch.device(device)
        self.dtype = autocast_dtype(device, precision)
        # Convolutions of few channels are faster so on CPUs as well.
        self.network = network.to(device, memory_format=torch.channels_last)
        self.average: nn.Module | None = None
        self.queue: torch.Tensor | None = None
        self.place = 0
        if recipe.method != "simclr":
            self.average = (average or copy.deepcopy(network)).to(device, memory_format=torch.channels_last)
            self.average = batch_norm.grouped(self.average).requires_grad_(False)
            self.norms = [layer for layer in self.average.modules() if isinstance(layer, GroupedBatchNorm)]
            random = torch.randn(recipe.queue, DIMENSION, dtype=next(network.parameters()).dtype)
            self.queue = F.normalize(random, dim=1).to(device)
        self.optimizer = optimizer(self.network, recipe)
        self.workers = _share()[1]
        self.mean = torch.tensor(MEAN, device=device)[:, None, None]
        self.std = torch.tensor(STD, device=device)[:, None, None]

    def step(
        self, t: int, pixels: np.ndarray, draws: list[np.ndarray], batch: int
    ) -> dict[str, torch.Tensor]:
        """Take step t on pixels uint8 [b, h, w, 3], this worker's of the `batch` images of the step.

        draws float64 [b, views.DRAWS] for each view. Returns sums over this part of it: instance, group
        (shares of the means), and found, the images that were.
        """
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, t)
        self.network.train()
        seen = [self._normalized(views.view(self.on_device(pixels), own, self.how)) for own in draws]
        # Of MoCo's two views one is looked for; else two, in one batch, so that they share its statistics.
        count = 1 if recipe.method == "moco" else 2
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            out, grouped = map(self._exact, self.network(torch.cat(seen[:count])))
            if self.average is not None:
                keys = self._exact(self._keys(seen[-1], batch))
        queries = out.chunk(count)
        if self.average is None:
            found = nt_xent(*queries, recipe.temperature, batch)
        else:
            parts = [info_nce(query, keys, self.queue, recipe.temperature, batch) for query in queries]
            found = Loss(sum(part.loss for part in parts) / count, parts[0].found)
        group = out.new_zeros(())
        if grouped is not None:
            how = recipe.groups, recipe.group_iterations, recipe.group_temperature
            group = group_loss(*grouped.chunk(count), *how, batch)
        self.optimizer.zero_grad(set_to_none=True)
        (found.loss + recipe.group_weight * group).backward()
        if self.workers > 1:
            add_gradients(self.network)
        self.optimizer.step()
        if self.average is not None:
            follow(self.average, self.network, recipe.keep, statistics=False)
            self._enqueue(gathered(keys, batch))
        return {"instance": found.loss.detach(), "group": group.detach(), "found": found.found}

    @torch.no_grad()
    def _keys(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """Return the keys of this worker's images."""
        count = max(2, min(KEY_GROUPS, batch // KEY_GROUP))
        of = _places(batch, x.device) % count
        for layer in self.norms:
            layer.groups, layer.count = of, count
        return self.average(x)[0]

    def _enqueue(self, keys: torch.Tensor) -> None:
        """Let the keys of a step take the places of the oldest."""
        places = (self.place + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = keys
        self.place = (self.place + len(keys)) % len(self.queue)

    def on_device(self, pixels: np.ndarray) -> torch.Tensor:
        """Bring pixels uint8 [b, h, w, 3] to the device, [b, 3, h, w]."""
        # torch.tensor copies: an array out of an object store is read-only, which from_numpy warns about.
        return torch.tensor(pixels).to(self.device, non_blocking=True).permute(0, 3, 1, 2)

    def _exact(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """Return what losses are computed of: not in bfloat16."""
        return x.float() if self.dtype and x is not None else x

    def _normalized(self, x: torch.Tensor) -> torch.Tensor:
        dtype = next(self.network.parameters()).dtype
        x = (x.to(dtype) - self.mean.to(dtype)) / self.std.to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the trunk's features of images in [0, 1], [b, 3, h, w], as unit rows float32 [b, d]."""
        self.network.eval()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            features = self.network.trunk(self._normalized(x))
        self.network.train()
        return F.normalize(features.float(), dim=1)

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on, by name."""
        kept = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.average is not None:
            kept |= {"average": self.average.state_dict(), "queue": self.queue, "place": self.place}
        return kept

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self.queue.copy_(state["queue"])
            self.place = state["place"]


def alignment(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean squared distance of two views of an image, unit rows [n, d] (Wang and Isola, 2020)."""
    return float((first - second).square().sum(1).mean())


def uniformity(x: torch.Tensor) -> float:
    """Logarithm of the mean of exp(-2 sq_dist) over pairs of unit rows [n, d] (Wang and Isola, 2020)."""
    return float(torch.pdist(x).square().mul(-2).exp().mean().log())


def effective_rank(x: torch.Tensor) -> float:
    """Exponential of the entropy of the singular values of centered rows [n, d] (Roy and Vetterli, 2007).

    From 1, where all rows lie on a line, to min(n - 1, d).
    """
    values = torch.linalg.svdvals((x - x.mean(0)).double())
    total = values.sum()
    if not total > 0:
        return 1.0
    shares = values / total
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))
