"""Encoder name -> transform, weights and dimension; batches of pixels to unit vectors.

A name is one of

    resnet50, …                    every classification network of torchvision
    moco-v2, cld, dino, clip, …    the published networks of self-supervised methods: RECIPES
    timm/NAME                      every network of timm
    open_clip/MODEL/TAG            every image tower of open_clip
    package.module:factory         a person's own
    s3://bucket/run, folder/run    what `selective-ray pretrain` learned there
    pca                            principal components of the pixels
"""

import difflib
import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from selective_ray import checkpoints, learned
from selective_ray.errors import UsageError, UserError, first_line
from selective_ray.objects import DIRECT, Access

if TYPE_CHECKING:
    # torch takes seconds to import, and most commands never encode: what needs it is imported where a network
    # is loaded.
    from torch import nn

    from selective_ray import inference

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

# The published transforms that resize bicubically.
_BICUBIC = {
    *(f"efficientnet_b{i}" for i in range(8)),
    *("efficientnet_v2_l", "maxvit_t", "swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s", "swin_v2_t"),
}

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
PCA_SIZE = 16
PCA_MAX_SIZE = 32  # the covariance has (3 * size^2)^2 entries


@dataclass(frozen=True)
class Transform:
    """How an image becomes what a network reads.

    The shorter side is resized to size / crop, by "bilinear" or "bicubic" interpolation, and a square of
    size pixels cut out of the center; colors in [0, 1] are shifted by mean and divided by std.
    """

    size: int = 224
    crop: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD


@dataclass(frozen=True)
class Recipe:
    """A published network: how it reads images, which it is, and where its weights are in a checkpoint.

    They are those under `prefixes`, less those under `unused`. `source` is the file that a person gives with
    --checkpoint; where it is empty, the network's library downloads the weights.
    """

    transform: Transform
    network: str
    prefixes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    source: str = ""


_CIFAR = Transform(32, 1.0, "bilinear", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_CLIP = Transform(
    224,
    1.0,
    "bicubic",
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
_MOCO = "moco_v2_800ep_pretrain.pth.tar of github.com/facebookresearch/moco"
_EMAN = "res50_moco_eman_800ep.pth.tar of github.com/amazon-science/exponential-moving-average-normalization"
_SCAN = "simclr_cifar-10.pth.tar of github.com/wvangansbeke/Unsupervised-Classification"
_CLD = "cifar10_ckpt_epoch_200.pth or cifar100_… of github.com/TonyLianLong/UnsupervisedSelectiveLabeling"

# Prefixes and names as the programs that trained these save them. Besides, MoCo's checkpoints hold the key
# encoder and the queue, CLD's the memory, DINO's the student and the projection, CLIP's the text.
RECIPES = {
    "moco-v2": Recipe(Transform(), "resnet50", ("encoder_q.",), source=_MOCO),
    "moco-v2-head": Recipe(Transform(), "resnet50-mlp", ("encoder_q.",), source=_MOCO),
    # USL embeds ImageNet by the head, not by the trunk.
    "moco-eman": Recipe(Transform(), "resnet50-mlp", ("encoder_q.",), source=_EMAN),
    "moco-eman-trunk": Recipe(Transform(), "resnet50", ("encoder_q.",), source=_EMAN),
    "simclr": Recipe(_CIFAR, "cifar-resnet18", ("backbone.",), ("contrastive_head.",), _SCAN),
    "cld": Recipe(_CIFAR, "cifar-resnet18-cosine", (), ("groupDis.",), _CLD),
    # As evaluated by nearest neighbors in facebookresearch/dino and dinov2.
    "dino": Recipe(
        Transform(interpolation="bicubic"), "timm/vit_small_patch16_224.dino", ("backbone.",), ("head.",)
    ),
    "dinov2": Recipe(
        Transform(interpolation="bicubic"),
        "timm/vit_small_patch14_dinov2.lvd142m",
        ("backbone.",),
        ("dino_head.", "mask_token"),
    ),
    "clip": Recipe(_CLIP, "open_clip/ViT-B-16-quickgelu/openai", ("visual.",)),
}
_EXTRAS = {"timm": ("timm", "timm"), "open_clip": ("open_clip", "clip")}
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True)
class Encoder:
    """A network without its classifier, ready to embed pixels.

    `encode` takes uint8 [b, h, w, 3] and returns float32 [b, dimension], rows of unit length; `stream` does
    so for many batches, on a GPU with copies beside the computation. A row whose features are all zero or
    not finite has no direction: it is NaN throughout.
    """

    name: str
    dimension: int
    encode: Callable[[np.ndarray], np.ndarray]
    stream: Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]


