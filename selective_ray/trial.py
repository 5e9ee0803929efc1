"""FixMatch as a figure of selections: trained in this process, on labels of one and on all other images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from selective_ray.batches import Plan
from selective_ray.config import Train
from selective_ray.errors import UserError
from selective_ray.pixels import Pixels
from selective_ray.store import Run

# Images that are read, or classified, at a time.
BLOCK = 512


class Trial:
    """Images in memory, by which one training after another is judged.

    image_ids int64 [n] of a run, labels int64 [n], -1 where not known. Raises UserError where the run has no
    images, or one cannot be read any more.
    """

    def __init__(self, run: Run, image_ids: np.ndarray, labels: np.ndarray, how: Train, cache: float) -> None:
        listed = run.manifest("images")
        if listed is None or "images" not in listed.what:
            raise UserError(
                f"{run.uri} was made of embeddings that were brought, without images to train on; leave out "
                "--fixmatch, or make a run with --images"
            )
        column = listed.what["images"].get("column")
        source = Pixels.of_run(run, size=how.image_size, limit=cache, column=column)
        blocks = np.split(image_ids, range(BLOCK, len(image_ids), BLOCK))
        self.pixels = np.concatenate([source.get(block) for block in blocks])
        self.labels, self.how, self.access = labels, how, run.access

    def accuracy(self, picks: np.ndarray, seed: int, check: Callable[[], None]) -> float:
        """Return the share of all other labeled images that a training on picked rows int64 [m] tells right.

        check: called now and then; what it raises ends the training.
        """
        import torch

        from selective_ray import classifiers, fixmatch

        rest = np.setdiff1d(np.flatnonzero(self.labels >= 0), picks)
        known = np.sort(picks[self.labels[picks] >= 0])
        classes, targets = np.unique(self.labels[known], return_inverse=True)
        if len(classes) < 2:
            return float(np.isin(self.labels[rest], classes).mean())
        how = self.how
        torch.manual_seed(seed)
        network = classifiers.build(how.network, len(classes))
        if how.checkpoint:
            classifiers.begin_from(network, how.network, how.checkpoint, self.access)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        learner = fixmatch.Learner(
            network, fixmatch.Recipe(**how.recipe()), device=device, precision=how.precision
        )
        plan = Plan(
            *(known, len(self.pixels), np.empty(0, np.int64), how.batch, how.batch * how.unlabeled_ratio),
            seed=seed,
        )
        fixmatch.fit(learner, self.pixels, targets, plan, check)
        blocks = np.split(rest, range(BLOCK, len(rest), BLOCK))
        told = np.concatenate([learner.probabilities(self.pixels[block]).argmax(1) for block in blocks])
        return float((classes[told] == self.labels[rest]).mean())
