"""Encoder name -> network that gives an embedding for every image, and where its weights are in a checkpoint.

Every network takes normalized float [b, 3, h, w] and returns [b, d].
"""

import contextlib
import difflib
import importlib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from selective_ray.encoders import RECIPES, Transform, is_factory, transform, weights_id
from selective_ray.errors import UsageError, UserError, first_line


@dataclass(frozen=True)
class Network:
    """A network, and what a checkpoint of it holds.

    Its weights are those under `prefixes`, less those under `unused`; `adapt` takes the names and shapes of
    other versions to this one's.
    """

    module: nn.Module
    prefixes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    adapt: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None


def build(name: str, image_size: int, *, published: bool) -> Network:
    """Build the network of an encoder, with its published weights or ready for those of a checkpoint.

    Raises UserError where the weights cannot be had or the images are of a size that it cannot take.
    """
    if is_factory(name):
        return Network(_made(name, image_size))
    recipe = RECIPES.get(name)
    place, _, rest = (recipe.network if recipe else name).partition("/")
    match place:
        case "timm":
            network = _timm(name, rest, image_size, published)
        case "open_clip":
            network = _open_clip(name, *rest.split("/"), image_size, published)
        case "resnet50":
            network = _torchvision(name, "resnet50", image_size, published)
        case "resnet50-mlp":
            network = Network(resnet50_mlp())
        case "cifar-resnet18":
            network = Network(CifarResNet18())
        case "cifar-resnet18-cosine":
            network = Network(CifarResNet18(NormedLinear(512, 128)))
        case _:
            network = _torchvision(name, name, image_size, published)
    if recipe is None:
        return network
    return Network(network.module, recipe.prefixes, network.unused + recipe.unused, network.adapt)


# Networks of the self-supervised methods


