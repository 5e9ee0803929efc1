"""The weak and the strong view of FixMatch, of a batch of images at once, on any device.

Weak: flip and a crop out of the reflected surroundings. Strong: that, two operations of RandAugment with the
ranges of FixMatch (Sohn et al., 2020, table 12), and Cutout in gray. Every image takes its own random
numbers, so its views do not depend on what else is in the batch. Operations give what Pillow's do, to the
pixel but for a few on edges of rotated and sheared images.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

# Operations of RandAugment, drawn with equal chance.
OPERATIONS = (
    *("autocontrast", "brightness", "color", "contrast", "equalize", "identity", "posterize"),
    *("rotate", "sharpness", "shear_x", "shear_y", "solarize", "translate_x", "translate_y"),
)
_AFFINE = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
# Two operations, magnitudes 1 to 9 of 10, each applied with this chance (RandAugmentMC n = 2, m = 10).
ROUNDS, MAGNITUDES, CHANCE = 2, 9, 0.5
# The crop moves by an eighth of the side at most: 4 of 32 pixels.
PAD = 0.125
GRAY = 127
# Random numbers that one image takes: flip, x, y; and for each operation which, how much, whether and its
# sign; and x, y of Cutout.
WEAK_DRAWS = 3
STRONG_DRAWS = WEAK_DRAWS + 4 * ROUNDS + 2


def weak(pixels: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """Flip and crop; pixels uint8 [b, 3, h, w], draws float64 [b, WEAK_DRAWS] in [0, 1)."""
    b, _, h, w = pixels.shape
    pad_y, pad_x = round(PAD * h), round(PAD * w)
    flip = draws[:, :1] < 0.5
    left = np.floor(draws[:, 1:2] * (2 * pad_x + 1))
    top = np.floor(draws[:, 2:3] * (2 * pad_y + 1))
    x = _reflected(np.arange(w) + left - pad_x, w)
    y = _reflected(np.arange(h) + top - pad_y, h)
    x = np.where(flip, w - 1 - x, x)
    device = pixels.device
    rows = torch.from_numpy(y.astype(np.int64)).to(device)[:, None, :, None]
    columns = torch.from_numpy(x.astype(np.int64)).to(device)[:, None, None, :]
    image = torch.arange(b, device=device)[:, None, None, None]
    return pixels[image, torch.arange(3, device=device)[None, :, None, None], rows, columns]


def _reflected(places: np.ndarray, size: int) -> np.ndarray:
    """Fold places beyond the sides back, without repeating the outermost pixel."""
    places = np.abs(places)
    return np.where(places > size - 1, 2 * (size - 1) - places, places) if size > 1 else 0 * places


def strong(pixels: torch.Tensor, draws: np.ndarray, cutout: float = 0.5) -> torch.Tensor:
    """Flip, crop, RandAugment, Cutout; draws float64 [b, STRONG_DRAWS].

    cutout: side of the gray square as a share of the image's; 0: none.
    """
    out = weak(pixels, draws[:, :WEAK_DRAWS]).contiguous()
    for start in range(WEAK_DRAWS, WEAK_DRAWS + 4 * ROUNDS, 4):
        which, amount, chance, sign = draws[:, start : start + 4].T
        operation = np.floor(which * len(OPERATIONS)).astype(int)
        magnitude = (1 + np.floor(amount * MAGNITUDES)) / 10
        _operate(out, np.where(chance < CHANCE, operation, -1), magnitude, np.where(sign < 0.5, -1.0, 1.0))
    return cut_out(out, draws[:, -2:], cutout) if cutout else out


def _operate(out: torch.Tensor, operation: np.ndarray, magnitude: np.ndarray, sign: np.ndarray) -> None:
    """Apply to each image, in place, its operation (index in OPERATIONS, or -1) at magnitude (0 to 1)."""
    for name, apply in _IN_PLACE.items():
        if len(rows := np.flatnonzero(operation == OPERATIONS.index(name))):
            at = torch.from_numpy(rows).to(out.device)
            out[at] = apply(out[at], magnitude[rows])
    moved = np.flatnonzero(np.isin(operation, [OPERATIONS.index(name) for name in _AFFINE]))
    if len(moved):
        at = torch.from_numpy(moved).to(out.device)
        names = [OPERATIONS[i] for i in operation[moved]]
        out[at] = affine(out[at], matrices(names, magnitude[moved] * sign[moved], out.shape[-2:]))


def matrices(names: list[str], signed: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return where each pixel of the output comes from: (x, y) = A (x', y', 1), float64 [b, 2, 3].

    signed in [-1, 1]: of 30 degrees, of a shear of 0.3, of 0.3 of the side.
    """
    h, w = size
    out = np.tile(np.array([[1.0, 0, 0], [0, 1, 0]]), (len(names), 1, 1))
    for matrix, name, share in zip(out, names, signed, strict=True):
        match name:
            case "rotate":
                # Whole degrees, as published.
                angle = -np.deg2rad(np.trunc(30 * share))
                cos, sin = np.cos(angle), np.sin(angle)
                turn = np.array([[cos, sin], [-sin, cos]])
                center = np.array([w / 2, h / 2])
                matrix[:, :2], matrix[:, 2] = turn, center - turn @ center
            case "shear_x":
                matrix[0, 1] = 0.3 * share
            case "shear_y":
                matrix[1, 0] = 0.3 * share
            case "translate_x":
                matrix[0, 2] = 0.3 * share * w
            case "translate_y":
                matrix[1, 2] = 0.3 * share * h
    return out


