"""Colour jitter and normalisation of an image: in C where there is a compiler, elsewhere by torchvision's functions.

Both give torchvision's numbers to the last bit. The C is compiled when it is first needed, kept in the user's cache
folder, and compared with torchvision each time it is loaded: another Pillow might compute otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional

BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE = range(5)  # the first four as ColorJitter numbers them

# The last two keep an expression's own roundings, but let it be computed where its result is not used.
_FLAGS = ("-shared", "-fPIC", "-O3", "-ffp-contract=off", "-fno-trapping-math")

Step = tuple[int, float]
Render = Callable[[Image.Image, Sequence[Step], bool, NDArray[np.float32], NDArray[np.float32]], None]


def render(
    image: Image.Image, steps: Sequence[Step], is_mirrored: bool, table: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """Jitter and mirror an image, and look its pixels up.

    Args:
        image: Three channels of bytes.
        steps: What to do, in this order, and by how much: the factors of torchvision's functions.
        is_mirrored: Whether left and right change places.
        table: What each value of each channel becomes, [3, 256].
        out: An array that takes the result, [3, H, W].
    """
    chosen = load_compiled() if image.mode == "RGB" else None
    (chosen or _render_with_torchvision)(image, steps, is_mirrored, table, out)


def _render_with_torchvision(
    image: Image.Image, steps: Sequence[Step], is_mirrored: bool, table: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    adjust: list[Callable[..., Image.Image]] = [
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
        lambda image, _: functional.rgb_to_grayscale(image, num_output_channels=3),
    ]
    for kind, by in steps:
        image = adjust[kind](image, by)
    pixels = np.asarray(functional.hflip(image) if is_mirrored else image)
    for channel in range(3):
        table[channel].take(pixels[..., channel], out=out[channel], mode="clip")


@functools.cache
def load_compiled() -> Render | None:
    """Return the compiled `render`, or None where it cannot be had or its numbers are not torchvision's.

    It has to be called before threads need it: each of them would compile.
    """
    try:
        transform = _load_library().transform
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):  # no cache folder, no compiler, no success
        return None
    integers, floats = np.ctypeslib.ndpointer(np.int32), np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
    pixels = np.ctypeslib.ndpointer(np.uint8, ndim=3, flags="C_CONTIGUOUS")
    transform.argtypes = [pixels, *[ctypes.c_int] * 4, integers, floats, floats, floats]

    def render_compiled(
        image: Image.Image,
        steps: Sequence[Step],
        is_mirrored: bool,
        table: NDArray[np.float32],
        out: NDArray[np.float32],
    ) -> None:
        kinds = np.array([kind for kind, _ in steps], dtype=np.int32)
        by = np.array([int(by * 255) & 255 if kind == HUE else by for kind, by in steps], dtype=np.float32)
        height, width = out.shape[1:]
        if transform(np.asarray(image), height, width, is_mirrored, len(steps), kinds, by, table, out):
            raise MemoryError(f"no memory for an image of {width} x {height} pixels")

    return render_compiled if _agrees(render_compiled) else None


def _load_library() -> ctypes.CDLL:
    """Load the library, compiling it where there is none or a broken one.

    Raises:
        OSError: It cannot be compiled, or somebody else could have put it there.
    """
    source = Path(__file__).with_name("color_jitter.c")
    command = [*shlex.split(os.environ.get("CC", "cc")), *_FLAGS]
    made_of = [source.read_bytes(), " ".join(command).encode(), platform.platform().encode()]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "daft_domainbed")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)
    library = folder / f"pixels-{hashlib.sha256(b''.join(made_of)).hexdigest()[:16]}.so"
    if library.is_file():
        _check_owner(library)
        with suppress(OSError, AttributeError):  # what a power loss has left of it
            return _open(library)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch, library.name)
        subprocess.run([*command, str(source), "-o", str(made)], check=True, capture_output=True, timeout=60)
        made.replace(library)
    return _open(library)


def _open(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    loaded.transform  # noqa: B018  # an AttributeError where there is none
    return loaded


def _check_owner(path: Path) -> None:
    stat = path.stat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
        raise OSError(f"{path} can be written by others")


def _agrees(render_compiled: Render) -> bool:
    """Compare with torchvision on colours from everywhere, through every step below and beyond a factor of 1."""
    values: NDArray[Any] = np.arange(64 * 65 * 3, dtype=np.uint64) * 2654435761 >> 16
    image = Image.fromarray(values.astype(np.uint8).reshape(64, 65, 3))
    table = np.arange(3 * 256, dtype=np.float32).reshape(3, 256)
    for steps in (
        [(BRIGHTNESS, 0.7), (CONTRAST, 1.3), (SATURATION, 0.7), (HUE, -0.3)],
        [(HUE, 0.2), (SATURATION, 1.3), (CONTRAST, 0.8), (BRIGHTNESS, 1.2), (GRAYSCALE, 0)],
    ):
        compiled, expected = (np.empty((3, 64, 65), dtype=np.float32) for _ in range(2))
        render_compiled(image, steps, True, table, compiled)
        _render_with_torchvision(image, steps, True, table, expected)
        if not np.array_equal(compiled, expected):
            return False
    return True
