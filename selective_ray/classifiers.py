"""Networks that are trained to classify: name -> module that maps [b, 3, h, w] to logits [b, classes].

`wrn-28-2` and any other wide residual network (Zagoruyko and Komodakis, 2016) in the form in which FixMatch
was published; `cifar-resnet18`, the form of ResNet-18 that keeps small images large; ResNets of torchvision;
`small-resnet`, for machines without a GPU. Without its last layer each is a trunk that gives features.
"""

from __future__ import annotations

import copy
import re

import torch
from torch import nn
from torch.nn import functional as F

from selective_ray import batch_norm, checkpoints, networks
from selective_ray.errors import UsageError, UserError
from selective_ray.objects import DIRECT, Access

_WIDE = re.compile(r"wrn-(\d+)-(\d+)")
TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101")
# What self-supervised checkpoints put before the names of their trunk, and what follows it there.
_PREFIXES = ("encoder_q.", "backbone.", "encoder.", "trunk.")
_HEADS = ("fc.", "linear.", "head.", "contrastive_head.", "groupDis.", "projector.", "predictor.")


def check_name(name: str, key: str = "train.network") -> None:
    """Raise UsageError where no network has this name, which a key of the configuration gives."""
    wide = _WIDE.fullmatch(name)
    if wide and (int(wide[1]) - 4) % 6 == 0 and int(wide[1]) >= 10 and int(wide[2]) >= 1:
        return
    if name not in (*TORCHVISION, "cifar-resnet18", "small-resnet"):
        raise UsageError(
            f"{key} = {name!r} is not known; there are wrn-28-2 and other wrn-DEPTH-WIDTH of depth "
            f"6 n + 4, cifar-resnet18, small-resnet, {', '.join(TORCHVISION)}"
        )


def build(name: str, classes: int, key: str = "train.network") -> nn.Module:
    """Build a network with random weights, drawn from torch's global generator."""
    check_name(name, key)
    if wide := _WIDE.fullmatch(name):
        return WideResNet(int(wide[1]), int(wide[2]), classes)
    if name == "cifar-resnet18":
        return networks.CifarResNet18(nn.Linear(512, classes))
    if name == "small-resnet":
        return networks.SmallResNet(nn.Linear(networks.SmallResNet.WIDTH, classes))
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=classes)


def trunk(name: str, image_size: int) -> tuple[nn.Module, int]:
    """Build a network without its last layer, of random weights, and return the width of its features.

    Besides those of `build`, vit-small: timm's, which is to be there.
    """
    if name == "vit-small":
        import timm

        network = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=image_size)
        return network, network.num_features
    network = build(name, 1, "pretrain.network")
    last = _head(network).removesuffix(".")
    width = network.get_submodule(last).in_features
    network.set_submodule(last, nn.Identity())
    return network, width


def begin_from(network: nn.Module, name: str, checkpoint: str, access: Access = DIRECT) -> None:
    """Load the trunk of a self-supervised or other checkpoint; the classifier stays random.

    Raises UserError where weights of the trunk are missing or of another shape.
    """
    state = checkpoints.located(checkpoints.read(checkpoint, access), _PREFIXES)
    own = network.state_dict()
    head = _head(network)
    trunk = {key: value for key, value in state.items() if not key.startswith((head, *_HEADS))}
    missing = [key for key in own if not key.startswith(head) and key not in trunk and _matters(key)]
    reshaped = [key for key in trunk if key in own and trunk[key].shape != own[key].shape]
    unknown = [key for key in trunk if key not in own]
    if missing or reshaped or unknown:
        what = [
            f"{len(keys)} {words}, as {keys[0]}"
            for keys, words in ((missing, "missing"), (reshaped, "of another shape"), (unknown, "unexpected"))
            if keys
        ]
        raise UserError(
            f"checkpoint {checkpoint} is of another network than {name} ({'; '.join(what)}); name the "
            "network that it was trained as with --set train.network="
        )
    network.load_state_dict(trunk, strict=False)


def _head(network: nn.Module) -> str:
    """Name of the last layer, whose weights are of the classes."""
    *_, (name, _) = (pair for pair in network.named_modules() if isinstance(pair[1], nn.Linear))
    return f"{name}."


def _matters(key: str) -> bool:
    # Older checkpoints lack it, and nothing here reads it.
    return not key.endswith("num_batches_tracked")


class WideResNet(nn.Module):
    """A wide residual network with leaky units and slow batch statistics, as FixMatch trains it.

    Slope 0.1, batch-norm momentum 0.001 and epsilon 0.001 (google-research/fixmatch); the first block
    activates before its shortcut.
    """

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        each = (depth - 4) // 6
        wide = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(3, wide[0], 3, padding=1, bias=False)
        blocks = []
        for stage in range(3):
            for i in range(each):
                inside = wide[stage] if i == 0 else wide[stage + 1]
                stride = 2 if i == 0 and stage > 0 else 1
                blocks.append(_WideBlock(inside, wide[stage + 1], stride, first=stage == i == 0))
        self.blocks = nn.Sequential(*blocks)
        self.norm = _norm(wide[3])
        self.classifier = nn.Linear(wide[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", a=0.1, nonlinearity="leaky_relu")
        nn.init.xavier_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalized [b, 3, h, w] to logits [b, classes]."""
        x = F.leaky_relu(self.norm(self.blocks(self.stem(x))), 0.1)
        return self.classifier(x.mean((2, 3)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=0.001, momentum=0.001)


class _WideBlock(nn.Module):
    def __init__(self, inside: int, out: int, stride: int, *, first: bool) -> None:
        super().__init__()
        self.norm1 = _norm(inside)
        self.conv1 = nn.Conv2d(inside, out, 3, stride, padding=1, bias=False)
        self.norm2 = _norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.shortcut = None if inside == out else nn.Conv2d(inside, out, 1, stride, bias=False)
        self.first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.leaky_relu(self.norm1(x), 0.1)
        if self.first:
            x = y
        if self.shortcut is not None:
            x = self.shortcut(x)
        return x + self.conv2(F.leaky_relu(self.norm2(self.conv1(y)), 0.1))


def replicas(network: nn.Module, *, device: str, workers: int, precision: str) -> tuple[nn.Module, nn.Module]:
    """Return a network as one of several workers trains it, and a copy that is to follow it.

    The copy only ever infers: synchronized layers in it would still talk to others.
    """
    if precision == "float64":
        network = network.double()
    average = copy.deepcopy(network)
    return batch_norm.synchronized(network, device) if workers > 1 else network, average