def is_factory(name: str) -> bool:
    """Tell whether a name is a person's own `package.module:factory`."""
    return _FACTORY.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Raise UsageError, naming the nearest known encoder, unless the name is known or of a known form.

    Whether timm, open_clip or a person's module has what is named is found by `transform`.
    """
    if learned.is_name(name):
        return
    forms = {"timm": 2, "open_clip": 3}
    library, *rest = name.split("/")
    if library in forms and (len(rest) + 1 != forms[library] or not all(rest)):
        raise UsageError(f"there is no encoder {name!r}; the form is timm/NAME or open_clip/MODEL/TAG")
    if ":" in name and not is_factory(name):
        raise UsageError(f"there is no encoder {name!r}; the form of your own is package.module:factory")
    known = (*NAMES, *RECIPES, PCA)
    if library not in forms and ":" not in name and name not in known:
        nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0)[0]
        raise UsageError(f"there is no encoder {name!r}; the nearest known name is {nearest!r}")


def transform(name: str, image_size: int | None, access: Access = DIRECT) -> Transform:
    """Return how an encoder wants its images; raises UserError where its library, module or run is not there.

    A size that is asked for keeps the crop.
    """
    check_name(name)
    if name == PCA:
        if image_size is not None and image_size > PCA_MAX_SIZE:
            raise UsageError(f"encoder pca compares small images: lower image_size to {PCA_MAX_SIZE} or less")
        return Transform(image_size or PCA_SIZE, 1.0)
    if learned.is_name(name):
        made, *_ = learned.find(name, access)
        return Transform(image_size or made.image_size, 1.0, mean=tuple(made.mean), std=tuple(made.std))
    _check_library(name)
    usual = _usual_transform(name)
    return replace(usual, size=image_size or usual.size)


def _usual_transform(name: str) -> Transform:
    if name in RECIPES:
        return RECIPES[name].transform
    if name in NAMES:
        size, shorter = _SIZE_OF.get(name, (224, 256))
        # The one network whose published weights were trained with another normalization.
        half = name == "efficientnet_v2_l"
        return Transform(
            size,
            size / shorter,
            "bicubic" if name in _BICUBIC else "bilinear",
            (0.5,) * 3 if half else _MEAN,
            (0.5,) * 3 if half else _STD,
        )
    from selective_ray import networks

    if is_factory(name):
        return networks.factory_transform(name)
    return networks.timm_transform(name) if _library(name) == "timm" else networks.open_clip_transform(name)


def _library(name: str) -> str:
    """Return the library that an encoder's network is in, where it is one that may be absent."""
    library = (RECIPES[name].network if name in RECIPES else name).partition("/")[0]
    return library if library in _EXTRAS else ""


def _check_library(name: str) -> None:
    library = _library(name)
    if library and importlib.util.find_spec(_EXTRAS[library][0]) is None:
        raise UserError(
            f"encoder {name} needs {library}, which is not installed here: "
            f"pip install 'selective-ray[{_EXTRAS[library][1]}]'"
        )


def weights_id(name: str, checkpoint: str | None = None, access: Access = DIRECT) -> str:
    """Return the identity of an encoder's weights: of what is in a file, its hash; raises UserError.

    Without a checkpoint that of the published weights, "fitted" for pca. Of torchvision's, IMAGENET1K_V1
    also where there is a V2: V2 was trained with label smoothing and mixup, which raise the accuracy but
    blur the distances between neighbors that the selection lives on.
    """
    check_name(name)
    if name == PCA:
        return "fitted"
    if learned.is_name(name):
        if checkpoint is not None:
            raise UsageError(f"the weights of encoder {name} are in its run: leave out --checkpoint")
        return f"sha256:{learned.find(name, access)[0].sha256}"
    given = checkpoints.sha256(checkpoint, access) if checkpoint is not None else None
    if is_factory(name):
        from selective_ray import networks

        source = checkpoints.sha256(networks.factory(name)[1])
        return f"source {source}" + (f", checkpoint {given}" if given else "")
    return given or _published_id(name)


def _published_id(name: str) -> str:
    if name in NAMES:
        if name in _UNPUBLISHED:
            raise UserError(
                f"there are no freely licensed weights of {name}; give --checkpoint FILE, or another "
                "--encoder"
            )
        return f"{_TITLE_OF[name]}_Weights.IMAGENET1K_V1"
    if name in RECIPES and (source := RECIPES[name].source):
        raise UserError(
            f"the weights of encoder {name} are not downloaded by themselves: give --checkpoint FILE, "
            f"with {source}"
        )
    network = RECIPES[name].network if name in RECIPES else name
    _check_library(name)
    from selective_ray import networks

    if _library(name) == "open_clip":
        networks.open_clip_config(network)
        return network
    config = networks.timm_config(network)
    if not config.has_weights:
        raise UserError(f"timm has no weights of {name}; give --checkpoint FILE, or another --encoder")
    return f"timm/{config.architecture}.{config.tag}"  # the tag also where the name leaves it to timm