def affine(x: torch.Tensor, matrix: np.ndarray) -> torch.Tensor:
    """Take every pixel from the nearest place that its matrix names, black from outside."""
    b, _, h, w = x.shape
    m = torch.from_numpy(matrix.astype(np.float32)).to(x.device)
    across = torch.arange(w, device=x.device) + 0.5
    down = torch.arange(h, device=x.device) + 0.5
    columns, rows = (
        torch.floor(
            m[:, i, 0, None, None] * across + m[:, i, 1, None, None] * down[:, None] + m[:, i, 2, None, None]
        )
        for i in (0, 1)
    )
    inside = (columns >= 0) & (columns < w) & (rows >= 0) & (rows < h)
    places = (rows.clamp(0, h - 1) * w + columns.clamp(0, w - 1)).long().view(b, 1, -1).expand(-1, 3, -1)
    return x.flatten(2).gather(2, places).view(x.shape) * inside[:, None]


def cut_out(x: torch.Tensor, at: np.ndarray, share: float) -> torch.Tensor:
    """Paint a square gray, around a center at [0, 1) of width and height, clipped at the sides."""
    h, w = x.shape[-2:]
    inside = []
    for size, center in ((w, at[:, 0] * w), (h, at[:, 1] * h)):
        side = int(share * size)
        first = np.maximum(0, np.trunc(center - side / 2))
        places = np.arange(size)
        # Both ends belong to the square, as Pillow draws it.
        inside.append((places >= first[:, None]) & (places <= np.minimum(size, first + side)[:, None]))
    across, down = (torch.from_numpy(part).to(x.device) for part in inside)
    return x.masked_fill((down[:, :, None] & across[:, None, :])[:, None], GRAY)


def _column(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device)[:, None, None, None]


def _blend(x: torch.Tensor, plain: torch.Tensor, magnitude: np.ndarray) -> torch.Tensor:
    """Mix with what has lost the property: factors of 0.05 to 0.95."""
    mixed = plain + _column(0.05 + 0.9 * magnitude, x) * (x.float() - plain)
    return mixed.to(torch.uint8)


def _luminance(x: torch.Tensor) -> torch.Tensor:
    """Gray of ITU-R 601 in the integers that Pillow uses, [b, 1, h, w]."""
    red, green, blue = x.to(torch.int32).unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16)[:, None]


def _brightness(x: torch.Tensor, magnitude: np.ndarray) -> torch.Tensor:
    return _blend(x, torch.zeros((), device=x.device), magnitude)


def _color(x: torch.Tensor, magnitude: np.ndarray) -> torch.Tensor:
    return _blend(x, _luminance(x).float(), magnitude)


def _contrast(x: torch.Tensor, magnitude: np.ndarray) -> torch.Tensor:
    mean = torch.floor(_luminance(x).double().mean((1, 2, 3), keepdim=True) + 0.5)
    return _blend(x, mean.float(), magnitude)


def _sharpness(x: torch.Tensor, magnitude: np.ndarray) -> torch.Tensor:
    smooth = x.float()
    if min(x.shape[-2:]) > 2:
        kernel = torch.ones((3, 1, 3, 3), device=x.device)
        kernel[:, :, 1, 1] = 5
        inner = F.conv2d(smooth, kernel, groups=3)
        smooth = smooth.clone()
        smooth[:, :, 1:-1, 1:-1] = torch.floor(inner / 13 + 0.5)
    return _blend(x, smooth, magnitude)


def _posterize(x: torch.Tensor, magnitude: np.ndarray) -> torch.Tensor:
    bits = 4 + np.trunc(4 * magnitude)
    return x & _column(256 - 2 ** (8 - bits), x).to(torch.uint8)


def _solarize(x: torch.Tensor, magnitude: np.ndarray) -> torch.Tensor:
    return torch.where(x < _column(256 - np.trunc(256 * magnitude), x), x, 255 - x)


def _autocontrast(x: torch.Tensor, magnitude: np.ndarray) -> torch.Tensor:
    low = x.amin((2, 3), keepdim=True).double()
    high = x.amax((2, 3), keepdim=True).double()
    scale = 255 / (high - low).clamp(min=1)
    return torch.where(high > low, (x * scale - low * scale).clamp(0, 255), x.double()).to(torch.uint8)


def _equalize(x: torch.Tensor, magnitude: np.ndarray) -> torch.Tensor:
    b, c = x.shape[:2]
    flat = x.reshape(b * c, -1).long()
    counts = torch.zeros((b * c, 256), dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    last = counts.gather(1, flat.amax(1, keepdim=True))
    step = (counts.sum(1, keepdim=True) - last) // 255
    before = torch.cumsum(counts, 1) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=x.device))
    return table.gather(1, flat).to(torch.uint8).view(x.shape)


_IN_PLACE: dict[str, Callable[[torch.Tensor, np.ndarray], torch.Tensor]] = {
    "autocontrast": _autocontrast,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "equalize": _equalize,
    "posterize": _posterize,
    "sharpness": _sharpness,
    "solarize": _solarize,
}
