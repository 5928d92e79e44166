"""The fifteen common corruptions at five severities, on pixels of any size and of one to three channels.

Names, order and strengths are those of ImageNet-C and, for images of at most 64 pixels, of CIFAR-10-C (Hendrycks and
Dietterich, 2019). The operations are our own, in torch: frost is drawn, not photographed, and fog is a sum of octaves.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

SEVERITIES = (1, 2, 3, 4, 5)
_SMALL = 64  # pixels, up to which CIFAR-10-C's strengths are taken


class Corruption(NamedTuple):
    """How an image is spoilt, and how strongly at each severity: on small images and on large ones."""

    apply: Callable[..., Tensor]
    small: Sequence[Any]
    large: Sequence[Any]


def corrupt(x: Tensor, name: str, severity: int, generator: Generator) -> Tensor:
    """Spoil images.

    Args:
        x: Pixels in [0, 1], [B, C, H, W]; so are the results.
        name: Of a corruption in `CORRUPTIONS`.
        severity: 1 to 5.
        generator: On the CPU; all that is random is drawn from it, whatever the device of x.
    """
    corruption = CORRUPTIONS[name]
    strengths = corruption.small if max(x.shape[-2:]) <= _SMALL else corruption.large
    return corruption.apply(x, strengths[severity - 1], generator).clamp(0, 1)


# --- noise -------------------------------------------------------------------------------------------------------


def add_gaussian_noise(x: Tensor, scale: float, generator: Generator) -> Tensor:
    """Add normal noise of a standard deviation."""
    return x + scale * torch.randn(x.shape, generator=generator).to(x)


def add_shot_noise(x: Tensor, photons: float, generator: Generator) -> Tensor:
    """Count photons, of which a white pixel sends so many on average."""
    return (torch.poisson(x.cpu() * photons, generator=generator) / photons).to(x)


def add_impulse_noise(x: Tensor, share: float, generator: Generator) -> Tensor:
    """Turn a share of the values black or white, as many each."""
    draw = torch.rand(x.shape, generator=generator).to(x)
    return torch.where(draw < share / 2, 0.0, torch.where(draw < share, 1.0, x))


# --- blur --------------------------------------------------------------------------------------------------------


def blur_defocus(x: Tensor, strength: tuple[float, float], generator: Generator) -> Tensor:
    """Average over a disk of a radius, whose edge is softened by a Gaussian."""
    radius, alias = strength
    reach = 8 if radius <= 8 else math.ceil(radius)
    steps = torch.arange(-reach, reach + 1, dtype=torch.float32)
    disk = (steps[:, None] ** 2 + steps[None, :] ** 2 <= radius**2).float()
    smooth = _make_gaussian(1 if radius <= 8 else 2, alias)
    kernel = F.conv2d(disk[None, None], (smooth[:, None] * smooth)[None, None], padding="same")[0, 0]
    kernel = (kernel / kernel.sum()).to(x)
    padded = F.pad(x, [reach] * 4, mode="reflect")
    return F.conv2d(padded, kernel.expand(x.shape[1], 1, -1, -1), groups=x.shape[1])


def blur_glass(x: Tensor, strength: tuple[float, int, int], generator: Generator) -> Tensor:
    """Let each pixel show a random neighbour within some distance, several times, between two Gaussian blurs.

    The benchmark's own swaps neighbours one after the other, so that a round moves a pixel twice; so it does here.
    """
    sigma, distance, rounds = strength
    x = smooth_gaussian(x, sigma)
    batch, _, height, width = x.shape
    rows, columns = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    for _ in range(2 * rounds):
        shift = torch.randint(-distance, distance + 1, (2, batch, height, width), generator=generator)
        x = _take(x, rows + shift[0], columns + shift[1])
    return smooth_gaussian(x, sigma)


def blur_motion(x: Tensor, strength: tuple[int, float], generator: Generator) -> Tensor:
    """Drag each image along a direction of its own, at most 45 degrees from the horizontal."""
    angles = (torch.rand(len(x), generator=generator) - 0.5) * (math.pi / 2)
    return _drag(x, angles, *strength)


def _drag(x: Tensor, angles: Tensor, radius: int, sigma: float) -> Tensor:
    """Average shifted copies with the weights of one half of a Gaussian; the border is continued."""
    steps = torch.arange(2 * radius + 1)
    weights = torch.exp(-(steps**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    rows, columns = torch.arange(x.shape[2]).view(1, -1, 1), torch.arange(x.shape[3]).view(1, 1, -1)
    total = torch.zeros_like(x)
    for step, weight in zip(steps.tolist(), weights.tolist(), strict=True):
        if weight < 1e-4:
            break
        down = (step * angles.sin()).round().long().view(-1, 1, 1)
        right = (step * angles.cos()).round().long().view(-1, 1, 1)
        total += weight * _take(x, rows + down + 0 * columns, columns + right + 0 * rows)
    return total


def blur_zoom(x: Tensor, strength: tuple[float, float], generator: Generator) -> Tensor:
    """Average the image and its enlargements by factors from 1 to below a largest one."""
    largest, step = strength
    factors = np.arange(1, largest, step).tolist()
    return (x + sum(_enlarge(x, factor) for factor in factors)) / (len(factors) + 1)


def _enlarge(x: Tensor, factor: float) -> Tensor:
    """Enlarge images about their centres, bilinearly."""
    theta = torch.tensor([[1 / factor, 0.0, 0.0], [0.0, 1 / factor, 0.0]]).to(x).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


# --- weather -----------------------------------------------------------------------------------------------------


def add_snow(x: Tensor, strength: tuple[float, ...], generator: Generator) -> Tensor:
    """Brighten the image towards white and let flakes, dragged by the wind, fall on it from two sides."""
    mean, scale, zoom, threshold, radius, sigma, keep = strength
    flakes = mean + scale * torch.randn((len(x), 1, *x.shape[2:]), generator=generator)
    flakes = _enlarge(flakes, zoom)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    angles = -(torch.rand(len(x), generator=generator) + 0.5) * (math.pi / 2)
    flakes = _drag(flakes, angles, int(radius), sigma).to(x)
    white = torch.maximum(x, _to_gray(x) * 1.5 + 0.5)
    return keep * x + (1 - keep) * white + flakes + flakes.rot90(2, (2, 3))


def add_frost(x: Tensor, strength: tuple[float, float], generator: Generator) -> Tensor:
    """Lay ice over the image: bright veins along the ridges of a fractal."""
    keep, amount = strength
    ridges = 1 - (2 * draw_fractal(x.shape, 1.6, generator) - 1).abs()
    return keep * x + amount * (ridges**2).to(x)


def add_fog(x: Tensor, strength: tuple[float, float], generator: Generator) -> Tensor:
    """Add a fractal veil, and bring the whole back to the range that the image had."""
    amount, decay = strength
    largest = x.amax((1, 2, 3), keepdim=True)
    veil = draw_fractal(x.shape, decay, generator).to(x)
    return (x + amount * veil) * largest / (largest + amount)


def draw_fractal(shape: Sequence[int], decay: float, generator: Generator) -> Tensor:
    """Return a cloud of values from 0 to 1 for each image, [B, 1, H, W]: octaves of noise, each finer and fainter."""
    height, width = shape[2:]
    total = torch.zeros(shape[0], 1, height, width)
    for octave in range(1, math.ceil(math.log2(max(height, width))) + 1):
        noise = torch.rand((shape[0], 1, 2**octave, 2**octave), generator=generator)
        total += F.interpolate(noise, size=(height, width), mode="bilinear", align_corners=False) / decay**octave
    low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return (total - low) / (high - low).clamp_min(1e-6)


def brighten(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """Raise the brightness of the HSV model; hue and saturation stay."""
    value = x.amax(1, keepdim=True)
    raised = (value + amount).clamp_max(1)
    return torch.where(value > 0, x * (raised / value.clamp_min(1e-6)), raised)


# --- digital -----------------------------------------------------------------------------------------------------


def lower_contrast(x: Tensor, factor: float, generator: Generator) -> Tensor:
    """Draw the values of each channel towards their mean."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def warp(x: Tensor, strength: tuple[float, float, float], generator: Generator) -> Tensor:
    """Move three points of the image at random and, smoothly, every pixel (Simard et al., 2003).

    Args:
        x: Pixels, [B, C, H, W].
        strength: Displacement's size and smoothness, and reach of the three points, in units of the side.
        generator: Of the draws.
    """
    batch, _, height, width = x.shape
    alpha, sigma, reach = (share * height for share in strength)
    field = 2 * torch.rand((batch, 2, height, width), generator=generator) - 1
    field = alpha * smooth_gaussian(field, sigma) if alpha else 0 * field
    third = min(height, width) / 3
    centre = torch.tensor([width / 2, height / 2])
    points = centre + third * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    moved = points + reach * (2 * torch.rand((batch, 3, 2), generator=generator) - 1)
    # Where a pixel of the result comes from: the affine map that takes the moved points back.
    inverse = torch.linalg.solve(torch.cat([moved, torch.ones(batch, 3, 1)], 2), points.expand(batch, 3, 2))
    columns = torch.arange(width).expand(height, width) + field[:, 0]
    rows = torch.arange(height)[:, None].expand(height, width) + field[:, 1]
    sources = torch.stack([columns, rows, torch.ones_like(rows)], -1).flatten(1, 2) @ inverse
    grid = (2 * sources + 1) / torch.tensor([width, height]) - 1
    return F.grid_sample(x, grid.view(batch, height, width, 2).to(x), padding_mode="reflection", align_corners=False)


