"""A frozen backbone's features, kept by image, so that an image that comes again is not encoded again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

_CHUNK = 16  # images encoded at a time: always as many, so that what was kept before cannot change a rounding
_SAMPLE = 256  # numbers of an image, at least, that tell it from most others
_ENTRY = 1024  # bytes that an image takes beside its features, about
_PATIENCE = 4096  # images without one that came before, after which an image is kept only when it comes again


class FeatureMemory:
    """Features of the images seen so far, those that were asked for longest ago forgotten first.

    Comparing images takes time, and augmented or attacked ones never recur: while none does, each is known by a sample
    of its numbers only, and no features are kept. On an accelerator encoding is quicker than comparing.

    Args:
        max_bytes: The most that is kept, about.
    """

    def __init__(self, max_bytes: int = 2**28) -> None:
        self.max_bytes = max_bytes
        self.n_new = 0  # images since the last that had come before
        # By the digest of an image's sample: the whole image's and its features, or None where it has come once.
        self._kept: dict[bytes, tuple[bytes, Tensor] | None] = {}

    def recall(self, images: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return features, [B, D], of images, [B, ...], encoding only those that are not remembered.

        Args:
            images: Compared bit for bit, and with the precision that is active.
            encode: Maps images to features, sample by sample independently (a network in evaluation mode).
        """
        if images.device.type != "cpu":
            with torch.no_grad():
                return encode(images)
        pixels = images.detach().contiguous().flatten(1)
        precision = name_precision(images)
        step = max(1, pixels.shape[1] // _SAMPLE)
        samples = digest(pixels[:, ::step], precision)
        has_come = [sample in self._kept for sample in samples]
        self.n_new = 0 if any(has_come) else self.n_new + len(images)
        compared = [i for i, came in enumerate(has_come) if came or self.n_new < _PATIENCE]
        wholes = dict(zip(compared, digest(pixels[compared], precision), strict=True))

        entries: dict[int, tuple[bytes, Tensor]] = {}
        for i, whole in wholes.items():
            kept = self._kept.get(samples[i])
            if kept is not None and kept[0] == whole:
                entries[i] = kept
        features = {i: entry[1] for i, entry in entries.items()}
        rows = [i for i in range(len(images)) if i not in features]
        features |= encode_in_chunks(images, rows, encode)
        for i, sample in enumerate(samples):
            self._kept.pop(sample, None)  # the latest come last
            self._kept[sample] = entries.get(i) or ((wholes[i], features[i].clone()) if i in wholes else None)
        self._forget(_ENTRY + (features[0].nbytes if features else 0))
        return torch.stack([features[i] for i in range(len(images))])

    def _forget(self, size: int) -> None:
        for sample in list(self._kept)[: max(0, len(self._kept) - self.max_bytes // size)]:
            del self._kept[sample]


def encode_in_chunks(images: Tensor, rows: Sequence[int], encode: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Return the features of some rows of a batch, by row, whose bits do not depend on which rows these are."""
    features: dict[int, Tensor] = {}
    with torch.no_grad():
        for start in range(0, len(rows), _CHUNK):
            chunk = [*rows[start : start + _CHUNK]]
            padded = chunk + [chunk[0]] * (_CHUNK - len(chunk))
            is_run = padded == [*range(chunk[0], chunk[0] + _CHUNK)]  # which needs no copy
            features |= zip(chunk, encode(images[chunk[0] :][:_CHUNK] if is_run else images[padded]), strict=False)
    return features


def name_precision(images: Tensor) -> bytes:
    """Return shape and arithmetic that images would be encoded in now; features of others are others."""
    precision = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    return str((tuple(images.shape[1:]), images.dtype, precision)).encode()


def digest(rows: Tensor, precision: bytes) -> list[bytes]:
    """Return a hash of each row of numbers, [B, N], with the precision for a key."""
    numbers = rows.contiguous().view(torch.uint8).numpy()
    return [blake2b(row.data, digest_size=16, key=precision).digest() for row in numbers]
