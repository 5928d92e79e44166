"""How an image of any kind becomes red, green and blue of 8 bits each."""

from __future__ import annotations

import numpy as np
from PIL import Image

MOST_PIXELS = 2 * 89_478_485  # Pillow's own limit, which WILDS lifts for the whole process
_FULL_SCALES = (2**8 - 1, 2**12 - 1, 2**16 - 1)  # of cameras, scanners and x-rays, whatever file holds them


def is_deep(image: Image.Image) -> bool:
    """Return whether an image's pixels are gray values of more than 8 bits, or floats."""
    return image.mode == "F" or image.mode.startswith("I")


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of mode RGB.

    Pillow converts those of 8 bits. It would clip deeper ones, which are scaled from 0 to the smallest of 1 (floats
    only), 255, 4095 and 65535 that holds their highest value; those with a negative or a higher value from their lowest
    to their highest one.

    Raises:
        ValueError: It has too many pixels, or one is no number.
    """
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"its {image.width * image.height} pixels are more than {MOST_PIXELS}")
    return (
        Image.fromarray(scale_to_8_bits(np.asarray(image))).convert("RGB") if is_deep(image) else image.convert("RGB")
    )


def scale_to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale gray values to uint8, as `convert_to_rgb` says.

    Example:
        >>> scale_to_8_bits(np.array([0, 257, 65535], np.uint16)).tolist()
        [0, 1, 255]
        >>> scale_to_8_bits(np.array([0.0, 0.5, 1.0])).tolist()
        [0, 128, 255]
        >>> scale_to_8_bits(np.array([-100, 0, 100])).tolist()
        [0, 128, 255]
    """
    exact = values.astype(np.float64)
    low, high = float(exact.min()), float(exact.max())
    if not np.isfinite(high - low):
        raise ValueError("it holds values that are no numbers")
    scales = _FULL_SCALES if values.dtype.kind in "iu" else (1, *_FULL_SCALES)
    if low >= 0 and high <= scales[-1]:
        low, high = 0.0, float(next(scale for scale in scales if high <= scale))
    width = high - low if high > low else 1.0
    return np.floor((exact - low) * 255 / width + 0.5).astype(np.uint8)