class NormedLinear(nn.Module):
    """Cosines between the input and the columns of its weight [in, out], as CLD's head computes them."""

    def __init__(self, wide: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.rand(wide, out) * 2 - 1, dim=0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [b, in] to [b, out], each in [-1, 1]."""
        return F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0)


class _Block(nn.Module):
    def __init__(self, wide: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or wide != out:
            self.shortcut.extend([nn.Conv2d(wide, out, 1, stride, bias=False), nn.BatchNorm2d(out)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet18(nn.Module):
    """ResNet-18 for images of 32 pixels: a 3x3 stem that keeps their size, no pooling before the blocks.

    Layers are named as in the published checkpoints: SCAN's SimCLR, without a head, and CLD's, whose head is
    `linear`. The pooling is over whatever the last block leaves, so that other sizes go too.
    """

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(_Block(64, 64, 1), _Block(64, 64, 1))
        self.layer2 = nn.Sequential(_Block(64, 128, 2), _Block(128, 128, 1))
        self.layer3 = nn.Sequential(_Block(128, 256, 2), _Block(256, 256, 1))
        self.layer4 = nn.Sequential(_Block(256, 512, 2), _Block(512, 512, 1))
        self.linear = head or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [b, 3, h, w] to the pooled features [b, 512], or to what the head makes of them."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


class SmallResNet(nn.Module):
    """A residual network of 19 million multiply-adds at 32 pixels, for machines without a GPU.

    Three of the blocks of CifarResNet18, after a stem that halves the image.
    """

    WIDTH = 160

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 40, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(40)
        self.layer1 = nn.Sequential(_Block(40, 40, 1))
        self.layer2 = nn.Sequential(_Block(40, 80, 2))
        self.layer3 = nn.Sequential(_Block(80, self.WIDTH, 2))
        self.linear = head or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [b, 3, h, w] to the pooled features [b, WIDTH], or to what the head makes of them."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet50_mlp() -> nn.Module:
    """Return ResNet-50 with the projection head of MoCo v2 in place of its classifier, [b, 128]."""
    from torchvision import models

    network = models.resnet50()
    network.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 128))
    return network


# torchvision


def _torchvision(name: str, model: str, image_size: int, published: bool) -> Network:
    from torchvision import models

    options: dict[str, Any] = {}
    if model in ("googlenet", "inception_v3"):
        # As the published weights want it, also when they come in a file.
        options["transform_input"] = True
        if not published:
            options |= {"aux_logits": False, "init_weights": False}
    if model.startswith("vit_"):
        options["image_size"] = image_size
    if model == "maxvit_t":
        options["input_size"] = (image_size, image_size)
    weights = weights_id(name) if published else None
    with _download(f"the weights {weights}", name, published), _sizes(name, image_size):
        network = models.get_model(model, weights=weights, progress=False, **options)
    auxiliary = ("aux1.", "aux2.", "AuxLogits.") if "transform_input" in options else ()
    adapt = _renamed_densenet if model.startswith("densenet") else None
    return Network(network, unused=(_cut_classifier(network), *auxiliary), adapt=adapt)


def _cut_classifier(network: nn.Module) -> str:
    """Take the last linear layer off the network; returns the prefix of its names in a state dict."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:  # squeezenet classifies by convolution
        network.classifier = nn.AdaptiveAvgPool2d(1)
        return "classifier."
    network.set_submodule(linear[-1], nn.Identity())
    return f"{linear[-1]}."


def _renamed_densenet(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename from the names of an older torchvision, which the published files have."""
    return {re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key): state[key] for key in state}


# timm and open_clip


def timm_config(name: str) -> Any:
    """Return timm's configuration of a network, `timm/NAME` or `timm/NAME.TAG`; raises UsageError."""
    import timm

    model = name.removeprefix("timm/")
    try:
        if config := timm.get_pretrained_cfg(model):
            return config
    except RuntimeError:  # the network is there, and the tag is not
        pass
    known = [*timm.list_models(include_tags=True), *timm.list_models()]
    nearest = difflib.get_close_matches(model, known, n=1, cutoff=0)[0]
    raise UsageError(f"timm has no network {model!r}; the nearest that it has is {nearest!r}")


def timm_transform(name: str) -> Transform:
    """Return the transform in timm's configuration of a network.

    A crop above 1 would put a border around the image; the whole center square is taken in its place.
    """
    config = timm_config(name)
    return Transform(
        config.input_size[-1],
        min(config.crop_pct, 1.0),
        config.interpolation if config.interpolation == "bilinear" else "bicubic",
        tuple(config.mean),
        tuple(config.std),
    )


def _timm(name: str, model: str, image_size: int, published: bool) -> Network:
    import timm

    config = timm_config(model)
    options = {"img_size": image_size} if config.fixed_input_size else {}
    with _download(f"timm's weights of {model}", name, published), _sizes(name, image_size):
        network = timm.create_model(model, pretrained=published, num_classes=0, **options)
    classifiers = config.classifier or ()
    unused = tuple(f"{layer}." for layer in ([classifiers] if isinstance(classifiers, str) else classifiers))
    # What timm itself passes the published files of this network through.
    adapt = getattr(inspect.getmodule(type(network)), "checkpoint_filter_fn", None)
    return Network(network, unused=unused, adapt=adapt and partial(_filtered, adapt, network))


def _filtered(adapt: Callable, network: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return adapt(state, network)


def open_clip_config(name: str) -> dict[str, Any]:
    """Return open_clip's configuration of published weights, `open_clip/MODEL/TAG`; raises UsageError."""
    import open_clip

    _, model, tag = name.split("/")
    known = open_clip.list_pretrained()
    if (model, tag) not in known:
        names = [f"open_clip/{m}/{t}" for m, t in known]
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
        raise UsageError(f"open_clip has no {name!r}; the nearest that it has is {nearest!r}")
    vision = open_clip.get_model_config(model)["vision_cfg"]
    return open_clip.get_pretrained_cfg(model, tag) | {"image_size": vision.get("image_size", 224)}


def open_clip_transform(name: str) -> Transform:
    """Return the transform that published weights of open_clip were made with.

    The center is cut out also where training squashed the whole image into a square.
    """
    config = open_clip_config(name)
    size = config["image_size"]
    return Transform(
        size if isinstance(size, int) else size[0],
        1.0,
        config.get("interpolation", "bicubic"),
        tuple(config["mean"]),
        tuple(config["std"]),
    )


def _open_clip(name: str, model: str, tag: str, image_size: int, published: bool) -> Network:
    import open_clip
    from open_clip.model import resize_pos_embed

    config = open_clip_config(f"open_clip/{model}/{tag}")
    options: dict[str, Any] = {"pretrained": tag} if published else {"load_weights": False}
    with _download(f"open_clip's weights {model} {tag}", name, published), _sizes(name, image_size), _quiet():
        whole = open_clip.create_model(
            model,
            pretrained_text=False,
            # OpenAI's activation, also where the model's name does not ask for it.
            force_quick_gelu=config.get("quick_gelu", False),
            force_image_size=image_size,
            **options,
        )

    if hasattr(whole.visual, "output_tokens"):
        whole.visual.output_tokens = False  # the embedding alone

    def adapt(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Resampling wants float32, and OpenAI's numbers are float16.
        state = {f"visual.{key}": value.float() for key, value in state.items()}
        resize_pos_embed(state, whole)
        return {key.removeprefix("visual."): value for key, value in state.items()}

    return Network(whole.visual, prefixes=("visual.",), adapt=adapt)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip from warning that a network is random whose weights are yet to come."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# A person's own


def factory(name: str) -> tuple[Callable[..., nn.Module], str]:
    """Import `package.module:factory`; returns it and the file that its module was read from.

    The folder where the command runs counts as one of Python's. Raises UserError.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # its own lines run, and may raise anything
        raise UserError(
            f"encoder {name} cannot be imported ({type(error).__name__}: {first_line(error)}); install its "
            "module on every machine of the cluster, or run the command in the folder that holds it"
        ) from error
    made = getattr(module, attribute, None)
    if not callable(made):
        what = "has no such name" if made is None else f"has a {type(made).__name__} there"
        raise UserError(
            f"encoder {name} is no function that returns a network: {module_name} {what}; give MODULE:FACTORY"
        )
    if module.__file__ is None:
        raise UserError(f"encoder {name} has no source file that tells one version from another; give it one")
    return made, module.__file__


def factory_transform(name: str) -> Transform:
    """Return the transform in the attributes of a factory, those of Transform where it has none."""
    made, _ = factory(name)
    usual = Transform()
    size = getattr(made, "image_size", usual.size)
    crop = getattr(made, "crop", usual.crop)
    interpolation = getattr(made, "interpolation", usual.interpolation)
    mean, std = getattr(made, "mean", usual.mean), getattr(made, "std", usual.std)
    wrong = [
        f"{attribute} = {value!r} is not {wanted}"
        for attribute, value, wanted, fine in (
            ("image_size", size, "a whole number from 1", lambda v: isinstance(v, int) and v >= 1),
            ("crop", crop, "a number above 0, at most 1", lambda v: 0 < v <= 1),
            ("interpolation", interpolation, "bilinear or bicubic", lambda v: v in ("bilinear", "bicubic")),
            ("mean", mean, "three numbers", lambda v: len([float(x) for x in v]) == 3),
            ("std", std, "three numbers above 0", lambda v: len([x for x in v if x > 0]) == len(v) == 3),
        )
        if not _holds(fine, value)
    ]
    if wrong:
        raise UserError(f"encoder {name} has an attribute that cannot be used: {'; '.join(wrong)}")
    return Transform(size, float(crop), interpolation, tuple(map(float, mean)), tuple(map(float, std)))


def _holds(condition: Callable[[Any], bool], value: Any) -> bool:
    try:
        return condition(value)
    except (TypeError, ValueError):
        return False


def _made(name: str, image_size: int) -> nn.Module:
    made, _ = factory(name)
    try:
        takes_size = "image_size" in inspect.signature(made).parameters
    except (TypeError, ValueError):  # some callables have no signature
        takes_size = False
    # A network with random weights is then the same in every process.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            network = made(image_size=image_size) if takes_size else made()
        except Exception as error:
            raise UserError(
                f"encoder {name} cannot be made ({type(error).__name__}: {first_line(error)}); it is called "
                f"{'with image_size' if takes_size else 'without arguments'}"
            ) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"encoder {name} returns a {type(network).__name__}; it must return a torch.nn.Module"
        )
    return network


# What goes wrong


@contextlib.contextmanager
def _sizes(name: str, image_size: int) -> Iterator[None]:
    """Say so where a network cannot be made for images of a size."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        raise wrong_size(name, image_size, error) from error


def wrong_size(name: str, image_size: int, error: Exception) -> UserError:
    """Return what to tell of a network that cannot take images of a size."""
    return UserError(
        f"encoder {name} cannot take images of {image_size} pixels ({first_line(error)}); "
        f"its usual image_size is {transform(name, None).size}"
    )


@contextlib.contextmanager
def _download(weights: str, name: str, published: bool) -> Iterator[None]:
    """Say so where published weights do not come, whatever a hub's client raises then."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not published:
            raise
        raise UserError(
            f"could not download {weights} of encoder {name} ({first_line(error)}); give a file "
            "that holds them with --checkpoint FILE, or use --encoder pca, which needs none"
        ) from error
