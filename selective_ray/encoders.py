"""Encoder name -> network, transform and dimension; a batch of pixels to unit vectors."""

import difflib
import http.client
import math
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from selective_ray.errors import UsageError, UserError

if TYPE_CHECKING:  # torch takes seconds to import, and most commands never encode
    import torch

# The network that feature baselines are most often reported with, small enough for a laptop. Where its
# weights cannot be downloaded: --checkpoint FILE with weights from elsewhere, or --encoder pca.
DEFAULT = "resnet50"
PCA = "pca"

# torchvision names the weights of a network after the network, in another case.
_TITLES = """
AlexNet ConvNeXt_Base ConvNeXt_Large ConvNeXt_Small ConvNeXt_Tiny DenseNet121 DenseNet161 DenseNet169
DenseNet201 EfficientNet_B0 EfficientNet_B1 EfficientNet_B2 EfficientNet_B3 EfficientNet_B4
EfficientNet_B5 EfficientNet_B6 EfficientNet_B7 EfficientNet_V2_L EfficientNet_V2_M EfficientNet_V2_S
GoogLeNet Inception_V3 MNASNet0_5 MNASNet0_75 MNASNet1_0 MNASNet1_3 MaxVit_T MobileNet_V2
MobileNet_V3_Large MobileNet_V3_Small RegNet_X_16GF RegNet_X_1_6GF RegNet_X_32GF RegNet_X_3_2GF
RegNet_X_400MF RegNet_X_800MF RegNet_X_8GF RegNet_Y_128GF RegNet_Y_16GF RegNet_Y_1_6GF RegNet_Y_32GF
RegNet_Y_3_2GF RegNet_Y_400MF RegNet_Y_800MF RegNet_Y_8GF ResNeXt101_32X8D ResNeXt101_64X4D
ResNeXt50_32X4D ResNet101 ResNet152 ResNet18 ResNet34 ResNet50 ShuffleNet_V2_X0_5 ShuffleNet_V2_X1_0
ShuffleNet_V2_X1_5 ShuffleNet_V2_X2_0 SqueezeNet1_0 SqueezeNet1_1 Swin_B Swin_S Swin_T Swin_V2_B Swin_V2_S
Swin_V2_T VGG11 VGG11_BN VGG13 VGG13_BN VGG16 VGG16_BN VGG19 VGG19_BN ViT_B_16 ViT_B_32 ViT_H_14 ViT_L_16
ViT_L_32 Wide_ResNet101_2 Wide_ResNet50_2
"""
_TITLE_OF = {title.lower(): title for title in _TITLES.split()}
NAMES = tuple(sorted(_TITLE_OF))

# Published only as SWAG weights, whose license forbids commercial use.
_UNPUBLISHED = ("regnet_y_128gf", "vit_h_14")

# Image size and shorter side before the crop, of the published weights where these are not 224 and 256.
_SIZES = {
    (224, 224): "maxvit_t",
    (224, 230): "convnext_small",
    (224, 232): "convnext_base convnext_large mnasnet0_75 mnasnet1_3 resnext101_64x4d shufflenet_v2_x1_5 "
    "shufflenet_v2_x2_0 swin_t",
    (224, 236): "convnext_tiny",
    (224, 238): "swin_b",
    (224, 242): "vit_l_16",
    (224, 246): "swin_s",
    (240, 256): "efficientnet_b1",
    (256, 260): "swin_v2_s swin_v2_t",
    (256, 272): "swin_v2_b",
    (288, 288): "efficientnet_b2",
    (299, 342): "inception_v3",
    (300, 320): "efficientnet_b3",
    (380, 384): "efficientnet_b4",
    (384, 384): "efficientnet_v2_s",
    (456, 456): "efficientnet_b5",
    (480, 480): "efficientnet_v2_l efficientnet_v2_m",
    (528, 528): "efficientnet_b6",
    (600, 600): "efficientnet_b7",
}
_SIZE_OF = {name: sizes for sizes, names in _SIZES.items() for name in names.split()}

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
PCA_SIZE = 16
PCA_MAX_SIZE = 32  # the covariance has (3 * size^2)^2 entries


@dataclass(frozen=True)
class Encoder:
    """A network without its classifier, ready to embed pixels.

    `encode` takes uint8 [b, h, w, 3] and returns float32 [b, dimension], rows of unit length. A row
    whose features are all zero or not finite has no direction: it is NaN throughout.
    """

    name: str
    dimension: int
    encode: Callable[[np.ndarray], np.ndarray]


def check_name(name: str) -> None:
    """Raise UsageError, naming the nearest known encoder, unless the name is known."""
    if name != PCA and name not in NAMES:
        nearest = difflib.get_close_matches(name.lower(), (*NAMES, PCA), n=1, cutoff=0)[0]
        raise UsageError(f"there is no encoder {name!r}; the nearest known name is {nearest!r}")


