"""Images that show none of a data set's classes, drawn for as long as a method asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.data.readers import Readers
from daft_domainbed.embedded.data import load_digits, load_emoji_styles
from daft_domainbed.embedded.datasets import read_image
from daft_domainbed.embedded.image_folder import Found, walk_images
from daft_domainbed.errors import UsageError
from daft_domainbed.functional.input_spec import InputSpec

_FOLDER = "folder:"
_N_THREADS = 8

Draw = Callable[[int, torch.Generator], Tensor]  # pixels in [0, 1], [n, channels, height, width] of the source's own


def is_source(value: Any) -> str | None:
    """Return what an out-distribution source should have been, or None where it is one."""
    is_folder = isinstance(value, str) and value.startswith(_FOLDER) and value != _FOLDER
    return None if is_folder or value in ("auto", *_SOURCES) else '"auto", "noise", "digits", "emoji" or "folder:PATH"'


def choose_source(wanted: str, input_shape: Sequence[int]) -> str:
    """Replace "auto": emoji for images of digits' size, 28 x 28, else digits."""
    if wanted != "auto":
        return wanted
    return "emoji" if tuple(input_shape[1:]) == (28, 28) else "digits"


class OutsideStream:
    """Batches of out-distribution images, normalised as the data set's own are; with replacement, without end.

    The generator is its own, so that neither the global random state nor the order of training data moves, and its
    state is all that a resumed run needs.

    Args:
        source: "noise" (each pixel uniform), "digits" and "emoji" (the images in the package), or "folder:PATH" (every
            image file below a folder, whatever its subfolders mean).
        input_shape: (C, H, W), to which images are resized; gray where C is not 3.
        spec: How the data set normalises its images.
        seed: Decides which images come.

    Raises:
        UsageError: The folder holds no image.
    """

    def __init__(self, source: str, input_shape: Sequence[int], spec: InputSpec, seed: int) -> None:
        self.input_shape, self.spec = tuple(input_shape), spec
        self.generator = torch.Generator().manual_seed(seed)
        if source.startswith(_FOLDER):
            self._draw = _open_folder(Path(source.removeprefix(_FOLDER)).expanduser(), self.input_shape)
        else:
            self._draw = _SOURCES[source](self.input_shape)

    def draw(self, n: int) -> Tensor:
        """Return the next n images, [n, C, H, W], on the CPU."""
        pixels = _fit(self._draw(n, self.generator), self.input_shape)
        return (pixels - self.spec.get_mean(pixels)) / self.spec.get_std(pixels)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what has to survive a restart."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with a saved state."""
        self.generator.set_state(state["generator"].cpu())


def _fit(pixels: Tensor, input_shape: tuple[int, ...]) -> Tensor:
    """Bring images to the data set's channels and size."""
    channels, *size = input_shape
    if pixels.shape[1] != channels:
        pixels = pixels.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1)
    if list(pixels.shape[2:]) != size:
        pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    return pixels.clamp(0, 1)  # a mean of ones can be more than one


def _open_noise(input_shape: tuple[int, ...]) -> Draw:
    return lambda n, generator: torch.rand(n, *input_shape, generator=generator)


def _open_digits(input_shape: tuple[int, ...]) -> Draw:
    ink = torch.tensor(load_digits()[0]).unsqueeze(1)
    return _draw_from(16 - ink, 16)  # on white paper, as drawings are


def _open_emoji(input_shape: tuple[int, ...]) -> Draw:
    sheets = load_emoji_styles().values()
    return _draw_from(torch.from_numpy(np.concatenate([sheet.images for sheet in sheets])), 255)


_SOURCES: dict[str, Callable[[tuple[int, ...]], Draw]] = {
    "noise": _open_noise,
    "digits": _open_digits,
    "emoji": _open_emoji,
}


def _draw_from(images: Tensor, white: int) -> Draw:
    def draw(n: int, generator: torch.Generator) -> Tensor:
        return images[torch.randint(len(images), (n,), generator=generator)] / white

    return draw


def _open_folder(folder: Path, input_shape: tuple[int, ...]) -> Draw:
    files = sorted(map(Path, walk_images(folder, Found()))) if folder.is_dir() else []
    if not files:
        raise UsageError(f"no image below {folder}: name a folder that holds some, as in folder:PATH")
    _, height, width = input_shape

    def read(path: Path) -> Tensor:
        image = read_image(str(path), allow_truncated=False).resize((width, height))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        chosen = [files[i] for i in torch.randint(len(files), (n,), generator=generator).tolist()]
        with Readers(_N_THREADS) as threads:
            return torch.stack(list(threads.map(read, chosen))) / 255

    return draw
