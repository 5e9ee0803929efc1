"""An encoder that was learned from images, in files of its run: weights and what they are.

    training/NAME/encoder.pt        the trunk's weights, a plain state dict in float32
    training/NAME/published.pt      all weights, in the layout in which the method was published
    training/NAME/encoder.json      what both are; written last

The run's URI, or that of the training's folder, is then a name for `--encoder`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from selective_ray.errors import UserError
from selective_ray.model import begun
from selective_ray.objects import DIRECT, Access
from selective_ray.store import Run
from selective_ray.training import Training

if TYPE_CHECKING:
    # An import of seconds, for those who load a network.
    import torch
    from torch import nn

WEIGHTS, PUBLISHED, DESCRIPTION = "encoder.pt", "published.pt", "encoder.json"
NAME = "pretrain"


@dataclass(frozen=True)
class Learned:
    """What the files of a learned encoder are.

    An image is cut to the square in its center and resized to image_size; mean and std are of pixels in
    [0, 1]. step, of `training` (its fingerprint): whose checkpoint it is. sha256: of encoder.pt.
    """

    method: str
    network: str
    image_size: int
    dimension: int
    mean: list[float]
    std: list[float]
    step: int
    training: str
    sha256: str


def exported(training: Training) -> Learned | None:
    """Return the encoder of the newest checkpoint where its files are there."""
    found, checkpoints = training.run.read_json(training.table, DESCRIPTION), training.checkpoints()
    if not found or not checkpoints:
        return None
    made = Learned(**found)
    of = begun(training)["fingerprint"]
    return made if (made.step, made.training) == (checkpoints[0][0], of) else None


def export(training: Training, say: Callable[[str], None]) -> Learned:
    """Write the encoder of the newest checkpoint that is whole; raises UserError where there is none."""
    import torch

    from selective_ray.fixmatch import MEAN, STD

    of = begun(training)
    settings = of["what"]["pretrain"]
    step, state = training.newest(say)
    where = training.run.path(training.table)
    if state is None:
        raise UserError(
            f"{where} has no checkpoint yet; let `selective-ray pretrain` go on until it has written one"
        )
    weights = {
        key: value.float().contiguous() if value.is_floating_point() else value
        for key, value in _below(state["network"], "trunk.").items()
    }
    if not all(torch.isfinite(value).all() for value in weights.values()):
        say(
            f"the weights of {where} are not all finite: the training diverged; train again, under another "
            "--name, with a smaller pretrain.lr"
        )
    data = _bytes(weights)
    head = _below(state["network"], "head.")
    made = Learned(
        method=settings["method"],
        network=settings["network"],
        image_size=settings["image_size"],
        dimension=next(iter(head.values())).shape[0 if settings["method"] == "cld" else 1],
        mean=list(MEAN),
        std=list(STD),
        step=step,
        training=of["fingerprint"],
        sha256=hashlib.sha256(data).hexdigest(),
    )
    training.run.write_bytes(data, training.table, WEIGHTS)
    training.run.write_bytes(_bytes(published(made.method, state)), training.table, PUBLISHED)
    training.run.write_json(asdict(made), training.table, DESCRIPTION)
    return made


def published(method: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Name the weights of a learner's state as the method's published checkpoints name them.

    simclr: SCAN's; moco: facebookresearch/moco's; cld: that of frank-xwang/CLD-UnsupervisedLearning, as its
    training writes them.
    """
    import torch

    def named(prefix: str, weights: Mapping[str, torch.Tensor], head: str) -> dict[str, torch.Tensor]:
        return {f"{prefix}{key}": value for key, value in _below(weights, "trunk.").items()} | {
            f"{prefix}{head}{key}": value for key, value in _below(weights, "head.").items()
        }

    if method == "simclr":
        trunk = {f"backbone.{key}": value for key, value in _below(state["network"], "trunk.").items()}
        head = {f"contrastive_head.{key}": value for key, value in _below(state["network"], "head.").items()}
        return trunk | head
    if method == "moco":
        weights = named("module.encoder_q.", state["network"], "fc.")
        weights |= named("module.encoder_k.", state["average"], "fc.")
        weights |= {"module.queue": state["queue"].T.contiguous()}
        return {"state_dict": weights | {"module.queue_ptr": torch.tensor([state["place"]])}}
    group = _below(state["network"], "group.")
    model = named("module.", state["network"], "linear.")
    return {"model": model | {f"module.groupDis.0.{key}": value for key, value in group.items()}}


def is_name(name: str) -> bool:
    """Tell whether a name of an encoder can be that of a run: a URI, or a path with a folder in it."""
    return "/" in name and name.partition("/")[0] not in ("timm", "open_clip")


def find(name: str, access: Access = DIRECT) -> tuple[Learned, Run, str]:
    """Return what was learned in a run, or in the folder of a training, and where its weights are.

    Raises UserError where there is nothing learned.
    """
    run = Run(name, access)
    for folder in (f"training/{NAME}/", ""):
        if found := run.read_json(f"{folder}{DESCRIPTION}"):
            return Learned(**found), run, f"{folder}{WEIGHTS}"
    raise UserError(
        f"--encoder {name} is no run with a learned encoder: `selective-ray pretrain` makes one; or give the "
        "name of a network"
    )


def load(name: str, image_size: int, access: Access = DIRECT) -> nn.Module:
    """Load the trunk of a learned encoder; raises UserError where its weights are not what was written."""
    import torch

    from selective_ray import classifiers

    made, run, place = find(name, access)
    data = run.read_bytes(place)
    if hashlib.sha256(data).hexdigest() != made.sha256:
        raise UserError(
            f"{run.path(place)} is not what was written; remove it and the {DESCRIPTION} beside it, and run "
            "`selective-ray pretrain` again"
        )
    network, _ = classifiers.trunk(made.network, image_size)
    network.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    return network


def _below(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _bytes(weights: dict[str, Any]) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()
