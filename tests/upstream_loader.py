"""DomainBed's endless loader, made of torch's own parts, with worker processes: what our streams are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Sampler

from tests.processes import get_context


class Endless(Sampler[list[int]]):
    def __init__(self, batches: BatchSampler) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield from self.batches


def iterate(data: Any, sampler: Sampler[int], batch_size: int, num_workers: int, drop_last: bool) -> Iterator[Any]:
    """Return the loader's iterator, whose workers have begun."""
    batches = BatchSampler(sampler, batch_size, drop_last=drop_last)
    # Where Ray is in the process, a fork of it can die.
    context = get_context(is_warm=False) if num_workers else None
    return iter(
        DataLoader(data, num_workers=num_workers, batch_sampler=Endless(batches), multiprocessing_context=context)
    )
