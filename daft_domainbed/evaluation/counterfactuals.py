"""Counterfactual images: what has to be drawn into an image before a model is sure of another class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from daft_domainbed.data.left_out import list_classes
from daft_domainbed.errors import UsageError
from daft_domainbed.evaluation.subject import Subject
from daft_domainbed.functional.attacks import run_pgd
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.runtime.files import writing_atomically

Model = Callable[[Tensor], Tensor]

RADII = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # RATIO's, for 32 x 32 pixels
STEPS = 20  # of the attack, from one radius to the next
N_IMAGES = 4  # of each held-out domain

_CELL, _LINE, _MARGIN = 96, 14, 80  # an image's side, a line of text, the column of names: in pixels


def draw_held_out(subject: Subject, folder: Path, seed: int) -> list[Path]:
    """Draw counterfactuals of a few images of each held-out domain, into a folder of the domain's name.

    Raises:
        UsageError: The images are noise, whose values have no bounds, or the folder cannot be made.
    """
    if not subject.has_box:
        raise UsageError(f"--counterfactuals: the images of {subject.dataset} are noise, of which there is no picture")
    names, chosen, paths = list_classes(subject.data.dataset), subject.choose(N_IMAGES, seed), []
    for env in (subject.environments[i] for i in subject.held_out):
        pixels, _ = subject.load(env, chosen[env])
        try:
            paths += counterfactuals(subject.model, pixels, names, folder / env)
        except (FileExistsError, NotADirectoryError) as error:
            raise UsageError(f"--counterfactuals {folder} is a file, not a folder: choose another") from error
    return paths


def counterfactuals(
    model: Model,
    pixels: Tensor,
    class_names: Sequence[str],
    folder: Path,
    radii: Sequence[float] = RADII,
    steps: int = STEPS,
) -> list[Path]:
    """Draw the way from each image to each class, as RATIO's authors show their models (Augustin et al., 2020).

    Args:
        model: Maps pixels to logits, in evaluation mode.
        pixels: Images, [N, C, H, W], in [0, 1].
        class_names: One a logit.
        folder: Where to write; it is made if need be.
        radii: L2 distances, increasing.
        steps: Of the attack, from one radius to the next.

    Returns:
        The pictures, `<place in pixels>.png`: a row a class; the image itself, then the image at each radius, over the
        probability of the class there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images, confidences = follow_paths(model, pixels, len(class_names), radii, steps)
    paths = [folder / f"{i}.png" for i in range(len(pixels))]
    for i, path in enumerate(paths):
        picture = _draw_grid(images[i], confidences[i], class_names, radii)
        with writing_atomically(path) as file:
            picture.save(file, format="PNG")
    return paths


def follow_paths(
    model: Model, pixels: Tensor, n_classes: int, radii: Sequence[float] = RADII, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """Raise each class's probability inside growing L2 balls; each radius begins where the one before has ended.

    Args:
        model: Maps pixels to logits, in evaluation mode.
        pixels: Images, [N, C, H, W], in [0, 1].
        n_classes: K.
        radii: L2 distances, increasing.
        steps: Of the attack, from one radius to the next.

    Returns:
        Images, [N, K, 1 + R, C, H, W], the first the image itself, and the class's probability in each, [N, K, 1 + R].
    """
    images = torch.stack([_follow_path(model, pixels, k, radii, steps) for k in range(n_classes)], dim=1)
    with torch.no_grad():
        probabilities = model(images.flatten(0, 2)).softmax(dim=1).view(*images.shape[:3], n_classes)
    return images, probabilities.diagonal(dim1=1, dim2=3).transpose(1, 2)


def _follow_path(model: Model, pixels: Tensor, target: int, radii: Sequence[float], steps: int) -> Tensor:
    """Return the images on the way to one class, [N, 1 + R, C, H, W]."""
    images = [pixels]
    for radius, before in zip(radii, [0.0, *radii], strict=False):
        found = run_pgd(
            lambda x: F.log_softmax(model(x), dim=1)[:, target].sum(),
            pixels,
            eps=radius,
            norm="l2",
            steps=steps,
            step_size=1.5 * (radius - before) / steps,
            spec=INPUT_SPECS["unit"],
            start=images[-1] - pixels,
        )
        images.append(found)
    return torch.stack(images, dim=1)


def _draw_grid(images: Tensor, confidences: Tensor, class_names: Sequence[str], radii: Sequence[float]) -> Image.Image:
    """Draw images, [K, R, C, H, W], in rows and columns."""
    n_rows, n_columns = images.shape[:2]
    height = _CELL + 2 * _LINE  # a line for the number, and one between rows
    picture = Image.new("RGB", (_MARGIN + n_columns * _CELL, _LINE + n_rows * height), "white")
    draw = ImageDraw.Draw(picture)
    for column, name in enumerate(["image", *(f"L2 {radius:g}" for radius in radii)]):
        draw.text((_MARGIN + column * _CELL, 0), name, "black")
    for row in range(n_rows):
        top = _LINE + row * height
        draw.text((2, top), class_names[row], "black")
        for column in range(n_columns):
            left = _MARGIN + column * _CELL
            picture.paste(_to_picture(images[row, column]), (left, top))
            draw.text((left, top + _CELL), f"{confidences[row, column]:.2f}", "black")
    return picture


def _to_picture(pixels: Tensor) -> Image.Image:
    """Show an image of one channel in gray, of two in red and green."""
    channels = pixels.shape[0]
    rgb = pixels.expand(3, -1, -1) if channels == 1 else F.pad(pixels, (0, 0, 0, 0, 0, max(0, 3 - channels)))[:3]
    array = (255 * rgb.clamp(0, 1)).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array)).resize((_CELL, _CELL), Image.Resampling.NEAREST)
