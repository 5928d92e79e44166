"""The data path: from a split to batches, at once where the data lie in memory, sample by sample elsewhere."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from daft_domainbed.data.augmentation import Draw, SplitTransform, split_transform
from daft_domainbed.data.image_cache import CachedImages, read_or_name
from daft_domainbed.data.readers import Readers
from daft_domainbed.data.streams import Stream
from daft_domainbed.data.views import Views
from daft_domainbed.errors import UsageError
from daft_domainbed.host import contract
from daft_domainbed.runtime.randomness import States

EVAL_BATCH_SIZE = 64  # upstream's; another size could round a tie the other way


def make_stream(
    split: Any, batch_size: int, num_workers: int, weights: Tensor | None = None, views: Views | None = None
) -> Stream:
    """Return the endless stream of training batches that upstream's loader would give for a split.

    Args:
        split: Of an environment.
        batch_size: Images of a batch.
        num_workers: Upstream's N_WORKERS.
        weights: A weight an image, [N], that balances classes.
        views: The few views that an image is shown in; None draws another one every time.
    """
    return _make_stream(split, batch_size, num_workers, views, weights=weights)


def make_eval_stream(split: Any, num_workers: int, views: Views | None = None) -> Stream:
    """Return the stream of evaluation passes that upstream's loader would give for a split; `views` as in training."""
    return _make_stream(split, EVAL_BATCH_SIZE, num_workers, views, training=False)


