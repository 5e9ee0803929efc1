"""FixMatch (Sohn et al., 2020): what is confidently seen in one view is taught to another.

    labeled ──► weak ───────────────► cross-entropy with the label
    all ─────┬► weak ──► confident? ──► pseudo-label ──┐
             └► strong ──────────────► cross-entropy with it

Everything here is of one process; where torch.distributed runs, it is one of several that share each step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F

from selective_ray import augment, batches
from selective_ray.inference import autocast_dtype
from selective_ray.optimization import add_gradients, follow, learning_rate, optimizer

# Per channel, of pixels in [0, 1]: those of ImageNet, for any images.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Batch statistics of a smaller momentum than this begin as the plain mean of the steps so far, until the
# momentum is reached: at FixMatch's 0.001 they would describe no batch at all for the first thousands.
SLOW = 0.01


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; defaults are those published for CIFAR-10.

    teacher: whether pseudo-labels are of the network itself ("network", FixMatch) or of its moving average
    ("average"; EMAN, Cai et al., 2021). average_statistics: whether that averages the batch statistics, too,
    or copies them.
    """

    steps: int = 2**20
    threshold: float = 0.95
    unlabeled_weight: float = 1.0
    lr: float = 0.03
    warmup: int = 0
    schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    average: float = 0.999
    average_statistics: bool = True
    teacher: str = "network"
    cutout: float = 0.5


@dataclass(frozen=True)
class Losses:
    """What a step's share of the batch says: the loss to descend, and sums to report."""

    loss: torch.Tensor
    supervised: torch.Tensor
    unsupervised: torch.Tensor
    pseudo_labels: torch.Tensor
    confident: torch.Tensor


def losses(
    labeled: torch.Tensor,
    targets: torch.Tensor,
    weak: torch.Tensor,
    strong: torch.Tensor,
    *,
    threshold: float,
    unlabeled_weight: float,
    sizes: tuple[int, int] | None = None,
) -> Losses:
    """Compute equations 3 and 4 of FixMatch.

    Logits [b, c] of the labeled, and [u, c] of both views of the unlabeled; targets int64 [b]. sizes: images
    of the whole step that the means are over, where this is a part of it. No gradient flows through `weak`.
    """
    b, u = sizes or (len(labeled), len(weak))
    u = max(u, 1)  # without unlabeled images it is supervised training
    supervised = F.cross_entropy(labeled, targets, reduction="sum") / b
    with torch.no_grad():
        confidence, pseudo_labels = torch.softmax(weak.float(), 1).max(1)
        confident = confidence >= threshold
    each = F.cross_entropy(strong, pseudo_labels, reduction="none")
    unsupervised = (each * confident).sum() / u
    loss = supervised + unlabeled_weight * unsupervised
    return Losses(loss, supervised.detach(), unsupervised.detach(), pseudo_labels, confident)