def pixelate(x: Tensor, share: float, generator: Generator) -> Tensor:
    """Shrink the image by averaging and enlarge it again by repeating."""
    height, width = x.shape[2:]
    rows, columns = _make_boxes(height, share).to(x), _make_boxes(width, share).to(x)
    small = rows @ x @ columns.T
    return _repeat(_repeat(small, 2, height), 3, width)


def _make_boxes(size: int, share: float) -> Tensor:
    """Return the weights, [int(size * share), size], of the pixels whose centres fall into each larger pixel."""
    n = int(size * share)
    owners = ((torch.arange(size) + 0.5) * n / size - 1e-6).floor().long()
    boxes = F.one_hot(owners, n).T.float()
    return boxes / boxes.sum(1, keepdim=True)


def _repeat(x: Tensor, dim: int, size: int) -> Tensor:
    return x.index_select(dim, ((torch.arange(size) + 0.5) * x.shape[dim] / size).long().to(x.device))


def compress(x: Tensor, quality: int, generator: Generator) -> Tensor:
    """Compress with JPEG: three channels in colour, others each as a grey image."""
    levels = (x * 255).round().to(torch.uint8).cpu()
    planes = levels.permute(0, 2, 3, 1) if x.shape[1] == 3 else levels.flatten(0, 1)
    decoded = torch.from_numpy(np.stack([_compress_one(plane, quality) for plane in planes.numpy()]))
    decoded = decoded.permute(0, 3, 1, 2) if x.shape[1] == 3 else decoded.view(x.shape)
    return decoded.to(x) / 255


