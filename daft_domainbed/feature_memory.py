"""A frozen backbone's features, kept by image, so that the same image is not encoded twice."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

_CHUNK = 16  # images encoded at a time: always as many, so that what was kept before cannot change a rounding


class FeatureMemory:
    """Features of the images seen so far, the oldest forgotten first.

    Args:
        max_bytes: Of the features kept.
    """

    def __init__(self, max_bytes: int = 2**28) -> None:
        self.max_bytes = max_bytes
        self._kept: dict[bytes, Tensor] = {}

    def recall(self, images: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return features, [B, D], of images, [B, ...], encoding only those that are new.

        Args:
            images: Compared bit for bit.
            encode: Maps images to features, sample by sample independently (a network in evaluation mode).
        """
        pixels = images.detach().cpu().contiguous().flatten(1)
        keys = [blake2b(row.tobytes(), digest_size=16).digest() for row in pixels.numpy()]
        new = {key: i for i, key in enumerate(keys) if key not in self._kept}
        found = {key: self._kept[key] for key in keys if key in self._kept}
        rows = list(new.values())
        with torch.no_grad():
            for start in range(0, len(rows), _CHUNK):
                chunk = rows[start : start + _CHUNK]
                padded = chunk + [chunk[0]] * (_CHUNK - len(chunk))
                features = encode(images[padded]).cpu()
                found |= {keys[row]: features[i].clone() for i, row in enumerate(chunk)}
        self._keep({key: found[key] for key in new})
        return torch.stack([found[key] for key in keys]).to(images.device)

    def _keep(self, new: dict[bytes, Tensor]) -> None:
        self._kept |= new
        if not self._kept:
            return
        size = next(iter(self._kept.values())).nbytes
        for key in list(self._kept)[: max(0, len(self._kept) - self.max_bytes // size)]:
            del self._kept[key]
