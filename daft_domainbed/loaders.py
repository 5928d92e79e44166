"""The data path: from a split to batches, at once where the data lie in memory, sample by sample elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from daft_domainbed.errors import UsageError
from daft_domainbed.streams import Stream

EVAL_BATCH_SIZE = 64  # upstream's; another size could round a tie the other way


def make_stream(split: Any, batch_size: int, num_workers: int, weights: Tensor | None = None) -> Stream:
    """Return the endless stream of training batches that upstream's loader would give for a split."""
    fetch, draws = _make_fetch(split)
    return Stream(fetch, len(split), batch_size, num_workers, weights=weights, draws=draws)


def make_eval_stream(split: Any, num_workers: int) -> Stream:
    """Return the stream of evaluation passes that upstream's loader would give for a split."""
    fetch, draws = _make_fetch(split)
    return Stream(fetch, len(split), EVAL_BATCH_SIZE, num_workers, training=False, draws=draws)


def _make_fetch(split: Any) -> tuple[Callable[[list[int]], tuple[Tensor, Tensor]], bool]:
    """Return how a batch of a split is made, and whether making one may draw random numbers in a worker."""
    data = split.underlying_dataset
    keys = torch.as_tensor(split.keys, dtype=torch.int64)
    if hasattr(data, "fetch"):
        return lambda indices: data.fetch(keys[indices]), False
    if type(data) is TensorDataset:  # a class derived from it may change what it serves
        images, labels = data.tensors
        return lambda indices: (images[keys[indices]], labels[keys[indices]]), False
    return lambda indices: default_collate([_load_sample(split, index) for index in indices]), True


def _load_sample(split: Any, index: int) -> Any:
    try:
        return split[index]
    except (OSError, SyntaxError, ValueError) as error:  # all that Pillow raises on a broken file
        samples = getattr(split.underlying_dataset, "samples", None)
        if samples is None:
            raise
        path = samples[split.keys[index]][0]
        raise UsageError(f"broken image {path} ({error}): mend or remove it") from error
