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

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, WeightedRandomSampler
from torch.utils.data._utils.worker import _generate_state

from daft_domainbed.runtime.randomness import States, capture_states, preserve_states, restore_states


def _seed_worker(base_seed: int, worker: int) -> None:
    random.seed(base_seed + worker)
    np.random.seed(_generate_state(base_seed, worker))
    torch.default_generator.manual_seed(base_seed + worker)  # a worker process would not touch our CUDA generators


def _draw_seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_().item())


class _Indices:
    """An endless stream of index batches: one of upstream's samplers, pass after pass."""

    def __init__(self, size: int, batch_size: int, weights: Tensor | None, training: bool) -> None:
        self.size, self.batch_size, self.weights, self.training = size, batch_size, weights, training
        self.seed: int | None = None  # of the pass in progress
        self.drawn = 0  # batches that it has given
        self._pass: list[list[int]] = []

    def pull(self) -> list[int]:
        """Return the next batch of indices, beginning a pass where one has ended."""
        if self.weights is not None:
            return list(WeightedRandomSampler(self.weights, self.batch_size))  # type: ignore[arg-type]
        if self.drawn == len(self._pass):
            self._begin_pass(_draw_seed())
        self.drawn += 1
        return self._pass[self.drawn - 1]

    def _begin_pass(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        sampler = RandomSampler(range(self.size), replacement=self.training, generator=generator)
        self._pass = list(BatchSampler(sampler, self.batch_size, drop_last=self.training))
        self.seed, self.drawn = seed, 0

    def state_dict(self) -> States:
        return {"seed": self.seed, "drawn": self.drawn}

    def load_state_dict(self, state: States) -> None:
        self.seed, self._pass = None, []
        if state["seed"] is not None:
            self._begin_pass(state["seed"])
        self.drawn = state["drawn"]


class Stream:
    """One of upstream's loaders: an endless iterator over batches, whose position can be saved and restored.

    Args:
        fetch: Makes a batch from a list of indices; whatever it draws, it draws from the global generators.
        size: Number of samples.
        batch_size: Samples of a full batch.
        num_workers: Upstream's N_WORKERS; no process is ever started.
        weights: A weight a sample, [size], that balances classes; None draws all samples alike.
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
        self.indices = _Indices(size, batch_size, weights, training)
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
        batch = self._fetch_in_worker(self.served % self.num_workers, self.queue[0])
        self._advance()
        return batch

    def _advance(self) -> None:
        self.served += 1
        self.queue.popleft()
        self.queue.append(self.indices.pull())

    def _fetch_in_worker(self, worker: int, indices: list[int]) -> tuple[Tensor, Tensor]:
        if not self.draws:
            return self.fetch(indices)
        with preserve_states(cuda=False):
            if worker in self.workers:
                restore_states(self.workers[worker])
            else:
                _seed_worker(self.base_seed, worker)
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
