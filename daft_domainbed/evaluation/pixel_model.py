"""A DomainBed algorithm as a function from pixels to logits, and to the features that its head sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from daft_domainbed.evaluation.memory import apply_in_parts, is_out_of_memory
from daft_domainbed.functional.input_spec import InputSpec


class PixelModel:
    """A DomainBed algorithm as a function from pixels to logits, whatever the normalisation of its data.

    Args:
        algorithm: The host's; put into evaluation mode, its weights frozen.
        spec: How its images were normalised.
        device: Where it computes.

    Attributes:
        at_once: How many images it takes at a time, where memory has run out; None for any number.
    """

    def __init__(self, algorithm: Any, spec: InputSpec, device: torch.device) -> None:
        self.algorithm = algorithm.to(device).eval().requires_grad_(False)
        self.spec, self.device = spec, device
        self.at_once: int | None = None
        self.is_plain = spec.mean == (0.0,) and spec.std == (1.0,)
        self._answers_by_features: bool | None = None  # not known yet

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return logits, [B, K], of pixels, [B, C, H, W]; one logit means two classes, told apart by its sign."""
        logits = apply_in_parts(self.algorithm.predict, self.normalise(pixels), self.at_once)
        return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits

    def encode(self, pixels: Tensor) -> Tensor | None:
        """Return the features that the head sees, [B, D]; None where the algorithm's answers do not rest on any."""
        if self._answers_by_features is None:
            self._answers_by_features = self._check_features(pixels[:2])
        if not self._answers_by_features:
            return None
        return apply_in_parts(self.algorithm.featurizer, self.normalise(pixels), self.at_once).flatten(1)

    @torch.no_grad()
    def _check_features(self, pixels: Tensor) -> bool:
        """Return whether the head answers from the features as the algorithm does, which may average or add context."""
        featurizer, head = (getattr(self.algorithm, name, None) for name in ("featurizer", "classifier"))
        if featurizer is None or head is None:
            return featurizer is not None
        x = self.normalise(pixels)
        try:
            answers = head(featurizer(x))
        except RuntimeError as error:  # another number of channels or features
            if is_out_of_memory(error):
                raise
            return False
        logits = self.algorithm.predict(x)
        return answers.shape == logits.shape and torch.allclose(answers, logits, rtol=1e-3, atol=1e-4)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return what the algorithm takes."""
        return pixels if self.is_plain else (pixels - self.spec.get_mean(pixels)) / self.spec.get_std(pixels)
