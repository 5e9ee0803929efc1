"""Encoders: names and transforms against torchvision, embeddings against a forward pass by hand."""

import functools
import itertools
import pickle
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import torch
from torchvision import models

from selective_ray import encoders
from selective_ray.encoders import check_name, fit_pca, load, transform, weights_id
from selective_ray.errors import UsageError, UserError
from selective_ray.inference import autocast_dtype, overlapped


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, **options).eval()


def pixels_of(count: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(network("resnet18").state_dict(), path)
    return path


# Names, transforms and weights


def test_names_are_torchvisions():
    assert list(encoders.NAMES) == sorted(models.list_models(module=models))


def test_the_default_is_known_and_others_get_the_nearest_name():
    for name in (encoders.DEFAULT, "pca", *encoders.NAMES):
        check_name(name)
    for name, nearest in (
        ("resnet5", "resnet50"),
        ("ResNet18", "resnet18"),
        ("vit", "vit_"),
        ("", ""),
        ("PCA", "pca"),
    ):
        with pytest.raises(UsageError, match=f"the nearest known name is '{nearest}"):
            check_name(name)


def test_transforms_and_weights_are_those_of_the_published_weights():
    for name in encoders.NAMES:
        available = {str(weights): weights for weights in models.get_model_weights(name)}
        if name in ("regnet_y_128gf", "vit_h_14"):
            assert all("SWAG" in weights for weights in available)
            with pytest.raises(UserError, match=r"no freely licensed weights .* --checkpoint FILE"):
                weights_id(name)
            continue
        published = available[weights_id(name)].transforms()
        ours = transform(name, None)
        shorter = round(ours.size / ours.crop)
        assert ([ours.size], [shorter]) == (published.crop_size, published.resize_size), name
        assert ours.interpolation == published.interpolation.value, name
        assert (published.mean, published.std) == (list(ours.mean), list(ours.std)), name


def test_an_asked_size_keeps_the_crop():
    for name, asked, size, crop in (
        ("resnet50", None, 224, 0.875),
        ("resnet50", 96, 96, 0.875),
        ("clip", 336, 336, 1.0),
        ("pca", None, 16, 1.0),
        ("pca", 8, 8, 1.0),
    ):
        assert (transform(name, asked).size, transform(name, asked).crop) == (size, crop)
    with pytest.raises(UsageError, match="lower image_size to 32"):
        transform("pca", 224)


@pytest.mark.parametrize(
    "name", ["timm/", "timm/a/b", "open_clip/ViT-B-16", "open_clip//x", ":f", "a:", "a b:c"]
)
def test_a_form_that_is_not_kept_gets_the_form(name):
    with pytest.raises(UsageError, match=r"the form (is timm/NAME or open_clip|of your own is package)"):
        check_name(name)


def test_import_names_and_transforms_need_no_torch():
    code = (
        "import sys; from selective_ray import encoders as e; e.transform('resnet50', None); "
        "e.transform('cld', None); e.transform('dino', None); e.check_name('timm/x'); "
        "e.weights_id('resnet50'); sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Embeddings


def test_embedding_is_the_input_of_the_last_layer_by_hand(resnet18):
    pixels = pixels_of(3, 64)
    reference = network("resnet18")
    reference.fc = torch.nn.Identity()
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = reference((x - mean[:, None, None]) / std[:, None, None])
    expected = torch.nn.functional.normalize(expected, dim=1).numpy()
    encoder = load("resnet18", checkpoint=str(resnet18), image_size=64)
    got = encoder.encode(pixels)
    assert (encoder.name, encoder.dimension, got.shape, got.dtype) == ("resnet18", 512, (3, 512), np.float32)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_squeezenet_embeds_by_its_pooled_features(tmp_path):
    reference = network("squeezenet1_1")
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    pixels = pixels_of(2, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (torch.from_numpy(pixels).float() / 255 - mean) / std
    with torch.no_grad():
        expected = reference.features(x.permute(0, 3, 1, 2)).mean((2, 3))
    encoder = load("squeezenet1_1", checkpoint=str(tmp_path / "weights.pth"), image_size=64)
    assert encoder.dimension == 512
    np.testing.assert_allclose(
        encoder.encode(pixels), torch.nn.functional.normalize(expected, dim=1).numpy(), atol=1e-5
    )


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_a_slot_does_not_depend_on_the_others(name, tmp_path):
    torch.save(network(name).state_dict(), tmp_path / "weights.pth")
    encoder = load(name, checkpoint=str(tmp_path / "weights.pth"), image_size=64)
    one, other = pixels_of(4, 64, seed=1), pixels_of(4, 64, seed=2)
    other[2] = one[2]
    one.setflags(write=False)  # as they come out of an object store
    first, second = encoder.encode(one), encoder.encode(other)
    assert np.array_equal(first[2], second[2]) and not np.array_equal(first[1], second[1])
    other[[0, 1, 3]] = 0
    assert np.array_equal(first[2], encoder.encode(other)[2])


@pytest.mark.parametrize(
    ("name", "size", "dimension"),
    [
        ("vgg11", 64, 4096),
        ("vit_b_16", 224, 768),
        ("mobilenet_v3_small", 64, 1024),
        ("densenet121", 64, 1024),
        ("convnext_tiny", 64, 768),
        ("swin_t", 64, 768),
        ("googlenet", 64, 1024),
        ("inception_v3", 96, 2048),
        ("mnasnet0_5", 64, 1280),
        ("maxvit_t", 224, 512),
    ],
)
def test_families_load_and_have_their_dimension(name, size, dimension, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(network(name).state_dict(), path)
    encoder = load(name, checkpoint=str(path), image_size=size)
    assert encoder.dimension == dimension
    got = encoder.encode(pixels_of(2, size))
    assert got.shape == (2, dimension)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_a_row_without_direction_is_nan(tmp_path):
    state = network("squeezenet1_1").state_dict()
    torch.save({key: torch.zeros_like(value) for key, value in state.items()}, tmp_path / "zeros.pth")
    encoder = load("squeezenet1_1", checkpoint=str(tmp_path / "zeros.pth"), image_size=64)
    assert np.isnan(encoder.encode(pixels_of(2, 64))).all()
    got = encoders.unit(np.array([[0, 0], [3, 4], [np.inf, 1], [3e38, 4e-38], [1e-40, 0]], np.float32))
    assert np.isnan(got[[0, 2]]).all()
    np.testing.assert_allclose(got[[1, 3, 4]], [[0.6, 0.8], [1, 0], [1, 0]], atol=1e-7)


# Checkpoints


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module.", "state_dict module."])
def test_checkpoints_may_be_wrapped(wrap, resnet18, tmp_path):
    state = torch.load(resnet18, weights_only=True)
    if "module." in wrap:
        state = {f"module.{key}": value for key, value in state.items()}
    for key in ("state_dict", "model"):
        if key in wrap:
            state = {"epoch": 3, key: state}
    torch.save(state, tmp_path / "wrapped.pth")
    pixels = pixels_of(2, 64)
    plain = load("resnet18", checkpoint=str(resnet18), image_size=64)
    wrapped = load("resnet18", checkpoint=str(tmp_path / "wrapped.pth"), image_size=64)
    assert np.array_equal(plain.encode(pixels), wrapped.encode(pixels))


def test_a_checkpoint_saved_from_dataparallel_keeps_its_versions(tmp_path):
    torch.save(torch.nn.DataParallel(network("mnasnet0_5")).state_dict(), tmp_path / "parallel.pth")
    assert load("mnasnet0_5", checkpoint=str(tmp_path / "parallel.pth"), image_size=64).dimension == 1280


def test_the_classifier_may_be_absent_or_of_another_shape(resnet18, tmp_path):
    state = torch.load(resnet18, weights_only=True)
    trunk = {key: value for key, value in state.items() if not key.startswith("fc.")}
    for i, head in enumerate(({}, {"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)})):
        torch.save(trunk | head, tmp_path / f"{i}.pth")
        assert load("resnet18", checkpoint=str(tmp_path / f"{i}.pth"), image_size=64).dimension == 512


def test_published_densenets_have_older_names(tmp_path):
    state = network("densenet121").state_dict()
    renamed = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    for part in ("norm", "conv"):
        for i in "12":
            renamed = {
                key.replace(f".{part}{i}.", f".{part}.{i}.") if "denselayer" in key else key: value
                for key, value in renamed.items()
            }
    assert "features.denseblock1.denselayer1.norm.1.weight" in renamed
    torch.save(renamed, tmp_path / "old.pth")
    torch.save(state, tmp_path / "new.pth")
    old, new = (
        load("densenet121", checkpoint=str(tmp_path / f"{age}.pth"), image_size=64).encode(pixels_of(1, 64))
        for age in ("old", "new")
    )
    assert np.array_equal(old, new)


def test_another_network_is_refused_with_its_keys(resnet18, tmp_path):
    with pytest.raises(UserError) as caught:
        load("resnet50", checkpoint=str(resnet18), image_size=64)
    sentence = str(caught.value)
    assert "does not fit encoder resnet50" in sentence and "resnet18.pth" in sentence
    assert "missing: layer1.0.conv3.weight, " in sentence and " more" in sentence
    assert "of another shape: layer1.0.conv1.weight 64x64x3x3 instead of 64x64x1x1" in sentence
    assert sentence.count("layer") <= 15 and "\n" not in sentence
    with pytest.raises(UserError, match=r"unexpected: conv1.weight, bn1.weight, .* and \d+ more"):
        load("squeezenet1_1", checkpoint=str(resnet18), image_size=64)


class Trap:
    """A pickle that leaves a file behind when it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    marker = tmp_path / "executed"
    torch.save({"state_dict": Trap(str(marker))}, tmp_path / "torch.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap(str(marker))))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    for name in ("torch.pth", "plain.pth", "module.pth"):
        with pytest.raises(UserError, match=r"more than tensors, .* could run a program; save the weights"):
            load("resnet18", checkpoint=str(tmp_path / name), image_size=64)
    assert not marker.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())
    assert marker.exists()  # the trap works


def test_files_that_are_no_checkpoint_get_a_sentence(resnet18, tmp_path):
    (tmp_path / "cut.pth").write_bytes(resnet18.read_bytes()[:100_000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"lr": 0.1}, tmp_path / "numbers.pth")
    torch.save({}, tmp_path / "nothing.pth")
    cases = {
        "cut.pth": "damaged",
        "empty.pth": "damaged",
        "text.pth": "damaged",
        "list.pth": "holds no state dict",
        "numbers.pth": "holds no state dict",
        "nothing.pth": "holds no state dict",
        "gone.pth": "there is no checkpoint .*gone.pth",
        ".": "is a folder",
    }
    for name, sentence in cases.items():
        with pytest.raises(UserError, match=sentence) as caught:
            load("resnet18", checkpoint=str(tmp_path / name), image_size=64)
        assert "\n" not in str(caught.value)


def test_sizes_that_do_not_fit_get_a_sentence(tmp_path, monkeypatch):
    torch.save(network("squeezenet1_1").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"cannot take images of 8 pixels .* usual image_size is 224"):
        load("squeezenet1_1", checkpoint=str(tmp_path / "weights.pth"), image_size=8)
    with pytest.raises(UserError, match="vit_b_16 cannot take images of 100 pixels"):
        load("vit_b_16", checkpoint=str(tmp_path / "weights.pth"), image_size=100)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="vit_b_16 cannot take images of 384 pixels"):
        load("vit_b_16", checkpoint=None, image_size=384)


# Published weights


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route to host"),
        urllib.error.HTTPError("https://host", 403, "Forbidden", {}, None),
        TimeoutError("timed out"),
        RuntimeError("invalid hash value"),
    ],
)
def test_a_failed_download_names_the_remedies(error, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(
        UserError, match=r"could not download the weights ResNet18_Weights\.IMAGENET1K_V1"
    ) as caught:
        load("resnet18", checkpoint=None, image_size=64)
    assert "--checkpoint FILE" in str(caught.value) and "--encoder pca" in str(caught.value)


def test_published_weights_are_downloaded_and_used(resnet18, tmp_path, monkeypatch):
    def download(url, path, *args, **kwargs):
        assert "resnet18-f37072fd.pth" in url
        torch.save(torch.load(resnet18, weights_only=True), path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    pixels = pixels_of(2, 64)
    published = load("resnet18", checkpoint=None, image_size=64)
    given = load("resnet18", checkpoint=str(resnet18), image_size=64)
    assert np.array_equal(published.encode(pixels), given.encode(pixels))


# PCA


def test_pca_equals_the_singular_value_decomposition():
    pixels = pixels_of(40, 4)
    pca = fit_pca(pixels, 6)
    x = pixels.reshape(40, -1) / 255
    _, _, rows = np.linalg.svd(x - x.mean(0), full_matrices=False)
    assert {key: (value.shape, value.dtype) for key, value in pca.items()} == {
        "mean": ((48,), np.float32),
        "components": ((48, 6), np.float32),
    }
    np.testing.assert_allclose(pca["mean"], x.mean(0), atol=1e-6)
    np.testing.assert_allclose(np.abs(np.sum(pca["components"] * rows[:6].T, axis=0)), 1, atol=1e-5)
    largest = np.abs(pca["components"]).argmax(0)
    assert (pca["components"][largest, range(6)] > 0).all()
    assert all(np.array_equal(pca[key], value) for key, value in fit_pca(pixels, 6).items())

    encoder = load("pca", checkpoint=None, image_size=4, pca=pca)
    expected = (x - x.mean(0)) @ pca["components"]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    got = encoder.encode(pixels)
    assert (encoder.name, encoder.dimension, got.dtype) == ("pca", 6, np.float32)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_pca_has_no_more_dimensions_than_the_images():
    assert fit_pca(pixels_of(5, 16))["components"].shape == (768, 4)
    assert fit_pca(pixels_of(200, 2))["components"].shape == (12, 12)
    assert fit_pca(pixels_of(200, 8))["components"].shape == (192, 64)
    gray = np.repeat(np.arange(9, dtype=np.uint8), 48).reshape(9, 4, 4, 3)
    assert fit_pca(gray)["components"].shape == (48, 1)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_pca_cannot_tell_equal_images_apart(count):
    with pytest.raises(
        UserError, match=rf"all of the {count} sampled images have the same pixels.*--encoder"
    ):
        fit_pca(np.full((count, 16, 16, 3), 77, np.uint8))


def test_pca_row_at_the_mean_is_nan():
    pixels = np.array([0, 100, 50], np.uint8).repeat(12).reshape(3, 2, 2, 3)
    pca = fit_pca(pixels[:2])
    pca["mean"] = (pixels[2].reshape(-1) / np.float32(255)).astype(np.float32)
    got = load("pca", checkpoint=None, image_size=2, pca=pca).encode(pixels)
    assert np.isnan(got[2]).all() and np.isfinite(got[:2]).all()


def test_pca_takes_no_checkpoint_and_needs_its_fit():
    with pytest.raises(UsageError, match="fitted to the images"):
        load("pca", checkpoint="x.pth", image_size=16)
    with pytest.raises(ValueError, match="fit_pca"):
        load("pca", checkpoint=None, image_size=16)


# timm and open_clip


def test_every_network_of_timm_has_its_transform():
    import timm

    for name in timm.list_models(pretrained=True):
        config = timm.get_pretrained_cfg(name)
        ours = transform(f"timm/{name}", None)
        assert (ours.size, ours.crop) == (config.input_size[-1], min(config.crop_pct, 1)), name
        assert ours.interpolation in ("bilinear", "bicubic") and (ours.mean, ours.std) == (
            config.mean,
            config.std,
        )


def test_every_image_tower_of_open_clip_has_its_transform():
    import open_clip

    for model, tag in open_clip.list_pretrained():
        published = open_clip.get_pretrained_cfg(model, tag)
        ours = transform(f"open_clip/{model}/{tag}", None)
        assert ours.size >= 224 and ours.crop == 1.0, (model, tag)
        assert (ours.interpolation, ours.mean) == (published["interpolation"], published["mean"])
    clip = transform("open_clip/ViT-B-16/openai", None)
    assert clip == transform("clip", None)
    assert transform("open_clip/ViT-L-14-336/openai", None).size == 336


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("timm/resnet5O", "resnet50"),
        ("timm/resnet50.a1_in1l", "resnet50.a1_in1k"),
        ("open_clip/ViT-B-16/openal", "open_clip/ViT-B-16/openai"),
    ],
)
def test_a_name_that_a_library_lacks_gets_its_nearest(name, nearest):
    check_name(name)
    for use in (lambda: transform(name, None), lambda: weights_id(name)):
        with pytest.raises(UsageError, match=f"the nearest that it has is '{nearest}"):
            use()


def test_a_network_of_timm_from_a_file(tmp_path):
    import timm

    torch.manual_seed(0)
    whole = timm.create_model("test_vit.r160_in1k").eval()
    torch.save({"state_dict": whole.state_dict(), "epoch": 3}, tmp_path / "timm.pth")
    pixels = pixels_of(2, 160)
    config = whole.pretrained_cfg
    x = (torch.from_numpy(pixels).float() / 255 - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    with torch.no_grad():
        tokens = whole.forward_features(x.permute(0, 3, 1, 2))
        expected = torch.nn.functional.normalize(whole.forward_head(tokens, pre_logits=True), dim=1)
    encoder = load("timm/test_vit.r160_in1k", checkpoint=str(tmp_path / "timm.pth"), image_size=160)
    np.testing.assert_allclose(encoder.encode(pixels), expected.numpy(), atol=1e-5)
    other = load("timm/test_vit.r160_in1k", checkpoint=str(tmp_path / "timm.pth"), image_size=96)
    assert other.dimension == encoder.dimension == 64
    with pytest.raises(UserError, match="does not fit encoder timm/test_resnet"):
        load("timm/test_resnet.r160_in1k", checkpoint=str(tmp_path / "timm.pth"), image_size=160)


@pytest.mark.parametrize("name", ["dino", "dinov2", "timm/resnet18", "clip", "open_clip/ViT-B-32/openai"])
def test_a_missing_library_says_how_to_install_it(name, monkeypatch):
    extra, library = ("clip", "open_clip") if "clip" in name else ("timm", "timm")
    monkeypatch.setitem(sys.modules, library, None)
    check_name(name)
    sentence = rf"encoder {name} needs {library}, .* pip install 'selective-ray\[{extra}\]'"
    for use in (
        lambda: transform(name, None),
        lambda: weights_id(name),
        lambda: load(name, checkpoint=None, image_size=224),
    ):
        with pytest.raises(UserError, match=sentence):
            use()


def test_weights_from_a_hub_are_named_whole():
    assert weights_id("timm/resnet50") == weights_id("timm/resnet50.a1_in1k") == "timm/resnet50.a1_in1k"
    assert weights_id("dino") == "timm/vit_small_patch16_224.dino"
    assert weights_id("dinov2") == "timm/vit_small_patch14_dinov2.lvd142m"
    assert weights_id("clip") == "open_clip/ViT-B-16-quickgelu/openai"
    with pytest.raises(UserError, match="timm has no weights of timm/vit_base_patch32_plus_256"):
        weights_id("timm/vit_base_patch32_plus_256")


@pytest.mark.parametrize("name", ["timm/test_vit.r160_in1k", "open_clip/RN50/openai"])
def test_a_hub_that_is_out_of_reach_names_the_remedies(name, monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionError("no route to host")

    import open_clip.factory
    import timm.models._builder

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", fail)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", fail)
    with pytest.raises(UserError, match=r"could not download .*no route to host.*--checkpoint FILE"):
        load(name, checkpoint=None, image_size=transform(name, None).size)


# A person's own


OWN = """
import torch

class Mean(torch.nn.Module):
    def __init__(self, image_size=7):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.rand(3) + image_size)

    def forward(self, x):
        return x.mean((2, 3)) * self.scale

Mean.image_size, Mean.crop, Mean.interpolation = 12, 1.0, "bicubic"
Mean.mean, Mean.std = [0, 0, 0], [1, 1, 1]

def plain():
    return Mean()

def number():
    return 7

def broken():
    raise KeyError("weights")

def maps(): return torch.nn.Identity()
def pair(): return torch.nn.LSTM(8, 2)

def large(image_size): return Mean()
large.image_size, large.std = 0.5, (1, 0, 1)
seven = 7
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of a person's own in the folder where the command runs; returns its path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"own_{tmp_path.name}.py"
    path.write_text(OWN)
    yield path
    sys.modules.pop(path.stem, None)


def test_a_persons_own_network_and_its_transform(own):
    name = f"{own.stem}:Mean"
    ours = transform(name, None)
    assert (ours.size, ours.crop, ours.interpolation) == (12, 1.0, "bicubic")
    assert (ours.mean, ours.std) == ((0, 0, 0), (1, 1, 1))
    assert transform(f"{own.stem}:plain", None) == encoders.Transform()
    pixels = pixels_of(2, 12)
    first, second = (load(name, checkpoint=None, image_size=12) for _ in range(2))
    assert first.dimension == 3
    assert np.array_equal(first.encode(pixels), second.encode(pixels))  # random weights are the same ones
    scale = torch.tensor([1.0, 2.0, 4.0])
    torch.save({"scale": scale}, own.parent / "own.pth")
    expected = pixels.mean((1, 2)) * scale.numpy()
    got = load(name, checkpoint=str(own.parent / "own.pth"), image_size=12).encode(pixels)
    np.testing.assert_allclose(got, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    torch.save({"size": scale}, own.parent / "other.pth")
    with pytest.raises(UserError, match=r"1 missing: scale; 1 unexpected: size"):
        load(name, checkpoint=str(own.parent / "other.pth"), image_size=12)


def test_the_identity_of_a_persons_own_is_its_source_and_checkpoint(own):
    name = f"{own.stem}:plain"
    torch.save({"scale": torch.ones(3)}, own.parent / "own.pth")
    first, given = weights_id(name), weights_id(name, str(own.parent / "own.pth"))
    assert first.startswith("source sha256:") and given.startswith(first) and "checkpoint sha256:" in given
    own.write_text(OWN + "# changed")
    assert weights_id(name) != first


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("gone.module:f", "cannot be imported .*No module named 'gone'"),
        ("{}:gone", "is no function that returns a network: .* has no such name"),
        ("{}:seven", "is no function that returns a network: .* has a int there"),
        ("{}:number", "returns a int; it must return a torch.nn.Module"),
        ("{}:broken", "cannot be made .*KeyError: 'weights'.* without arguments"),
        ("{}:maps", r"returns \[1, 3, 16, 16\] .* one row for each image, \[1, d\]"),
        ("{}:pair", "cannot take images of 16 pixels"),
        ("{}:large", r"image_size = 0.5 is not a whole number .*; std = \(1, 0, 1\) is not three numbers"),
    ],
)
def test_a_persons_own_that_does_not_work_gets_a_sentence(factory, sentence, own):
    name = factory.format(own.stem)
    check_name(name)
    with pytest.raises(UserError, match=sentence) as caught:
        load(name, checkpoint=None, image_size=16)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_module_that_breaks_on_import_gets_a_sentence(own):
    own.write_text("raise ValueError('no license')")
    with pytest.raises(UserError, match=r"cannot be imported \(ValueError: no license\)"):
        transform(f"{own.stem}:f", None)


# On a device


def test_a_stream_is_the_same_as_one_after_the_other(resnet18):
    encoder = load("resnet18", checkpoint=str(resnet18), image_size=64)
    batches = [pixels_of(2, 64, seed=seed) for seed in range(3)]
    assert all(
        np.array_equal(streamed, encoder.encode(batch))
        for streamed, batch in zip(encoder.stream(iter(batches)), batches, strict=True)
    )
    assert list(encoder.stream([])) == []
    pca = load("pca", checkpoint=None, image_size=4, pca=fit_pca(pixels_of(40, 4), 6))
    assert [len(x) for x in pca.stream([pixels_of(3, 4), pixels_of(1, 4)])] == [3, 1]


def test_a_batch_is_launched_before_the_one_ahead_of_it_is_fetched():
    for count in range(4):
        events = []

        def batches(count=count, events=events):
            for i in range(count):
                events.append(f"take {i}")
                yield i

        def launch(i, events=events):
            events.append(f"launch {i}")
            return i

        def fetch(i, events=events):
            events.append(f"fetch {i}")
            return i

        assert list(overlapped(batches(), launch, fetch)) == list(range(count))
        for i, j in itertools.pairwise(range(count)):
            assert events.index(f"launch {j}") < events.index(f"fetch {i}") < events.index(f"launch {j}") + 2


def test_bfloat16_is_close_and_only_where_it_is_asked_for(resnet18):
    pixels = pixels_of(4, 64)
    exact, automatic, half = (
        load("resnet18", checkpoint=str(resnet18), image_size=64, precision=precision).encode(pixels)
        for precision in ("float32", "auto", "bfloat16")
    )
    assert np.array_equal(exact, automatic)
    assert not np.array_equal(exact, half) and half.dtype == np.float32
    assert (np.sum(exact * half, axis=1) > 0.999).all()


def test_a_gpu_without_bfloat16(monkeypatch):
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)
        assert autocast_dtype("cuda", "float32") is None
        assert autocast_dtype("cuda:1", "auto") == (torch.bfloat16 if able else None)
    with pytest.raises(UserError, match=r"set embed\.precision to auto"):
        autocast_dtype("cuda", "bfloat16")


def test_a_compiled_network_gives_the_same(resnet18, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    pixels = pixels_of(2, 64)
    options = {"checkpoint": str(resnet18), "image_size": 64}
    plain = load("resnet18", **options).encode(pixels)
    compiled = load("resnet18", **options, compile=True, batch=2).encode(pixels)
    np.testing.assert_allclose(compiled, plain, atol=1e-6)


def test_a_compiler_that_is_missing_gets_a_sentence(resnet18, monkeypatch):
    def fail(network, **options):
        def broken(x):
            raise RuntimeError("no working C++ compiler")

        return broken

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UserError, match=r"no working C\+\+ compiler\); set embed.compile to false"):
        load("resnet18", checkpoint=str(resnet18), image_size=64, compile=True)


def test_the_identity_of_embeddings_has_all_that_makes_them(resnet18, own):
    from selective_ray import config
    from selective_ray.actors.embeddings import identity

    def what(**options):
        settings, _ = config.load(options={f"embed.{key}": value for key, value in options.items()})
        return identity(settings)

    given = {"encoder": "resnet18", "checkpoint": str(resnet18)}
    first = what(**given)
    assert first == what(**given, precision="auto", compile=False)
    assert first["embed"] == {
        "encoder": "resnet18",
        "weights": weights_id("resnet18", str(resnet18)),
        "image_size": 224,
        "crop": 0.875,
        "interpolation": "bilinear",
        "dtype": "float32",
        "batch": 64,
        "precision": "auto",
        "compile": False,
    }
    assert what(**given, precision="bfloat16") != first != what(**given, compile=True)
    mine = what(encoder=f"{own.stem}:Mean")
    assert (mine["embed"]["image_size"], mine["embed"]["interpolation"]) == (12, "bicubic")
    own.write_text(OWN + "# changed")
    assert what(encoder=f"{own.stem}:Mean") != mine
    assert not {"precision", "compile"} & what(encoder="pca")["embed"].keys()