def transform(name: str, image_size: int | None) -> tuple[int, float]:
    """Return the image size and the crop that `images.decode` needs; raises UsageError.

    A size that is asked for keeps the crop. Resizing is bilinear for all networks, also the few whose
    published transform is bicubic.
    """
    check_name(name)
    if name == PCA:
        if image_size is not None and image_size > PCA_MAX_SIZE:
            raise UsageError(f"encoder pca compares small images: lower image_size to {PCA_MAX_SIZE} or less")
        return image_size or PCA_SIZE, 1.0
    size, shorter = _SIZE_OF.get(name, (224, 256))
    return image_size or size, size / shorter


def weights_id(name: str) -> str:
    """Return the identity of the published weights, "fitted" for pca; raises UserError where there are none.

    IMAGENET1K_V1 also where there is a V2: V2 was trained with label smoothing and mixup, which raise
    the accuracy but blur the distances between neighbors that the selection lives on.
    """
    check_name(name)
    if name == PCA:
        return "fitted"
    if name in _UNPUBLISHED:
        raise UserError(
            f"there are no freely licensed weights of {name}; give --checkpoint FILE, or another --encoder"
        )
    return f"{_TITLE_OF[name]}_Weights.IMAGENET1K_V1"


def load(
    name: str,
    *,
    checkpoint: str | None,
    image_size: int,
    pca: dict[str, np.ndarray] | None = None,
    device: str = "cpu",
) -> Encoder:
    """Load an encoder with the weights of the checkpoint, the published ones without it, or the fitted pca.

    The embedding is what the last linear layer of the network would read. Raises UserError where the
    weights cannot be had or do not fit.
    """
    check_name(name)
    if name == PCA:
        if checkpoint is not None:
            raise UsageError("encoder pca is fitted to the images: leave out --checkpoint, or name a network")
        if pca is None:
            raise ValueError("encoder pca needs what fit_pca returned")
        return Encoder(PCA, pca["components"].shape[1], _pca_encode(pca))
    if checkpoint is None:
        network = _published(name, image_size)
        _cut_classifier(network)
    else:
        state = _read_state(checkpoint)
        network = _build(name, image_size, aux_logits=False, init_weights=False)
        _fill(network, state, _cut_classifier(network), f"checkpoint {checkpoint}", name)
    encode = _network_encode(network, name, device)
    try:
        probe = encode(np.zeros((1, image_size, image_size, 3), np.uint8))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _wrong_size(name, image_size, error) from error
    return Encoder(name, probe.shape[1], encode)


def fit_pca(pixels: np.ndarray, dimension: int = 64) -> dict[str, np.ndarray]:
    """Fit principal components to a sample of images, uint8 [s, h, w, 3], scaled to [0, 1].

    Returns mean float32 [p] and components float32 [p, d], p = h * w * 3, d = min(dimension, rank), the
    largest entry of each component positive. Raises UserError where all images are the same.
    """
    x = pixels.reshape(len(pixels), math.prod(pixels.shape[1:])) / 255
    mean = x.mean(axis=0) if len(x) else np.zeros(x.shape[1])
    x -= mean
    variances, components = np.linalg.eigh(x.T @ x / max(len(x) - 1, 1))
    variances, components = variances[::-1], components[:, ::-1]
    # A gray level is 4e-3, so differences below a millionth of it are rounding.
    rank = int(np.sum(variances > max(variances[0] * len(variances) * np.finfo(np.float64).eps, 1e-18)))
    rank = min(rank, len(x) - 1)
    if rank < 1:
        raise UserError(
            f"all of the {len(x)} sampled images have the same pixels, so encoder pca cannot tell images "
            "apart; use another --encoder"
        )
    components = components[:, : min(dimension, rank)]
    largest = np.abs(components).argmax(axis=0)
    components = components * np.sign(components[largest, np.arange(components.shape[1])])
    return {"mean": mean.astype(np.float32), "components": components.astype(np.float32)}


