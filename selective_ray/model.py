"""A trained model in files that need nothing of this package's state: weights, description, ONNX.

    training/NAME/model.pt      the weights of the averaged network, a plain state dict in float32
    training/NAME/model.onnx    pixels uint8 [n, s, s, 3] to probabilities float32 [n, c], where onnx is there
    training/NAME/model.json    what both are: network, classes, how pixels are made; written last

Network and normalization are those by which training evaluates.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from selective_ray import objects
from selective_ray.errors import UsageError, UserError
from selective_ray.store import BEGUN, MANIFEST
from selective_ray.training import NAME, Training

if TYPE_CHECKING:
    # Imports of seconds, for those who load a network.
    from torch import nn

    from selective_ray import inference

WEIGHTS, ONNX, DESCRIPTION = "model.pt", "model.onnx", "model.json"


@dataclass(frozen=True)
class Model:
    """What the files of a trained model are.

    classes are in the order of the network's answers. An image is cut to the square in its center, of which
    `crop` is kept, and resized to image_size; mean and std are of pixels in [0, 1]. step, of `training` (its
    fingerprint): whose checkpoint it is. sha256: of the files beside.
    """

    network: str
    classes: list[str]
    image_size: int
    crop: float
    interpolation: str
    mean: list[float]
    std: list[float]
    precision: str
    step: int
    training: str
    sha256: dict[str, str]


def begun(training: Training) -> dict[str, Any]:
    """Return what a training is of, as its manifest has it; raises UserError where there is none."""
    run, table = training.run, training.table
    if not NAME.fullmatch(training.name):
        raise UsageError(f"--name {training.name!r} is no name of a training")
    found = run.read_json(table, MANIFEST) or run.read_json(table, BEGUN)
    if found:
        return found
    there = objects.folders(run.path("training"), run.access)
    raise UserError(
        f"{run.uri} has no training {training.name!r}; "
        + (f"give --name one of {', '.join(there)}" if there else "run `selective-ray train` on it first")
    )


def exported(training: Training) -> Model | None:
    """Return the model of the newest checkpoint where its files are there, and all that can be."""
    run, checkpoints = training.run, training.checkpoints()
    found = run.read_json(training.table, DESCRIPTION)
    if not found or not checkpoints:
        return None
    model = Model(**found)
    if (model.step, model.training) != (checkpoints[0][0], begun(training)["fingerprint"]):
        return None
    return None if ONNX not in model.sha256 and _can_write_onnx() else model


def export(training: Training, say: Callable[[str], None]) -> Model:
    """Write the model of the newest checkpoint that is whole.

    Raises UserError where there is no checkpoint, or where it is of another network.
    """
    import torch

    from selective_ray.fixmatch import MEAN, STD

    of = begun(training)
    settings, classes = of["what"]["train"], of["what"]["classes"]
    where = training.run.path(training.table)
    step, state = training.newest(say)
    if state is None:
        raise UserError(
            f"{where} has no checkpoint yet; let `selective-ray train` go on until it has written one"
        )
    weights = {
        key: value.float().contiguous() if value.is_floating_point() else value
        for key, value in state["average"].items()
    }
    network = _network(
        settings["network"], len(classes), weights, f"the checkpoint of step {step:,} in {where}"
    )
    if not all(torch.isfinite(value).all() for value in weights.values()):
        say(
            f"the weights of {where} are not all finite: the training diverged; train again, under another "
            "--name, with a smaller train.lr"
        )
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    files = {WEIGHTS: buffer.getvalue()}
    described = {
        "network": settings["network"],
        "classes": classes,
        "image_size": settings["image_size"],
        "crop": 1.0,
        "interpolation": "bilinear",
        "mean": list(MEAN),
        "std": list(STD),
        # In float64 only to compare workers with each other.
        "precision": settings["precision"].replace("float64", "float32"),
        "step": step,
        "training": of["fingerprint"],
    }
    if _can_write_onnx():
        files[ONNX] = _onnx(network, described)
    else:
        say(
            f"{where}/{ONNX} is not written, as the package onnx is not there: pip install "
            "'selective-ray[onnx]', and `selective-ray predict` writes it"
        )
    for name, data in files.items():
        training.run.write_bytes(data, training.table, name)
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    model = Model(**described, sha256=sha256)
    training.run.write_json(asdict(model), training.table, DESCRIPTION)
    return model


def load(training: Training, model: Model, device: str) -> inference.Inference:
    """Load a model on a device: pixels uint8 [b, s, s, 3] to answers float32 [b, 2], class and confidence."""
    import torch

    from selective_ray.inference import Inference

    data = training.run.read_bytes(training.table, WEIGHTS)
    path = training.run.path(training.table, WEIGHTS)
    if hashlib.sha256(data).hexdigest() != model.sha256[WEIGHTS]:
        raise UserError(f"{path} is not what was written; remove it and {DESCRIPTION}, and run again")
    weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    network = _network(model.network, len(model.classes), weights, path)
    for layer in network.children():
        if isinstance(layer, torch.nn.Linear):
            # Products of few classes round by the place of a row in its batch, float64 by less than is kept.
            layer.double()
            layer.register_forward_pre_hook(lambda _, given: (given[0].double(),))
    return Inference(
        network,
        mean=tuple(model.mean),
        std=tuple(model.std),
        device=device,
        precision=model.precision,
        finish=answers,
    )


def answers(logits: np.ndarray) -> np.ndarray:
    """Return class and confidence of logits float32 [b, c]: float32 [b, 2], NaN where one is not finite.

    A class is a whole number below 2^24, which float32 holds. Of equal ones it is the first.
    """
    import torch

    probabilities = torch.softmax(torch.from_numpy(logits), 1).numpy()
    said = probabilities.argmax(1)
    out = np.stack([said.astype(np.float32), probabilities[np.arange(len(said)), said]], 1)
    out[~np.isfinite(logits).all(1)] = np.nan
    return out


def _network(name: str, classes: int, weights: dict[str, Any], source: str) -> nn.Module:
    """Build a network with these weights; raises UserError where they are of another."""
    from selective_ray import classifiers

    network = classifiers.build(name, classes)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"{source} is of another network than {name} with {classes:,} classes ({reason[:200]}); train "
            "again, under another --name"
        ) from None
    return network.eval()


def _can_write_onnx() -> bool:
    return importlib.util.find_spec("onnx") is not None


def _onnx(network: nn.Module, described: dict[str, Any]) -> bytes:
    """Return the network as ONNX, normalization and softmax inside, the description in the metadata."""
    import onnx
    import torch
    from torch import nn

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.mean, self.std = torch.tensor(described["mean"]), torch.tensor(described["std"])

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            x = (pixels.float() / 255 - self.mean) / self.std
            return torch.softmax(self.network(x.permute(0, 3, 1, 2)), 1)

    size = described["image_size"]
    example = torch.zeros((2, size, size, 3), dtype=torch.uint8)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter that is advised instead needs a second package and ten times the seconds.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            *(Whole().eval(), (example,), buffer),
            input_names=["pixels"],
            output_names=["probabilities"],
            dynamic_axes={"pixels": {0: "n"}, "probabilities": {0: "n"}},
            dynamo=False,
        )
    made = onnx.load_model_from_string(buffer.getvalue())
    onnx.helper.set_model_props(
        made,
        {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in described.items()
        },
    )
    return made.SerializeToString()
