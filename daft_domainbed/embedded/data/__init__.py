"""The embedded images: four styles of emoji and scikit-learn's digits.

Credits and licences are in LICENSES, beside this file; `tools/build_data.py` in the repository makes the files again.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

EMOJI_STYLES: tuple[str, ...] = ("noto", "twemoji", "openmoji", "contrast")
EMOJI_CLASSES: tuple[str, ...] = ("animal", "building", "clothing", "face", "food", "object", "plant", "vehicle")
UNSEEN_PERCENT = 30


@dataclass(frozen=True, eq=False)
class EmojiSheet:
    """The drawings of one style, class by class and in Unicode's order; the arrays are read-only.

    Attributes:
        images: [N, 3, 32, 32], 0 to 255, on white.
        labels: [N], places in `EMOJI_CLASSES`.
        code_points: what each drawing shows, such as "1F408-200D-2B1B"; the same drawings of other styles share it.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    code_points: tuple[str, ...]


def load_emoji_styles() -> dict[str, EmojiSheet]:
    """Return the sheet of each style, in the order of `EMOJI_STYLES`; files are read once per process."""
    return {style: _load_sheet(style) for style in EMOJI_STYLES}


@cache
def load_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the 1,797 handwritten digits of scikit-learn's `load_digits`, read-only.

    Returns:
        Images [1797, 8, 8] of 0 (paper) to 16 (ink), and labels [1797].
    """
    labels = np.array([int(digit) for digit in _read_index()["digit_labels"]], np.int64)
    return _freeze(_read_tiles("digits.png", 8, len(labels))[..., 0]), _freeze(labels)


def is_unseen(code_point: str) -> bool:
    """Tell whether a code point is one of the 30 % that EmojiStylesUnseen keeps for test environments."""
    return int(hashlib.sha256(code_point.lower().encode()).hexdigest(), 16) % 100 < UNSEEN_PERCENT


@cache
def _load_sheet(style: str) -> EmojiSheet:
    index = _read_index()
    absent = set(index["absent"][style])
    drawn = [
        (label, code_point)
        for label, name in enumerate(EMOJI_CLASSES)
        for code_point in index["code_points"][name]
        if code_point not in absent
    ]
    images = _read_tiles(f"{style}.webp", 32, len(drawn)).transpose(0, 3, 1, 2)
    labels = np.array([label for label, _ in drawn], np.int64)
    return EmojiSheet(_freeze(images), _freeze(labels), tuple(code_point for _, code_point in drawn))


@cache
def _read_index() -> dict[str, Any]:
    index: dict[str, Any] = json.loads(files(__name__).joinpath("index.json").read_text("utf-8"))
    return index


def _read_tiles(name: str, size: int, count: int) -> npt.NDArray[np.uint8]:
    """Cut a sheet, row by row, into [count, size, size, channels]."""
    from PIL import Image

    sheet = np.asarray(Image.open(io.BytesIO(files(__name__).joinpath(name).read_bytes())))
    rows, columns = sheet.shape[0] // size, sheet.shape[1] // size
    grid = sheet.reshape(rows, size, columns, size, -1).swapaxes(1, 2)
    return grid.reshape(rows * columns, size, size, -1)[:count]


def _freeze(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    frozen = np.array(array, order="C")
    frozen.setflags(write=False)
    return frozen
