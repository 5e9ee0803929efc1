"""Published layouts: a checkpoint of each, made here, against a forward pass that is written out here."""

import argparse
import hashlib
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision import models

from selective_ray import checkpoints
from selective_ray.encoders import RECIPES, Encoder, load, transform, weights_id
from selective_ray.errors import UserError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

State = dict[str, torch.Tensor]


def pixels_of(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def normalized(pixels: np.ndarray, colors: tuple[tuple, tuple]) -> torch.Tensor:
    mean, std = (torch.tensor(values) for values in colors)
    return ((torch.from_numpy(pixels).float() / 255 - mean) / std).permute(0, 3, 1, 2)


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def lived_in(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw the weights, and statistics of normalization that are not those of a new network."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, generator=generator)
    return network.eval()


@torch.no_grad()
def agrees(encoder: Encoder, pixels: np.ndarray, expected: torch.Tensor) -> None:
    got = encoder.encode(pixels)
    assert got.shape == expected.shape and encoder.dimension == expected.shape[1]
    np.testing.assert_allclose(got, F.normalize(expected.float(), dim=1).numpy(), atol=2e-5)


# Which file goes with which name


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.source])
def test_without_a_checkpoint_the_file_to_give_is_named(name):
    with pytest.raises(UserError, match=r"--checkpoint FILE, with .* of github\.com/\w+") as caught:
        load(name, checkpoint=None, image_size=transform(name, None).size)
    assert name in str(caught.value) and "\n" not in str(caught.value)


# MoCo v2, with and without EMAN