def read_split(split: Any, views: Views | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images of a split in order, in batches; augmentation draws from the global generators."""
    fetch, _ = _make_fetch(split, views)
    for start in range(0, len(split), EVAL_BATCH_SIZE):
        yield fetch([*range(start, min(start + EVAL_BATCH_SIZE, len(split)))])


def _make_stream(split: Any, batch_size: int, num_workers: int, views: Views | None = None, **options: Any) -> Stream:
    sizes = (len(split), batch_size, num_workers)
    data = split.underlying_dataset
    is_plain = contract.is_plain_folder(data) or isinstance(getattr(data, "loader", None), CachedImages)
    if is_plain and (transform := split_transform(data.transform)):
        return _ImageStream(_Images(split, transform, views), *sizes, draws=transform.draws, **options)
    fetch, draws = _make_fetch(split, views)
    return Stream(fetch, *sizes, draws=draws, **options)


def _make_fetch(split: Any, views: Views | None = None) -> tuple[Callable[[list[int]], tuple[Tensor, Tensor]], bool]:
    """Return how a batch of a split is made, and whether making one may draw random numbers in a worker."""
    data = split.underlying_dataset
    keys = torch.as_tensor(split.keys, dtype=torch.int64)
    if views is not None and hasattr(data, "draw"):
        return lambda indices: views.fetch_drawn(keys[indices], data), True
    if views is not None:
        fetch, _ = _make_fetch(split)
        return lambda indices: views.fetch(split.keys, fetch, indices), True
    if hasattr(data, "fetch"):
        return lambda indices: data.fetch(keys[indices]), False
    if type(data) is TensorDataset:  # a class derived from it may change what it serves
        images, labels = data.tensors
        return lambda indices: (images[keys[indices]], labels[keys[indices]]), False
    return lambda indices: default_collate([_load_sample(split, index) for index in indices]), True


def _load_sample(split: Any, index: int) -> Any:
    samples = getattr(split.underlying_dataset, "samples", None)
    return split[index] if samples is None else read_or_name(lambda _: split[index], samples[split.keys[index]][0])


# --- image folders ---------------------------------------------------------------------------------------------------


@dataclass
class _Pending:
    """A batch that other threads are at work on."""

    batch: tuple[Tensor, Tensor]
    parts: list[Future[None]]

    def wait(self) -> tuple[Tensor, Tensor]:
        for part in self.parts:
            part.result()
        return self.batch


class _Images:
    """A split of an image folder: a batch is drawn for on this thread, in order, and computed on several others."""

    def __init__(self, split: Any, transform: SplitTransform, views: Views | None) -> None:
        self.keys, self.data, self.transform, self.views = split.keys, split.underlying_dataset, transform, views
        self.sizes: dict[int, tuple[int, int]] = {}  # (width, height) of the images seen so far

    def begin(self, indices: list[int]) -> _Pending:
        """Draw for a batch from the global generators, and have it computed."""
        keys = [self.keys[index] for index in indices]
        threads = torch.get_num_threads()
        pool = _get_pool(os.getpid(), threads)
        if self.transform.draws:  # which depends on an image's size
            unknown = [key for key in dict.fromkeys(keys) if key not in self.sizes]
            self.sizes |= zip(unknown, pool.map(self._measure, unknown), strict=True)
        draws = self._draw(keys)
        x = torch.empty(len(keys), 3, self.transform.height, self.transform.width)
        out = x.numpy()

        def compute(first: int) -> None:
            for i in range(first, len(keys), threads):
                image = self._open(keys[i])
                if draws[i] is not None and image.size != self.sizes[keys[i]]:
                    raise UsageError(f"{self.data.samples[keys[i]][0]} has changed since the run began")
                self.transform.apply(image, draws[i], out[i])

        y = torch.tensor([self.data.samples[key][1] for key in keys])
        return _Pending((x, y), [pool.submit(compute, first) for first in range(threads)])

    def _draw(self, keys: list[int]) -> list[Draw | None]:
        def draw(i: int) -> Draw:
            width, height = self.sizes[keys[i]]
            return self.transform.draw(height, width)

        if not self.transform.draws:
            return [None] * len(keys)
        return self.views.draw(keys, draw) if self.views else [draw(i) for i in range(len(keys))]

    def _open(self, key: int) -> Image.Image:
        image: Image.Image = read_or_name(self.data.loader, self.data.samples[key][0])
        return image

    def _measure(self, key: int) -> tuple[int, int]:
        path = self.data.samples[key][0]
        if isinstance(self.data.loader, CachedImages):
            return self.data.loader.get_size(path)
        return read_or_name(_read_size, path) or self._open(key).size


def _read_size(path: str) -> tuple[int, int] | None:
    """Return (width, height) from an image's first bytes, or None for a format that may turn it while it is decoded."""
    with Image.open(path) as image:
        return image.size if image.format in ("JPEG", "PNG") else None


@functools.cache
def _get_pool(process: int, threads: int) -> Readers:
    """Return this process's threads for images; those of a parent are not a child's."""
    return Readers(threads)


class _ImageStream(Stream):
    """A stream whose next batch is begun while the last one is in use.

    Only what upstream's workers would draw and compute can be done ahead: neither the global generators nor the
    stream's saved state know of it.
    """

    def __init__(self, images: _Images, *args: Any, **options: Any) -> None:
        super().__init__(images.begin, *args, **options)  # type: ignore[arg-type]  # batches that have to be waited for
        self.goes_on: bool = options.get("training", True)
        self._ahead: tuple[_Pending, States | None] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one pass."""
        for left in reversed(range(self.batches_a_pass)):
            self.goes_on = left > 0
            yield next(self)

    def __next__(self) -> tuple[Tensor, Tensor]:
        if not self.num_workers:
            return self.fetch(self.indices.pull()).wait()  # type: ignore[attr-defined]
        pending, drawn = self._ahead or self._begin()
        if drawn is not None:
            self.workers[self.served % self.num_workers] = drawn
        self._advance()
        self._ahead = self._begin() if self.goes_on else None
        return pending.wait()

    def _begin(self) -> tuple[_Pending, States | None]:
        """Begin the next batch; return it with its worker's states after it, which are not yet put away."""
        worker = self.served % self.num_workers
        before = dict(self.workers)
        pending: Any = self._fetch_in_worker(worker, self.queue[0])
        drawn = self.workers.get(worker) if self.draws else None
        self.workers = before
        return pending, drawn

    def load_state_dict(self, state: States) -> None:
        """Go on from a saved position."""
        self._ahead = None
        super().load_state_dict(state)