class Learner:
    """A network in training: its weights, their moving average, and the optimizer.

    `state` and `load` hold everything that the next step depends on. Workers that share a step give each
    its own part of it; their gradients are added up.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        *,
        device: str = "cpu",
        precision: str = "auto",
        average: nn.Module | None = None,
    ) -> None:
        self.recipe, self.device = recipe, torch.device(device)
        self.dtype = autocast_dtype(device, precision)
        layout = torch.channels_last if device.startswith("cuda") else torch.preserve_format
        self.network = network.to(device, memory_format=layout)
        # A copy of synchronized layers would still talk to others: the average only ever infers.
        self.average = (average or copy.deepcopy(network)).to(device, memory_format=layout).eval()
        self.optimizer = optimizer(self.network, recipe)
        self.workers = distributed.get_world_size() if distributed.is_initialized() else 1
        self.slow = [
            (layer, layer.momentum)
            for layer in self.network.modules()
            if getattr(layer, "running_mean", None) is not None and layer.momentum < SLOW
        ]
        self.mean = torch.tensor(MEAN, device=device)[:, None, None]
        self.std = torch.tensor(STD, device=device)[:, None, None]

    def step(
        self,
        t: int,
        labeled: np.ndarray,
        targets: np.ndarray,
        unlabeled: np.ndarray,
        draws: tuple[np.ndarray, np.ndarray],
        sizes: tuple[int, int],
    ) -> dict[str, torch.Tensor]:
        """Take step t on pixels uint8 [b, h, w, 3] and [u, h, w, 3] and targets int64 [b].

        draws: for the weak views of all b + u images float64 [b + u, augment.WEAK_DRAWS], and for the strong
        ones [u, augment.STRONG_DRAWS]. sizes: images of the whole step, labeled and unlabeled. Returns sums
        over this part of it: supervised, unsupervised (shares of the means), pseudo-labels by class, and
        confident ones by class.
        """
        b = len(labeled)
        recipe = self.recipe
        pixels = self._on_device(np.concatenate([labeled, unlabeled]))
        weak = self._normalized(augment.weak(pixels, draws[0]))
        views = [weak, self._normalized(augment.strong(pixels[b:], draws[1], recipe.cutout))]
        rate = learning_rate(recipe, t)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        for layer, momentum in self.slow:
            layer.momentum = max(momentum, 1 / (t + 1))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.network(torch.cat(views)).float() if self.dtype else self.network(torch.cat(views))
            known, seen, hard = logits.split([b, len(unlabeled), len(unlabeled)])
            if recipe.teacher == "average":
                with torch.no_grad():
                    seen = self.average(weak[b:]).float() if self.dtype else self.average(weak[b:])
        found = losses(
            *(known, torch.from_numpy(targets).to(self.device), seen.detach(), hard),
            threshold=recipe.threshold,
            unlabeled_weight=recipe.unlabeled_weight,
            sizes=sizes,
        )
        self.optimizer.zero_grad(set_to_none=True)
        found.loss.backward()
        if self.workers > 1:
            add_gradients(self.network)
        self.optimizer.step()
        follow(self.average, self.network, recipe.average, statistics=recipe.average_statistics)
        classes = logits.shape[1]
        return {
            "supervised": found.supervised,
            "unsupervised": found.unsupervised,
            "pseudo_labels": torch.bincount(found.pseudo_labels, minlength=classes),
            "confident": torch.bincount(found.pseudo_labels[found.confident], minlength=classes),
            # Of each unlabeled image, -1 where it is not confident.
            "taught": torch.where(found.confident, found.pseudo_labels, -1),
        }

    def _on_device(self, pixels: np.ndarray) -> torch.Tensor:
        # torch.tensor copies: an array out of an object store is read-only, which from_numpy warns about.
        return torch.tensor(pixels).to(self.device, non_blocking=True).permute(0, 3, 1, 2)

    def _normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        dtype = next(self.network.parameters()).dtype
        return (pixels.to(dtype) / 255 - self.mean.to(dtype)) / self.std.to(dtype)

    @torch.no_grad()
    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """Classify images uint8 [b, h, w, 3], as they are, by the averaged network: float32 [b, c]."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.average(self._normalized(self._on_device(pixels)))
        return torch.softmax(logits.float(), 1).cpu().numpy()

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on, by name."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())


def fit(
    learner: Learner,
    pixels: np.ndarray,
    targets: np.ndarray,
    plan: batches.Plan,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Take all steps of a recipe in this process, on images that are in memory, uint8 [n, h, w, 3].

    targets int64 [l] of the plan's labeled images. What a step sees is that of a training on Ray. check:
    called before each; what it raises ends the training.
    """
    for t in range(learner.recipe.steps):
        check()
        weak = batches.draws(plan.seed, t, plan.slots, augment.WEAK_DRAWS, batches.WEAK)
        strong = batches.draws(plan.seed, t, plan.slots, augment.STRONG_DRAWS, batches.STRONG)
        known, rest = np.split(plan.step(t), [plan.labeled])
        learner.step(
            *(t, pixels[known], targets[np.searchsorted(plan.labeled_ids, known)], pixels[rest]),
            draws=(weak, strong[plan.labeled :]),
            sizes=(plan.labeled, plan.unlabeled),
        )


@dataclass(frozen=True)
class Judged:
    """How a classifier does on images whose labels are known; judgments of parts add up.

    confusion int64 [c, c]: rows are true classes, columns answers. confidence float64 [3, 10]: images, right
    answers, and the sum of confidences in each of ten equal ranges of confidence.
    """

    confusion: np.ndarray
    confidence: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    @property
    def by_class(self) -> np.ndarray:
        """Share of right answers of each class, NaN where it has no images; float64 [c]."""
        counts = self.confusion.sum(1)
        return np.where(counts, np.diag(self.confusion) / np.maximum(counts, 1), np.nan)

    @property
    def calibration_error(self) -> float:
        """Mean of |accuracy - confidence| over the ranges, weighted by images (Guo et al., 2017)."""
        images, right, sure = self.confidence
        return float(np.abs(right - sure).sum() / max(1, images.sum()))


def judge(answers: Iterable[tuple[np.ndarray, np.ndarray]], classes: int) -> Judged:
    """Count batches of probabilities float32 [b, c] and true classes int64 [b]."""
    confusion = np.zeros((classes, classes), np.int64)
    confidence = np.zeros((3, 10))
    for probabilities, true in answers:
        said, sure = probabilities.argmax(1), probabilities.max(1).astype(np.float64)
        np.add.at(confusion, (true, said), 1)
        into = np.minimum((10 * sure).astype(int), 9)
        for sums, values in zip(confidence, (1, said == true, sure), strict=True):
            np.add.at(sums, into, values)
    return Judged(confusion, confidence)