def moco(seed: int = 0) -> tuple[State, torch.nn.Module]:
    network = models.resnet50()
    network.fc = torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 128))
    network = lived_in(network, seed)
    key = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    state = prefixed(network.state_dict(), "module.encoder_q.") | prefixed(key, "module.encoder_k.")
    state |= {"module.queue": torch.randn(128, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return state, network


@pytest.fixture(scope="module")
def moco_checkpoint(tmp_path_factory):
    state, network = moco()
    path = tmp_path_factory.mktemp("moco") / "moco_v2_800ep_pretrain.pth.tar"
    # As main_moco.py of both projects saves it.
    content = {"epoch": 800, "arch": "resnet50", "state_dict": state, "best_acc1": torch.tensor(0.5)}
    torch.save(content | {"optimizer": {"state": {}, "param_groups": [{"lr": 0.03}]}}, path)
    return str(path), network


@pytest.mark.parametrize("name", ["moco-v2-head", "moco-eman"])
def test_moco_with_its_head(name, moco_checkpoint):
    path, network = moco_checkpoint
    pixels = pixels_of(2, 64)
    with torch.no_grad():
        expected = network(normalized(pixels, IMAGENET))
    encoder = load(name, checkpoint=path, image_size=64)
    assert encoder.dimension == 128
    agrees(encoder, pixels, expected)


@pytest.mark.parametrize("name", ["moco-v2", "moco-eman-trunk"])
def test_moco_without_its_head(name, moco_checkpoint):
    path, network = moco_checkpoint
    pixels, features = pixels_of(2, 64), []
    hook = network.fc.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        network(normalized(pixels, IMAGENET))
    hook.remove()
    encoder = load(name, checkpoint=path, image_size=64)
    assert encoder.dimension == 2048
    agrees(encoder, pixels, features[0])


def test_the_transform_of_moco_is_that_of_its_evaluation():
    for name in ("moco-v2", "moco-v2-head", "moco-eman", "moco-eman-trunk"):
        ours = transform(name, None)
        assert (ours.size, ours.crop, ours.interpolation) == (224, 224 / 256, "bilinear")
        assert (ours.mean, ours.std) == IMAGENET


def test_moco_of_another_width_is_refused(tmp_path):
    wide = models.wide_resnet50_2().state_dict()
    torch.save({"state_dict": prefixed(wide, "module.encoder_q.")}, tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"does not fit encoder moco-eman \(4 missing: fc.0.weight, .*shape"):
        load("moco-eman", checkpoint=str(tmp_path / "wide.pth"), image_size=64)


# ResNet-18 for CIFAR: SimCLR and CLD


def cifar_resnet18(seed: int) -> tuple[State, torch.nn.Module]:
    """Take torchvision's ResNet-18 with the stem for small images; returns the published names, and it."""
    network = models.resnet18()
    network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = torch.nn.Identity()
    network.fc = torch.nn.Identity()
    network = lived_in(network, seed)
    return {k.replace("downsample", "shortcut"): v for k, v in network.state_dict().items()}, network


@pytest.mark.parametrize("wrap", ["final", "during training", "parallel"])
def test_simclr(wrap, tmp_path):
    trunk, network = cifar_resnet18(1)
    state = prefixed(trunk, "backbone.") | {
        "contrastive_head.0.weight": torch.randn(512, 512),
        "contrastive_head.0.bias": torch.randn(512),
        "contrastive_head.2.weight": torch.randn(128, 512),
        "contrastive_head.2.bias": torch.randn(128),
    }
    if wrap == "during training":
        state = {"optimizer": {"state": {}, "param_groups": []}, "model": state, "epoch": 500}
    elif wrap == "parallel":
        state = prefixed(state, "module.")
    torch.save(state, tmp_path / "simclr_cifar-10.pth.tar")
    pixels = pixels_of(3, 32)
    with torch.no_grad():
        expected = network(normalized(pixels, CIFAR))
    encoder = load("simclr", checkpoint=str(tmp_path / "simclr_cifar-10.pth.tar"), image_size=32)
    assert encoder.dimension == 512
    agrees(encoder, pixels, expected)


def test_cld(tmp_path):
    trunk, network = cifar_resnet18(2)
    head = torch.randn(512, 128)
    state = trunk | {"linear.weight": head, "groupDis.0.weight": torch.randn(512, 128)}
    content = {
        # As train_cifar_moco_cld.py saves it, options and all.
        "opt": argparse.Namespace(dataset="cifar10", normlinear=True, lr_decay_epochs=[120, 160, 200]),
        "model": prefixed(state, "module."),
        "model_ema": {key: torch.zeros_like(value) for key, value in state.items()},
        "contrast": {"params": torch.tensor([-1]), "memory": torch.randn(64, 128)},
        "optimizer": {"state": {}, "param_groups": []},
        "scheduler": {"last_epoch": 200, "after_scheduler": {"T_max": 195}},
        "epoch": 200,
        "best_acc": 0.87,
    }
    torch.save(content, tmp_path / "cifar10_ckpt_epoch_200.pth")
    pixels = pixels_of(3, 32)
    with torch.no_grad():
        features = network(normalized(pixels, CIFAR))
    cosines = (features / features.norm(dim=1, keepdim=True)) @ (head / head.norm(dim=0))
    encoder = load("cld", checkpoint=str(tmp_path / "cifar10_ckpt_epoch_200.pth"), image_size=32)
    assert encoder.dimension == 128
    agrees(encoder, pixels, cosines)


def test_the_transform_of_cifar_takes_the_pixels_as_they_are():
    for name in ("simclr", "cld"):
        ours = transform(name, None)
        assert (ours.size, ours.crop, ours.mean, ours.std) == (32, 1.0, *CIFAR)


# Vision transformers: DINO, DINOv2, CLIP


def drawn(shapes: dict[str, tuple[int, ...]]) -> State:
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(shape, generator=generator) * 0.04 for name, shape in shapes.items()}
    scales = [name for name in state if ("norm" in name or "ln_" in name) and name.endswith("weight")]
    return state | {name: state[name] + 1 for name in scales}


def vit_small(patch: int, grid: int, *, scaled: bool) -> State:
    """Draw a ViT-S with the names of DINO, and with DINOv2's scale of every branch."""
    shapes = {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 1 + grid**2, 384),
        "patch_embed.proj.weight": (384, 3, patch, patch),
        "patch_embed.proj.bias": (384,),
        "norm.weight": (384,),
        "norm.bias": (384,),
    }
    for i in range(12):
        for layer, (out, wide) in {
            "attn.qkv": (1152, 384),
            "attn.proj": (384, 384),
            "mlp.fc1": (1536, 384),
            "mlp.fc2": (384, 1536),
        }.items():
            shapes |= {f"blocks.{i}.{layer}.weight": (out, wide), f"blocks.{i}.{layer}.bias": (out,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (384,), f"blocks.{i}.{norm}.bias": (384,)}
        if scaled:
            shapes |= {f"blocks.{i}.ls1.gamma": (384,), f"blocks.{i}.ls2.gamma": (384,)}
    return drawn(shapes)


def attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q kᵀ / √d) v of [b, t, 3 w], heads side by side."""
    b, t, w = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = qkv.reshape(b, t, 3, heads, w // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / (w // heads) ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(b, t, w)


@torch.no_grad()
def vit_features(state: State, x: torch.Tensor, patch: int, positions: torch.Tensor) -> torch.Tensor:
    """Compute the class token of DINO's ViT-S after its last normalization."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (384,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + positions
    for i in range(12):
        block = f"blocks.{i}"
        first, second = state.get(f"{block}.ls1.gamma", 1), state.get(f"{block}.ls2.gamma", 1)
        mixed = attention(linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv"), 6)
        x = x + first * linear(mixed, f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + second * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]


@pytest.mark.parametrize("whole", [False, True])
def test_dino(whole, tmp_path):
    state = vit_small(16, 14, scaled=False)
    content: dict = state
    if whole:  # as main_dino.py saves it, both networks with their projections
        other = {key: torch.zeros_like(value) for key, value in state.items()}
        head = {"head.mlp.0.weight": torch.zeros(8, 384), "head.last_layer.weight_g": torch.ones(8, 1)}
        content = {
            "student": prefixed(prefixed(other, "backbone.") | head, "module."),
            "teacher": prefixed(state, "backbone.") | head,
            "optimizer": {"state": {}, "param_groups": []},
            "epoch": 100,
            "args": argparse.Namespace(arch="vit_small", patch_size=16),
            "dino_loss": {"center": torch.zeros(1, 8)},
        }
    torch.save(content, tmp_path / "dino_deitsmall16_pretrain.pth")
    pixels = pixels_of(1, 224)
    expected = vit_features(state, normalized(pixels, IMAGENET), 16, state["pos_embed"])
    encoder = load("dino", checkpoint=str(tmp_path / "dino_deitsmall16_pretrain.pth"), image_size=224)
    assert encoder.dimension == 384
    agrees(encoder, pixels, expected)


@pytest.mark.parametrize("whole", [False, True])
def test_dinov2_at_a_smaller_size(whole, tmp_path):
    state = vit_small(14, 37, scaled=True)
    content: dict = state | {"mask_token": torch.zeros(1, 384)}
    if whole:
        head = {"dino_head.mlp.0.weight": torch.zeros(8, 384)}
        content = {"teacher": prefixed(content, "backbone.") | head}
    torch.save(content, tmp_path / "dinov2_vits14_pretrain.pth")
    pixels = pixels_of(2, 98)
    grid = state["pos_embed"][:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(7, 7), mode="bicubic", antialias=True, align_corners=False)
    positions = torch.cat([state["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    expected = vit_features(state, normalized(pixels, IMAGENET), 14, positions)
    encoder = load("dinov2", checkpoint=str(tmp_path / "dinov2_vits14_pretrain.pth"), image_size=98)
    assert encoder.dimension == 384
    agrees(encoder, pixels, expected)


def test_the_transforms_of_dino_are_those_of_their_evaluation():
    for name in ("dino", "dinov2"):
        ours = transform(name, None)
        assert (ours.size, ours.crop, ours.interpolation) == (224, 224 / 256, "bicubic")
        assert (ours.mean, ours.std) == IMAGENET


def clip_tower() -> State:
    shapes = {
        "class_embedding": (768,),
        "positional_embedding": (197, 768),
        "proj": (768, 512),
        "conv1.weight": (768, 3, 16, 16),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{norm}.weight": (768,), f"{norm}.bias": (768,)}
    for i in range(12):
        block = f"transformer.resblocks.{i}"
        shapes |= {
            f"{block}.ln_1.weight": (768,),
            f"{block}.ln_1.bias": (768,),
            f"{block}.attn.in_proj_weight": (2304, 768),
            f"{block}.attn.in_proj_bias": (2304,),
            f"{block}.attn.out_proj.weight": (768, 768),
            f"{block}.attn.out_proj.bias": (768,),
            f"{block}.ln_2.weight": (768,),
            f"{block}.ln_2.bias": (768,),
            f"{block}.mlp.c_fc.weight": (3072, 768),
            f"{block}.mlp.c_fc.bias": (3072,),
            f"{block}.mlp.c_proj.weight": (768, 3072),
            f"{block}.mlp.c_proj.bias": (768,),
        }
    return {name: value.half() for name, value in drawn(shapes).items()}


@torch.no_grad()
def clip_features(state: State, x: torch.Tensor) -> torch.Tensor:
    """Compute the embedding of OpenAI's ViT-B/16 image tower."""
    state = {key: value.float() for key, value in state.items()}

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (768,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    x = F.conv2d(x, state["conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([state["class_embedding"].expand(len(x), 1, -1), x], dim=1) + state["positional_embedding"]
    x = norm(x, "ln_pre")
    for i in range(12):
        block = f"transformer.resblocks.{i}"
        qkv = norm(x, f"{block}.ln_1") @ state[f"{block}.attn.in_proj_weight"].T
        mixed = attention(qkv + state[f"{block}.attn.in_proj_bias"], 12)
        x = x + linear(mixed, f"{block}.attn.out_proj")
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}.mlp.c_proj")
    return norm(x[:, 0], "ln_post") @ state["proj"]


# What the published files hold beside the image tower: the text tower, and sizes.
TEXT = {
    "logit_scale": torch.tensor(4.6),
    "positional_embedding": torch.zeros(77, 512),
    "text_projection": torch.zeros(512, 512),
    "transformer.resblocks.0.ln_1.weight": torch.ones(512),
    "input_resolution": torch.tensor(224),
}


def test_clip_in_every_published_form(tmp_path):
    tower = clip_tower()
    state = prefixed(tower, "visual.") | TEXT
    trained = {"epoch": 32, "name": "run", "state_dict": prefixed(state, "module."), "optimizer": {}}
    torch.save(trained, tmp_path / "epoch_32.pt")
    save_file(state, tmp_path / "open_clip_model.safetensors")
    scripted(state, tmp_path / "ViT-B-16.pt")
    positions = tower["positional_embedding"].float()
    grid = positions[1:].reshape(1, 14, 14, 768).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True, align_corners=False)
    small = torch.cat([positions[:1], grid.flatten(2)[0].T])
    for file, size, there in (
        ("epoch_32.pt", 224, positions),
        ("ViT-B-16.pt", 64, small),
        ("open_clip_model.safetensors", 64, small),
    ):
        pixels = pixels_of(1, size)
        expected = clip_features(tower | {"positional_embedding": there}, normalized(pixels, CLIP))
        encoder = load("clip", checkpoint=str(tmp_path / file), image_size=size)
        assert encoder.dimension == 512
        agrees(encoder, pixels, expected)


def test_the_transform_of_clip_is_its_own():
    ours = transform("clip", None)
    assert (ours.size, ours.crop, ours.interpolation) == (224, 1.0, "bicubic")
    assert (ours.mean, ours.std) == CLIP


def test_clip_and_dino_do_not_take_each_other(tmp_path):
    torch.save(vit_small(16, 14, scaled=False), tmp_path / "dino.pth")
    with pytest.raises(UserError, match=r"does not fit encoder clip \(.* missing: class_embedding, "):
        load("clip", checkpoint=str(tmp_path / "dino.pth"), image_size=224)
    torch.save(prefixed(clip_tower(), "visual."), tmp_path / "clip.pth")
    with pytest.raises(UserError, match=r"does not fit encoder dino \(.* missing: "):
        load("dino", checkpoint=str(tmp_path / "clip.pth"), image_size=224)


# TorchScript archives


class Tree(torch.nn.Module):
    """Modules and parameters under given names, as TorchScript keeps them."""

    def forward(self, x):
        return x


def scripted(state: State, path) -> None:
    root = Tree()
    for name, value in state.items():
        *modules, last = name.split(".")
        node = root
        for module in modules:
            if module not in node._modules:
                node.add_module(module, Tree())
            node = node._modules[module]
        node.register_buffer(last, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and what is published stays
        torch.jit.save(torch.jit.trace(root, torch.zeros(1)), path)


def test_a_torchscript_archive_gives_its_weights(tmp_path):
    state = {
        "a.weight": torch.randn(3, 4).half(),
        "a.b.0.bias": torch.randn(5).t(),
        "view": torch.arange(12.0).reshape(3, 4).t(),
        "count": torch.tensor(7),
    }
    scripted(state, tmp_path / "script.pt")
    got = checkpoints.read(str(tmp_path / "script.pt"))
    assert got.keys() == state.keys()
    for key, value in state.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value)


class Trap:
    """A pickle that leaves a file behind when it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_torchscript_archive_runs_nothing(tmp_path):
    marker = tmp_path / "executed"
    scripted({"weight": torch.zeros(2)}, tmp_path / "script.pt")
    with (
        zipfile.ZipFile(tmp_path / "script.pt") as archive,
        zipfile.ZipFile(tmp_path / "trap.pt", "w") as trap,
    ):
        for name in archive.namelist():
            content = archive.read(name)
            trap.writestr(name, pickle.dumps(Trap(str(marker))) if name.endswith("data.pkl") else content)
    with pytest.raises(UserError, match="could run a program"):
        checkpoints.read(str(tmp_path / "trap.pt"))
    assert not marker.exists()


# Files and buckets


def test_a_checkpoint_may_be_a_uri(tmp_path):
    trunk, _ = cifar_resnet18(4)
    path = tmp_path / "sim clr.pth"
    torch.save(prefixed(trunk, "backbone."), path)
    pixels = pixels_of(1, 32)
    plain = load("simclr", checkpoint=str(path), image_size=32)
    by_uri = load("simclr", checkpoint=path.as_uri(), image_size=32)
    assert np.array_equal(plain.encode(pixels), by_uri.encode(pixels))
    expected = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert weights_id("simclr", str(path)) == weights_id("simclr", path.as_uri()) == expected


def test_a_relative_path_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoints.absolute("weights.pth") == str(tmp_path / "weights.pth")
    assert checkpoints.absolute("s3://bucket/weights.pth") == "s3://bucket/weights.pth"


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("{}/gone.pth", "there is no checkpoint .*gone.pth"),
        ("file://{}/gone.pth", "there is no checkpoint .*gone.pth"),
        ("file://{}", "is a folder"),
        ("{}", "is a folder"),
        ("carrier-pigeon://loft/weights.pth", "cannot be opened: give a local path, or"),
    ],
)
def test_a_checkpoint_that_cannot_be_opened_gets_a_sentence(uri, sentence, tmp_path):
    for use in (checkpoints.sha256, checkpoints.read):
        with pytest.raises(UserError, match=sentence) as caught:
            use(uri.format(tmp_path))
        assert "\n" not in str(caught.value)


def test_safetensors_that_are_cut_are_refused(tmp_path):
    save_file({"a": torch.zeros(64)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        checkpoints.read(str(tmp_path / "cut.safetensors"))