def _pca_encode(pca: dict[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def encode(pixels: np.ndarray) -> np.ndarray:
        x = pixels.reshape(len(pixels), -1).astype(np.float32) / np.float32(255)
        return _unit((x - pca["mean"]) @ pca["components"])

    return encode


def _network_encode(network: "torch.nn.Module", name: str, device: str) -> Callable[[np.ndarray], np.ndarray]:
    import torch

    # The one network whose published weights were trained with another normalization.
    half = name == "efficientnet_v2_l"
    mean = torch.tensor((0.5,) * 3 if half else _MEAN, device=device).view(3, 1, 1)
    std = torch.tensor((0.5,) * 3 if half else _STD, device=device).view(3, 1, 1)
    network = network.to(device, memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def encode(pixels: np.ndarray) -> np.ndarray:
        # torch.tensor copies: an array out of an object store is read-only, which from_numpy warns about.
        x = torch.tensor(pixels, device=device).permute(0, 3, 1, 2)  # channels last in memory
        return _unit(network((x.float() / 255 - mean) / std).float().cpu().numpy())

    return encode


def _unit(features: np.ndarray) -> np.ndarray:
    """Scale the rows of float32 [b, d] to unit length; NaN where there is no direction."""
    features = features.astype(np.float64)  # squares of float32 overflow
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    norms[(norms == 0) | ~np.isfinite(norms)] = np.nan
    return (features / norms).astype(np.float32)


def _published(name: str, image_size: int) -> "torch.nn.Module":
    weights = weights_id(name)
    try:
        return _build(name, image_size, weights=weights)
    except (OSError, http.client.HTTPException, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(
            f"could not download the weights {weights} of encoder {name} ({_line(error)}); give a file "
            "that holds them with --checkpoint FILE, or use --encoder pca, which needs none"
        ) from error


def _build(name: str, image_size: int, **options: object) -> "torch.nn.Module":
    from torchvision import models

    if name in ("googlenet", "inception_v3"):
        options["transform_input"] = True  # as the published weights want it, also when they come in a file
    else:
        options = {key: value for key, value in options.items() if key == "weights"}
    if name.startswith("vit_"):
        options["image_size"] = image_size
    if name == "maxvit_t":
        options["input_size"] = (image_size, image_size)
    try:
        return models.get_model(name, progress=False, **options)
    except (ValueError, AssertionError) as error:
        raise _wrong_size(name, image_size, error) from error


def _wrong_size(name: str, image_size: int, error: Exception) -> UserError:
    usual, _ = transform(name, None)
    return UserError(
        f"encoder {name} cannot take images of {image_size} pixels ({_line(error)}); "
        f"its usual image_size is {usual}"
    )


def _cut_classifier(network: "torch.nn.Module") -> str:
    """Take the last linear layer off the network; returns the prefix of its names in a state dict."""
    from torch import nn

    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:  # squeezenet classifies by convolution
        network.classifier = nn.AdaptiveAvgPool2d(1)
        return "classifier."
    network.set_submodule(linear[-1], nn.Identity())
    return f"{linear[-1]}."


def _read_state(path: str) -> Mapping[str, "torch.Tensor"]:
    """Read a state dict from a file; raises UserError."""
    import torch

    remedy = "save the weights with torch.save(network.state_dict(), FILE)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns about is refused below
            # weights_only: any other pickle may run a program when it is loaded.
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; check --checkpoint") from None
    except IsADirectoryError:
        raise UserError(
            f"checkpoint {path} is a folder; give the file in it that holds the weights"
        ) from None
    except PermissionError:
        raise UserError(f"checkpoint {path} is not readable for this user; change its permissions") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} is damaged or holds more than tensors, which is never loaded because "
            f"it could run a program; {remedy}"
        ) from error
    except Exception as error:  # whatever the broken bytes lead torch to
        raise UserError(
            f"checkpoint {path} is damaged ({_line(error)}); copy it again, or {remedy}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not (isinstance(state, Mapping) and state and _all_named_tensors(state)):
        raise UserError(f"checkpoint {path} holds no state dict, or more than that; {remedy}")
    return state


def _all_named_tensors(state: Mapping) -> bool:
    import torch

    return all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items())


def _fill(
    network: "torch.nn.Module", state: Mapping[str, "torch.Tensor"], unused: str, source: str, name: str
) -> None:
    """Load a state dict into the network; raises UserError that lists what does not fit."""
    own = network.state_dict()
    # Layers write their version beside the tensors; without it they accept what older ones saved. mnasnet
    # insists on one.
    versions = getattr(state, "_metadata", None) or {"": own._metadata[""]}
    if all(key.startswith("module.") for key in state):  # saved from DataParallel
        state = {key.removeprefix("module."): value for key, value in state.items()}
        versions = {key.removeprefix("module").removeprefix("."): value for key, value in versions.items()}
    if name.startswith("densenet"):  # the published files have the names of an older torchvision
        state = {
            re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key): state[key] for key in state
        }
    auxiliary = ("aux1.", "aux2.", "AuxLogits.") if name in ("googlenet", "inception_v3") else ()
    state = {key: value for key, value in state.items() if not key.startswith((unused, *auxiliary))}
    reshaped = {key for key, value in state.items() if key in own and value.shape != own[key].shape}
    fitting = OrderedDict((key, value) for key, value in state.items() if key not in reshaped)
    fitting._metadata = versions
    result = network.load_state_dict(fitting, strict=False)
    missing = [key for key in result.missing_keys if key not in reshaped]
    shapes = [f"{key} {_shape(state[key])} instead of {_shape(own[key])}" for key in state if key in reshaped]
    complaints = (
        ("missing", missing),
        ("unexpected", result.unexpected_keys),
        ("of another shape", shapes),
    )
    found = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in complaints if keys]
    if found:
        raise UserError(
            f"{source} does not fit encoder {name} ({'; '.join(found)}); "
            "name the network that it was trained as with --encoder"
        )


def _some(keys: list[str], most: int = 5) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def _shape(tensor: "torch.Tensor") -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
