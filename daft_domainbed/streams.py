"""DomainBed's random streams without its worker processes: the same numbers, drawn in the same order.

The rules (the only place that knows them):

1. A loader is an endless batch sampler behind a queue of indices. Creating it makes the sampler's iterator, draws one
   int64 base seed from torch's global generator, then pulls 2 x N_WORKERS batches; every batch handed out pulls one.
2. Each pass of a RandomSampler draws one int64 from the global generator, for a generator of its own, when its first
   index is pulled. Evaluation loaders obey the same rules, so they too consume global numbers ahead of time.
3. Batch i is made by virtual worker i mod N_WORKERS: three random states, seeded from base seed + worker number.
4. Without workers there is no queue and no worker state: transforms draw from the global generators.
5. Balanced classes draw with replacement from the global generator, one batch a pass.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

States = dict[str, Any]


def capture_states(*, cuda: bool = True) -> States:
    """Return the global random states of Python, NumPy, torch and (unless told otherwise) CUDA, as plain types."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states: States = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if cuda and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_states(states: States) -> None:
    """Put captured random states back in place."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def preserve_states(*, cuda: bool = True) -> Iterator[None]:
    """Leave all global random states as they were, whatever is drawn inside."""
    states = capture_states(cuda=cuda)
    try:
        yield
    finally:
        restore_states(states)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch as DomainBed's training script does."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _draw_seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_().item())


class _Indices:
    """An endless stream of index batches: one of upstream's samplers, pass after pass."""

    def __init__(self, size: int, batch_size: int, *, weights: Tensor | None, replacement: bool) -> None:
        self.size, self.batch_size, self.replacement = size, batch_size, replacement
        self.weights = None if weights is None else weights.double()
        self.seed: int | None = None  # of the pass in progress
        self.drawn = 0  # batches that it has given
        self._pass: list[list[int]] = []

    def pull(self) -> list[int]:
        """Return the next batch of indices, beginning a pass where one has ended."""
        if self.weights is not None:
            return torch.multinomial(self.weights, self.batch_size, replacement=True).tolist()
        if self.seed is None or self.drawn == len(self._pass):
            self.seed, self.drawn = _draw_seed(), 0
            self._pass = self._make_pass(self.seed)
        self.drawn += 1
        return self._pass[self.drawn - 1]

    def _make_pass(self, seed: int) -> list[list[int]]:
        generator = torch.Generator()
        generator.manual_seed(seed)
        if self.replacement:  # upstream's sampler draws in chunks of 32
            chunks = [
                torch.randint(self.size, (min(32, self.size - start),), dtype=torch.int64, generator=generator)
                for start in range(0, self.size, 32)
            ]
            order = torch.cat(chunks).tolist()
        else:
            order = torch.randperm(self.size, generator=generator).tolist()
        batches = [order[start : start + self.batch_size] for start in range(0, self.size, self.batch_size)]
        if self.replacement and len(batches[-1]) < self.batch_size:
            batches.pop()  # training drops the last, incomplete batch; evaluation keeps it
        return batches

    def state_dict(self) -> States:
        return {"seed": self.seed, "drawn": self.drawn}

    def load_state_dict(self, state: States) -> None:
        self.seed, self.drawn = state["seed"], state["drawn"]
        self._pass = [] if self.seed is None else self._make_pass(self.seed)


class Stream:
    """One of upstream's loaders: an endless iterator over batches, whose position can be saved and restored.

    Args:
        fetch: Makes a batch from a list of indices; whatever it draws, it draws from the global generators.
        size: Number of samples.
        batch_size: Of a full batch.
        num_workers: Upstream's N_WORKERS; no process is ever started.
        weights: For balanced classes, a weight a sample, [size].
        training: Draw with replacement and drop incomplete batches; else shuffle and keep every sample.
        draws: Whether `fetch` draws random numbers; where it does not, worker states need not be kept.
    """

    def __init__(
        self,
        fetch: Callable[[list[int]], tuple[Tensor, Tensor]],
        size: int,
        batch_size: int,
        num_workers: int,
        *,
        weights: Tensor | None = None,
        training: bool = True,
        draws: bool = True,
    ) -> None:
        self.fetch, self.num_workers, self.draws = fetch, num_workers, draws
        self.indices = _Indices(size, batch_size, weights=weights, replacement=training)
        self.batches_a_pass = -(-size // batch_size)
        self.base_seed = _draw_seed()
        self.queue = deque(self.indices.pull() for _ in range(2 * num_workers))
        self.served = 0
        self.workers: dict[int, States] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one pass."""
        for _ in range(self.batches_a_pass):
            yield next(self)

    def __next__(self) -> tuple[Tensor, Tensor]:
        if not self.num_workers:
            return self.fetch(self.indices.pull())
        batch = self._fetch_in_worker(self.served % self.num_workers, self.queue.popleft())
        self.served += 1
        self.queue.append(self.indices.pull())
        return batch

    def _fetch_in_worker(self, worker: int, indices: list[int]) -> tuple[Tensor, Tensor]:
        if not self.draws:
            return self.fetch(indices)
        with preserve_states(cuda=False):
            if worker in self.workers:
                restore_states(self.workers[worker])
            else:
                seed_everything(self.base_seed + worker)
                np.random.seed(torch.utils.data._utils.worker._generate_state(self.base_seed, worker))
            batch = self.fetch(indices)
            self.workers[worker] = capture_states(cuda=False)
        return batch

    def state_dict(self) -> States:
        """Return the stream's position, as tensors and plain types."""
        return {
            "indices": self.indices.state_dict(),
            "base_seed": self.base_seed,
            "queue": [list(batch) for batch in self.queue],
            "served": self.served,
            "workers": dict(self.workers),
        }

    def load_state_dict(self, state: States) -> None:
        """Go on from a saved position."""
        self.indices.load_state_dict(state["indices"])
        self.base_seed, self.served = state["base_seed"], state["served"]
        self.queue = deque(state["queue"])
        self.workers = dict(state["workers"])
