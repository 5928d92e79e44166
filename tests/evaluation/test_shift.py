from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from daft_domainbed.evaluation import shift

ALL = list(shift.CORRUPTIONS)
SHAPES = [(1, 28, 28), (2, 28, 28), (3, 32, 32), (3, 224, 224)]
# Here the benchmark's severities are in no order of distance: a veil, too, replaces what it covers.
UNORDERED = ("elastic_transform", "glass_blur", "snow", "frost", "fog")


def seed_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_images(n: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Clouds, in which there is something to blur, to shift and to compress."""
    generator = seed_generator(seed)
    channels = [shift.draw_fractal((n, 1, *shape[1:]), 1.7, generator) for _ in range(shape[0])]
    return (torch.cat(channels, 1) * 255).round() / 255


def measure(x: Tensor, y: Tensor) -> float:
    return (x - y).square().mean().sqrt().item()


def test_there_are_fifteen_of_five_severities() -> None:
    assert len(ALL) == 15
    assert all(len(c.small) == len(c.large) == len(shift.SEVERITIES) == 5 for c in shift.CORRUPTIONS.values())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_stay_images_and_draws_are_the_generators(name: str, shape: tuple[int, int, int]) -> None:
    x = draw_images(2, shape)
    original, before = x.clone(), torch.get_rng_state()
    for severity in (1, 5):
        once, again = (shift.corrupt(x, name, severity, seed_generator(1)) for _ in range(2))
        assert torch.equal(once, again)
        assert once.shape == x.shape
        assert once.dtype == x.dtype
        assert once.min() >= 0
        assert once.max() <= 1
        assert not torch.equal(once, x)
    assert torch.equal(x, original)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [name for name in ALL if name not in UNORDERED])
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 224, 224)], ids=str)
def test_a_higher_severity_is_further_away(name: str, shape: tuple[int, int, int]) -> None:
    x = 0.8 * draw_images(4, shape) + 0.1
    distances = [measure(shift.corrupt(x, name, severity, seed_generator(2)), x) for severity in shift.SEVERITIES]
    assert distances[0] < distances[2] < distances[4]


# --- against other implementations -------------------------------------------------------------------------------


def test_brightness_is_that_of_hsv() -> None:
    x = draw_images(1, (3, 4, 4))
    ours = shift.corrupt(x, "brightness", 5, seed_generator())
    for i in range(4):
        for j in range(4):
            hue, saturation, value = colorsys.rgb_to_hsv(*x[0, :, i, j].tolist())
            expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.3))
            assert ours[0, :, i, j].tolist() == pytest.approx(expected, abs=1e-5)


def test_contrast_by_hand() -> None:
    x = torch.tensor([[[[0.2, 0.6]]]])
    assert shift.lower_contrast(x, 0.5, seed_generator()).flatten().tolist() == pytest.approx([0.3, 0.5])


@pytest.mark.parametrize("size", [28, 32, 224])
@pytest.mark.parametrize("severity", shift.SEVERITIES)
def test_pixels_are_pillows(size: int, severity: int) -> None:
    x = draw_images(1, (3, size, size))
    share = (shift.CORRUPTIONS["pixelate"].large if size > 64 else shift.CORRUPTIONS["pixelate"].small)[severity - 1]
    image = Image.fromarray((x[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    small = image.resize((int(size * share), int(size * share)), Image.Resampling.BOX)
    theirs = torch.from_numpy(np.asarray(small.resize((size, size), Image.Resampling.NEAREST)).copy()) / 255
    ours = shift.corrupt(x, "pixelate", severity, seed_generator())[0].permute(1, 2, 0)
    assert (ours - theirs).abs().max() < 1.01 / 255  # Pillow rounds


def test_jpeg_is_pillows() -> None:
    x = draw_images(2, (3, 32, 32))
    file = io.BytesIO()
    Image.fromarray((x[1].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()).save(file, "JPEG", quality=58)
    theirs = np.asarray(Image.open(file))
    ours = shift.corrupt(x, "jpeg_compression", 3, seed_generator())[1].permute(1, 2, 0).numpy()
    assert np.abs(ours * 255 - theirs).max() < 1e-3


@pytest.mark.parametrize("sigma", [0.4, 1.5, 20.0])
def test_smoothing_is_scipys(sigma: float) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    x = draw_images(1, (1, 28, 32)).double()
    ours = shift.smooth_gaussian(x, sigma)[0, 0].numpy()
    radius = max(1, int(np.ceil(3 * sigma)))
    theirs = ndimage.gaussian_filter(x[0, 0].numpy(), sigma, mode="reflect", radius=radius)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_noise_has_its_moments() -> None:
    x = torch.full((4, 3, 224, 224), 0.5)
    gaussian = shift.add_gaussian_noise(x, 0.18, seed_generator())
    assert gaussian.std().item() == pytest.approx(0.18, rel=0.01)
    shot = shift.add_shot_noise(x, 12, seed_generator())
    assert shot.mean().item() == pytest.approx(0.5, rel=0.01)
    assert shot.var().item() == pytest.approx(0.5 / 12, rel=0.02)  # a Poisson variable's, over photons squared
    impulse = shift.add_impulse_noise(x, 0.09, seed_generator())
    assert [(impulse == value).float().mean().item() for value in (0, 1)] == pytest.approx([0.045, 0.045], rel=0.05)


@pytest.mark.parametrize("severity", shift.SEVERITIES)
@pytest.mark.parametrize("name", [name for name in ALL if name not in ("frost", "elastic_transform")])
def test_large_images_are_spoilt_as_elsewhere(name: str, severity: int) -> None:
    # imagecorruptions photographs its frost, and its elastic transform is not ImageNet-C's.
    other = pytest.importorskip("imagecorruptions")
    np.random.seed(0)
    x = draw_images(4, (3, 224, 224), seed=3)
    images = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    spoilt = [other.corrupt(image, severity=severity, corruption_name=name) for image in images]
    theirs = torch.from_numpy(np.stack(spoilt)).permute(0, 3, 1, 2) / 255
    ours = shift.corrupt(x, name, severity, seed_generator())
    if name in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"):
        assert (ours - theirs).abs().mean() < 0.01  # nothing is random; a rounded byte is 0.002 on average
    # A random one agrees in how far it takes an image, and how bright and rich in contrast it leaves it.
    tolerance = {"fog": 0.3, "glass_blur": 0.35}.get(name, 0.1)
    assert measure(ours, x) == pytest.approx(measure(theirs, x), rel=tolerance, abs=0.003)
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=0.06 if name == "fog" else 0.02)