def _compress_one(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


# --- tools -------------------------------------------------------------------------------------------------------


def smooth_gaussian(x: Tensor, sigma: float) -> Tensor:
    """Smooth images [B, C, H, W] with a Gaussian of any width, the image mirrored at its border."""
    rows, columns = (_make_smoother(size, sigma).to(x) for size in x.shape[2:])
    return rows @ x @ columns.T


def _make_smoother(size: int, sigma: float) -> Tensor:
    """Return the matrix [size, size] that smooths a line of pixels."""
    reach = max(1, math.ceil(3 * sigma))
    weights = _make_gaussian(reach, sigma)
    places = torch.arange(size)[:, None] + torch.arange(-reach, reach + 1)
    places = places % (2 * size)
    places = torch.where(places < size, places, 2 * size - 1 - places)
    return torch.zeros(size, size).scatter_add_(1, places, weights.expand(size, -1))


def _make_gaussian(reach: int, sigma: float) -> Tensor:
    """Return a Gaussian's weights at -reach to reach, of sum 1."""
    weights = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def _take(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the pixels at some places, [B, H, W] each; beyond the border the border's own."""
    batch, channels, height, width = x.shape
    places = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    places = places.expand(batch, height, width).flatten(1)[:, None].expand(-1, channels, -1)
    return x.flatten(2).gather(2, places.to(x.device)).view(x.shape)


def _to_gray(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * torch.tensor([0.299, 0.587, 0.114]).to(x).view(1, 3, 1, 1)).sum(1, keepdim=True)


CORRUPTIONS = {
    "gaussian_noise": Corruption(add_gaussian_noise, [0.04, 0.06, 0.08, 0.09, 0.1], [0.08, 0.12, 0.18, 0.26, 0.38]),
    "shot_noise": Corruption(add_shot_noise, [500, 250, 100, 75, 50], [60, 25, 12, 5, 3]),
    "impulse_noise": Corruption(add_impulse_noise, [0.01, 0.02, 0.03, 0.05, 0.07], [0.03, 0.06, 0.09, 0.17, 0.27]),
    "defocus_blur": Corruption(
        blur_defocus,
        [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    ),
    "glass_blur": Corruption(
        blur_glass,
        [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
        [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
    ),
    "motion_blur": Corruption(
        blur_motion,
        [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
        [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
    ),
    "zoom_blur": Corruption(
        blur_zoom,
        [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
    ),
    "snow": Corruption(
        add_snow,
        [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ],
        [
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
    ),
    "frost": Corruption(
        add_frost,
        [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
        [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
    ),
    "fog": Corruption(
        add_fog,
        [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
        [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    ),
    "brightness": Corruption(brighten, [0.05, 0.1, 0.15, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5]),
    "contrast": Corruption(lower_contrast, [0.75, 0.5, 0.4, 0.3, 0.15], [0.4, 0.3, 0.2, 0.1, 0.05]),
    "elastic_transform": Corruption(
        warp,
        [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
        [(2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)],
    ),
    "pixelate": Corruption(pixelate, [0.95, 0.9, 0.85, 0.75, 0.65], [0.6, 0.5, 0.4, 0.3, 0.25]),
    "jpeg_compression": Corruption(compress, [80, 65, 58, 50, 40], [25, 18, 15, 10, 7]),
}
