"""A checkpoint as a model of pixels that needs neither its data nor its teachers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional

from daft_domainbed.embedded.datasets import read_image
from daft_domainbed.errors import UsageError
from daft_domainbed.evaluation.subject import load_algorithm
from daft_domainbed.export.source import Source, read_source
from daft_domainbed.functional.input_spec import InputSpec
from daft_domainbed.runtime.randomness import preserve_states

Picture = Tensor | Image.Image | str | Path

_AT_ONCE = 32  # images, which bounds the memory


class Prediction(NamedTuple):
    """What a model makes of one image: the likeliest class, and the probability of each, by name."""

    label: str
    probabilities: dict[str, float]


class Model(nn.Module):
    """A trained model on pixels from 0 to 1.

    Args:
        algorithm: The host's, with its weights.
        spec: How its training images were normalised.
        source: What else is known of it.

    Attributes:
        class_names: Names in the order of the logits; None where the checkpoint does not know them.
        input_shape: (C, H, W) of what it was trained on.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, algorithm: nn.Module, spec: InputSpec, source: Source) -> None:
        super().__init__()
        self.algorithm: Any = algorithm
        self.has_box = spec.has_box
        self.input_shape: tuple[int, ...] = source.input_shape
        self.class_names = source.class_names
        self.num_classes: int = source.content["model_num_classes"]
        # Plain "mean" is what torch 2.6's exporter calls the average over pixels, too: ONNX then has the name twice.
        self.register_buffer("pixel_mean", spec.get_mean(torch.empty(0)))
        self.register_buffer("pixel_std", spec.get_std(torch.empty(0)))
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits, [B, K], of pixels from 0 to 1, [B, C, H, W]; other sizes are resized as in training."""
        if pixels.shape[2:] != self.input_shape[1:]:
            pixels = functional.resize(pixels, list(self.input_shape[1:]), antialias=True)
        logits: Tensor = self.algorithm.predict((pixels - self.pixel_mean) / self.pixel_std)
        return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits

    def predict(self, images: Picture | Iterable[Picture]) -> list[Prediction]:
        """Return what the model makes of each image.

        Args:
            images: Tensors of pixels from 0 to 1, [C, H, W] each, or one [B, C, H, W]; PIL images; paths of files; one
                of these, or several. Images of PIL and files are resized by PIL, as those that were trained on.

        Raises:
            UsageError: An image cannot be read, or is none that the model takes.
        """
        alone = isinstance(images, (Image.Image, str, Path)) or (isinstance(images, Tensor) and images.dim() < 4)
        waiting: Iterator[Any] = iter([images] if alone else images)  # type: ignore[arg-type]
        names = self.class_names or [str(label) for label in range(self.num_classes)]
        predictions = []
        while batch := list(islice(waiting, _AT_ONCE)):
            with torch.no_grad():
                logits = self(torch.stack([self._to_pixels(image) for image in batch]))
            for row in logits.double().softmax(1).tolist():
                probabilities = dict(zip(names, row, strict=True))
                predictions.append(Prediction(max(probabilities, key=lambda name: probabilities[name]), probabilities))
        return predictions

    def _to_pixels(self, image: Picture) -> Tensor:
        """Return pixels of the model's size, on its device."""
        channels, *size = self.input_shape
        if isinstance(image, (str, Path)):
            image = read_image(str(image), allow_truncated=False)
        if isinstance(image, Image.Image):
            if channels not in (1, 3):
                raise UsageError(f"this model takes {channels} channels, which no image has: give tensors")
            image = image.convert("RGB" if channels == 3 else "L")
            pixels = functional.to_tensor(functional.resize(image, size))
        else:
            pixels = self._check(image)
            if list(pixels.shape[1:]) != size:
                pixels = functional.resize(pixels, size, antialias=True)
        return pixels.to(self.pixel_mean)

    def _check(self, pixels: Tensor) -> Tensor:
        channels = self.input_shape[0]
        if pixels.dim() != 3 or len(pixels) != channels or not pixels.is_floating_point():
            raise UsageError(
                f"an image is a {pixels.dtype} of shape {tuple(pixels.shape)}: this model takes floats, "
                f"[{channels}, H, W]"
            )
        if self.has_box and not (pixels.min() >= 0 and pixels.max() <= 1):
            raise UsageError(
                f"an image has values from {float(pixels.min()):.3g} to {float(pixels.max()):.3g}: this model takes "
                "pixels from 0 to 1, and normalises them itself"
            )
        return pixels


def load_model(path: str | Path, which: str = "chosen") -> Model:
    """Load a trained model for use.

    Args:
        path: A run's folder, a checkpoint of ours or of DomainBed's own, or a folder that `export` wrote.
        which: Of a run's folder: "chosen", the checkpoint that training-domain validation chose, which is the one of
            the table; or "last".

    Returns:
        A module in evaluation mode, on the CPU.

    Raises:
        UsageError: There is no such checkpoint, or it cannot be built; says what to do.

    Example:
        >>> model = load_model("runs/one")  # doctest: +SKIP
        >>> model.predict("a.png")[0].label  # doctest: +SKIP
        'animal'
    """
    return build_model(read_source(Path(path), which))


def build_model(source: Source) -> Model:
    """Return the model of a checkpoint that was read.

    Raises:
        UsageError: The weights do not fit its hyperparameters, or are not finite.
    """
    with preserve_states():
        algorithm = load_algorithm(source.content, source.path, source.host)
    return Model(algorithm, source.spec, source)
