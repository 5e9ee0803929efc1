"""Views of a batch: what Pillow makes of each image alone, and the published ranges."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from selective_ray import augment

SIZE = 32


@pytest.fixture(scope="module")
def pixels():
    """Photograph-like images: smooth colors with some noise; one is flat, one has two levels."""
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, (6, 5, 5, 3), np.uint8)
    large = (Image.fromarray(one).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for one in rough)
    images = [np.asarray(one) for one in large]
    images[4] = np.full((SIZE, SIZE, 3), 77, np.uint8)
    images[5] = np.where(images[5] > 128, 200, 30).astype(np.uint8)
    images = np.stack(images)
    images[:4] = np.clip(images[:4] + rng.integers(0, 12, (4, SIZE, SIZE, 3)), 0, 255)
    return images


def as_tensor(pixels):
    return torch.tensor(pixels).permute(0, 3, 1, 2).contiguous()


def as_images(tensor):
    return tensor.permute(0, 2, 3, 1).numpy()


def by_pillow(name, image, magnitude, sign):
    """The operation as FixMatch's table of ranges has it, in Pillow."""
    image = Image.fromarray(image)
    factor = 0.05 + 0.9 * magnitude
    amount = 0.3 * magnitude * sign
    move = {
        "shear_x": (1, amount, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, amount, 1, 0),
        "translate_x": (1, 0, amount * SIZE, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, amount * SIZE),
    }
    match name:
        case "autocontrast":
            out = ImageOps.autocontrast(image)
        case "brightness":
            out = ImageEnhance.Brightness(image).enhance(factor)
        case "color":
            out = ImageEnhance.Color(image).enhance(factor)
        case "contrast":
            out = ImageEnhance.Contrast(image).enhance(factor)
        case "equalize":
            out = ImageOps.equalize(image)
        case "identity":
            out = image
        case "posterize":
            out = ImageOps.posterize(image, 4 + int(4 * magnitude))
        case "rotate":
            out = image.rotate(int(30 * magnitude) * sign)
        case "sharpness":
            out = ImageEnhance.Sharpness(image).enhance(factor)
        case "solarize":
            out = ImageOps.solarize(image, 256 - int(256 * magnitude))
        case _:
            out = image.transform(image.size, Image.Transform.AFFINE, move[name])
    return np.asarray(out)


@pytest.mark.parametrize("name", augment.OPERATIONS)
@pytest.mark.parametrize("level", [1, 5, 9])
def test_operations_are_those_of_pillow(pixels, name, level):
    out = as_tensor(pixels)
    n = len(pixels)
    signs = np.where(np.arange(n) % 2, 1, -1)
    operation = np.full(n, augment.OPERATIONS.index(name))
    augment._operate(out, operation, np.full(n, level / 10), signs)
    both = zip(pixels, signs, strict=True)
    expected = np.stack([by_pillow(name, image, level / 10, sign) for image, sign in both])
    differing = (as_images(out) != expected).any(-1).mean()
    if name in ("rotate", "shear_x", "shear_y"):
        # Pillow counts in 1/65536 of a pixel: a place on the border of two may fall to either.
        assert differing < 0.02
    else:
        apart = np.abs(as_images(out).astype(int) - expected)
        assert apart.max() <= 1, name
        assert differing < 0.02, name


def test_weak_views_are_flips_and_crops_of_the_reflected_image(pixels):
    rng = np.random.default_rng(1)
    draws = rng.random((len(pixels), augment.WEAK_DRAWS))
    found = as_images(augment.weak(as_tensor(pixels), draws))
    for image, (flip, x, y), out in zip(pixels, draws, found, strict=True):
        padded = np.pad(image[:, ::-1] if flip < 0.5 else image, ((4, 4), (4, 4), (0, 0)), "reflect")
        left, top = int(x * 9), int(y * 9)
        assert np.array_equal(out, padded[top : top + SIZE, left : left + SIZE])


def test_cutout_is_a_gray_square_as_pillow_draws_it(pixels):
    at = np.array([[0.0, 0.0], [0.5, 0.5], [0.99, 0.2], [0.26, 0.74], [0.1, 0.9], [0.6, 0.05]])
    found = as_images(augment.cut_out(as_tensor(pixels), at, 0.5))
    for image, (x, y), out in zip(pixels, at, found, strict=True):
        x0, y0 = (int(max(0, center * SIZE - 8)) for center in (x, y))
        expected = Image.fromarray(image)
        box = (x0, y0, min(SIZE, x0 + 16), min(SIZE, y0 + 16))
        ImageDraw.Draw(expected).rectangle(box, (127, 127, 127))
        assert np.array_equal(out, np.asarray(expected))


def test_strong_views_do_not_depend_on_the_rest_of_the_batch(pixels):
    rng = np.random.default_rng(2)
    draws = rng.random((len(pixels), augment.STRONG_DRAWS))
    whole = augment.strong(as_tensor(pixels), draws)
    alone = [augment.strong(as_tensor(pixels[i : i + 1]), draws[i : i + 1]) for i in range(len(pixels))]
    assert torch.equal(whole, torch.cat(alone))


def test_operations_and_magnitudes_have_the_published_chances(monkeypatch):
    """Each of two rounds: applied to one half, one of 14 operations, magnitudes 1 to 9 of 10, both signs."""
    seen = []
    monkeypatch.setattr(augment, "_operate", lambda out, *chosen: seen.append(chosen))
    n = 20_000
    draws = np.random.default_rng(3).random((n, augment.STRONG_DRAWS))
    augment.strong(torch.zeros((n, 3, 4, 4), dtype=torch.uint8), draws)
    assert len(seen) == 2
    for operation, magnitude, sign in seen:
        assert abs((operation >= 0).mean() - 0.5) < 0.02
        chosen = np.bincount(operation[operation >= 0], minlength=14) / (operation >= 0).sum()
        assert len(chosen) == 14 and np.abs(chosen - 1 / 14).max() < 0.01
        levels, counts = np.unique(np.round(magnitude * 10), return_counts=True)
        assert levels.tolist() == list(range(1, 10)) and np.abs(counts / n - 1 / 9).max() < 0.02
        assert abs((sign > 0).mean() - 0.5) < 0.02


def test_images_of_any_shape_and_of_few_pixels():
    rng = np.random.default_rng(4)
    for h, w in ((1, 1), (2, 5), (17, 8), (40, 24)):
        pixels = torch.from_numpy(rng.integers(0, 256, (30, 3, h, w), np.uint8))
        out = augment.strong(pixels, rng.random((30, augment.STRONG_DRAWS)))
        assert out.shape == pixels.shape and out.dtype == torch.uint8
