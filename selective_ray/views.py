"""The random views of contrastive learning, of a batch of images at once, on any device.

A box of random size and shape enlarged to the whole, mirrored or not, colors changed, gray, blurred: the
augmentation of SimCLR (Chen et al., 2020) and MoCo v2 (Chen et al., 2020). Every image takes its own random
numbers, so its views do not depend on what else is in the batch. Other than torchvision's: a box that does
not fit is narrowed in place of being drawn again, and colors change in a fixed order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

# Random numbers that a view takes: area, shape, x and y of the box; mirrored; whether colors change, and
# brightness, contrast, saturation, hue; gray; whether blurred, and how much.
DRAWS = 13
# Shapes of the box, width to height, equally likely by their logarithm.
SHAPES = (3 / 4, 4 / 3)
# Standard deviation of the blur in pixels (MoCo v2).
SIGMA = (0.1, 2.0)
_GRAY = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class Views:
    """How much views differ; the defaults are those of MoCo v2 and of SCAN's SimCLR, less the blur.

    smallest: least area of the box, as a share. brightness, contrast and saturation are multiplied by 1 ± so
    much, hue is turned by so much of a circle, with the chance `colors`; gray and blur are chances.
    """

    smallest: float = 0.2
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    colors: float = 0.8
    gray: float = 0.2
    blur: float = 0.0


def view(pixels: torch.Tensor, draws: np.ndarray, how: Views) -> torch.Tensor:
    """Draw a view of each image: pixels uint8 [b, 3, h, w], draws float64 [b, DRAWS] in [0, 1).

    Returns float32 [b, 3, h, w] in [0, 1].
    """
    told = torch.from_numpy(draws.astype(np.float32)).to(pixels.device)
    x = boxed(pixels.float() / 255, told[:, :5], how.smallest)
    if how.colors:
        changed = recolored(x, told[:, 6:10], how)
        x = torch.where((told[:, 5] < how.colors)[:, None, None, None], changed, x)
    if how.gray:
        x = torch.where((told[:, 10] < how.gray)[:, None, None, None], luminance(x).expand_as(x), x)
    if how.blur:
        sigma = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * told[:, 12]
        x = torch.where((told[:, 11] < how.blur)[:, None, None, None], blurred(x, sigma), x)
    return x


def boxed(x: torch.Tensor, draws: torch.Tensor, smallest: float) -> torch.Tensor:
    """Enlarge a box of each image to the whole; x float [b, 3, h, w], draws [b, 5].

    Draws: area, shape, x, y, mirrored. Bilinear. Area and shape are those of RandomResizedCrop.
    """
    h, w = x.shape[-2:]
    area = smallest + (1 - smallest) * draws[:, 0]
    low, high = map(math.log, SHAPES)
    shape = torch.exp(low + (high - low) * draws[:, 1]) * h / w
    wide, tall = torch.sqrt(area * shape).clamp(max=1), torch.sqrt(area / shape).clamp(max=1)
    # In [-1, 1]: the center of the box, and half of its sides.
    across = (1 - wide) * (2 * draws[:, 2] - 1)
    down = (1 - tall) * (2 * draws[:, 3] - 1)
    sign = torch.where(draws[:, 4] < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(wide)
    matrix = torch.stack([torch.stack([sign * wide, zero, across], 1), torch.stack([zero, tall, down], 1)], 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def luminance(x: torch.Tensor) -> torch.Tensor:
    """Gray of ITU-R 601 of [b, 3, h, w]: [b, 1, h, w]."""
    return (x * torch.tensor(_GRAY, device=x.device)[:, None, None]).sum(1, keepdim=True)


def recolored(x: torch.Tensor, draws: torch.Tensor, how: Views) -> torch.Tensor:
    """Change brightness, contrast, saturation and hue of [b, 3, h, w] by draws [b, 4] in [0, 1)."""

    def factor(column: int, most: float) -> torch.Tensor:
        return (1 + most * (2 * draws[:, column] - 1))[:, None, None, None]

    x = (x * factor(0, how.brightness)).clamp(0, 1)
    mean = luminance(x).mean((2, 3), keepdim=True)
    x = (mean + factor(1, how.contrast) * (x - mean)).clamp(0, 1)
    gray = luminance(x)
    x = (gray + factor(2, how.saturation) * (x - gray)).clamp(0, 1)
    return turned(x, how.hue * (2 * draws[:, 3] - 1)) if how.hue else x


def turned(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Turn the hue of [b, 3, h, w] in [0, 1] by shares [b] of the circle; value and saturation (HSV) stay."""
    value, place = x.max(1)
    chroma = value - x.min(1).values
    red, green, blue = x.unbind(1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    rest = torch.where(place == 1, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sixths = torch.where(place == 0, (green - blue) / safe, rest)
    sixths = sixths + 6 * by[:, None, None]
    # Each channel is at its value over two sixths of the circle, and chroma below it over two others.
    channels = []
    for start in (5, 3, 1):
        k = torch.remainder(sixths + start, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def blurred(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur each image of [b, c, h, w] by a Gaussian of its own sigma [b], in pixels; edges are repeated."""
    b, c = x.shape[:2]
    radius = min(math.ceil(3 * SIGMA[1]), min(x.shape[-2:]) - 1)
    places = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (places / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]
    flat = F.pad(x.reshape(1, b * c, *x.shape[-2:]), (radius,) * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, :, None], groups=b * c)
    return F.conv2d(flat, kernel[:, :, :, None], groups=b * c).view_as(x)
