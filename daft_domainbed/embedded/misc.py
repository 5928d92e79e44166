"""Seeds, splits, class weights and accuracy."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from daft_domainbed.errors import UsageError


def seed_hash(*args: object) -> int:
    """Return a random seed below 2**31 that depends on the arguments alone."""
    return int(hashlib.md5(str(args).encode()).hexdigest(), 16) % 2**31


class SplitDataset(Dataset[Any]):
    """The samples `keys` of `underlying_dataset`, in that order."""

    def __init__(self, underlying_dataset: Any, keys: list[int]) -> None:
        self.underlying_dataset = underlying_dataset
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Any:
        return self.underlying_dataset[self.keys[index]]


def split_dataset(dataset: Any, n: int, seed: int = 0) -> tuple[SplitDataset, SplitDataset]:
    """Deal a data set at random into `n` samples and the rest.

    Raises:
        UsageError: the data set has fewer than `n` samples.
    """
    if n > len(dataset):
        raise UsageError(f"cannot split {n} samples off a data set of {len(dataset)}")
    keys = np.random.RandomState(seed).permutation(len(dataset)).tolist()
    return SplitDataset(dataset, keys[:n]), SplitDataset(dataset, keys[n:])


def make_weights_for_balanced_classes(dataset: Any) -> Tensor:
    """Return a sampling weight per sample, float32 [N], that gives every class present the same total; they sum to 1.

    Reads every sample once, so a random augmentation moves the global random states.
    """
    labels = [int(dataset[i][1]) for i in range(len(dataset))]
    counts = Counter(labels)
    return torch.tensor([1 / (counts[label] * len(counts)) for label in labels])


def accuracy(
    network: Any, loader: Iterable[tuple[Tensor, Tensor]], weights: Tensor | None, device: torch.device | str
) -> float:
    """Return the (weighted) share of samples that `network.predict` gets right.

    The network answers in eval mode and is left in train mode. One logit means two classes, told apart by its sign.
    """
    correct = total = 0.0
    seen = 0
    network.eval()
    with torch.no_grad():
        for x, y in loader:
            logits, y = network.predict(x.to(device)), y.to(device)
            batch_weights = torch.ones(len(x)) if weights is None else weights[seen : seen + len(x)]
            batch_weights = batch_weights.to(device)
            seen += len(x)
            answers = logits.squeeze(1).gt(0) if logits.shape[1] == 1 else logits.argmax(1)
            correct += (answers.eq(y.flatten()).float() * batch_weights).sum().item()
            total += batch_weights.sum().item()
    network.train()
    return correct / total