def load(
    name: str,
    *,
    checkpoint: str | None,
    image_size: int,
    pca: dict[str, np.ndarray] | None = None,
    device: str = "cpu",
    precision: str = "auto",
    compile: bool = False,
    batch: int = 1,
    access: Access = DIRECT,
) -> Encoder:
    """Load an encoder with the weights of the checkpoint, the published ones without it, or the fitted pca.

    The embedding is what the last linear layer of a classification network would read, and of other networks
    what they return. precision is "float32", "bfloat16", or "auto": bfloat16 on a GPU that has it. A GPU and
    a compiled network are tried with a batch of the size that is to come. Raises UserError where the weights
    cannot be had or do not fit, or the network cannot take such images.
    """
    check_name(name)
    if name == PCA:
        if checkpoint is not None:
            raise UsageError("encoder pca is fitted to the images: leave out --checkpoint, or name a network")
        if pca is None:
            raise ValueError("encoder pca needs what fit_pca returned")
        encode = _pca_encode(pca)
        return Encoder(PCA, pca["components"].shape[1], encode, lambda batches: map(encode, batches))
    wanted = transform(name, image_size, access)
    if checkpoint is None:
        weights_id(name, access=access)
    from selective_ray import inference

    module = network(name, checkpoint, image_size, access)
    run = inference.Inference(module, mean=wanted.mean, std=wanted.std, device=device, precision=precision)
    dimension = _dimension(run, name, image_size, batch if device != "cpu" else 1)
    if compile:
        run.compile()
        try:
            run.probe(batch, image_size)
        except Exception as error:  # of the compilers that torch calls
            raise UserError(
                f"encoder {name} cannot be compiled here ({first_line(error)}); set embed.compile to false"
            ) from error
    return Encoder(name, dimension, run.encode, run.stream)


def network(name: str, checkpoint: str | None, image_size: int, access: Access = DIRECT) -> "nn.Module":
    """Build the network of an encoder with its weights; raises UserError as `load` does, and for pca."""
    from selective_ray import networks

    if name == PCA:
        raise UserError("encoder pca is no network, and cannot be trained; name another --encoder")
    if learned.is_name(name):
        return learned.load(name, image_size, access)
    made = networks.build(name, image_size, published=checkpoint is None)
    if checkpoint is not None:
        checkpoints.fit(
            made.module,
            checkpoints.located(checkpoints.read(checkpoint, access), made.prefixes),
            unused=made.unused,
            adapt=made.adapt,
            source=checkpoint,
            encoder=name,
        )
    return made.module


def operations(
    name: str, checkpoint: str | None, image_size: int, access: Access = DIRECT, dimension: int = 64
) -> float:
    """Count the floating-point operations of embedding one image, multiplications and additions apart.

    dimension is that of `pca`, which is not loaded for it.
    """
    if name == PCA:
        return 2.0 * 3 * image_size * image_size * dimension
    from torch.utils.flop_counter import FlopCounterMode

    encoder = load(name, checkpoint=checkpoint, image_size=image_size, access=access)
    with FlopCounterMode(display=False) as counter:
        encoder.encode(np.zeros((1, image_size, image_size, 3), np.uint8))
    return float(counter.get_total_flops())


def _dimension(run: "inference.Inference", name: str, image_size: int, batch: int) -> int:
    """Try a batch of black images; returns d, or raises UserError."""
    import torch

    from selective_ray import networks

    try:
        features = run.probe(batch, image_size)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{batch} images of {image_size} pixels are more than encoder {name} has memory for on this "
            "device; set a smaller embed.batch"
        ) from error
    except Exception as error:  # a network may raise anything for what it was not made for
        raise networks.wrong_size(name, image_size, error) from error
    shape = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
    if not isinstance(shape, list) or len(shape) != 2 or shape[0] != batch:
        raise UserError(
            f"encoder {name} returns {shape} for a batch of {batch}; it must return one row for each image, "
            f"[{batch}, d]"
        )
    return shape[1]


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


def unit(features: np.ndarray) -> np.ndarray:
    """Scale the rows of float32 [b, d] to unit length; NaN where there is no direction."""
    features = features.astype(np.float64)  # squares of float32 overflow
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    norms[(norms == 0) | ~np.isfinite(norms)] = np.nan
    return (features / norms).astype(np.float32)


def _pca_encode(pca: dict[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def encode(pixels: np.ndarray) -> np.ndarray:
        x = pixels.reshape(len(pixels), -1).astype(np.float32) / np.float32(255)
        return unit((x - pca["mean"]) @ pca["components"])

    return encode
