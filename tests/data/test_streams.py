"""Streams against torch's own DataLoader, assembled as DomainBed does it: the same batches, the same numbers drawn."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    Dataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
    default_collate,
)

from daft_domainbed.data.streams import Stream
from daft_domainbed.runtime.randomness import capture_states, restore_states, seed_everything
from tests.upstream_loader import iterate

KINDS = ("training", "evaluation", "balanced")


class Jittered(Dataset[Any]):
    """Samples that a random transform of each library has moved."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= self.size:
            raise IndexError
        return torch.tensor(
            [index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64
        ), index


def make_weights(size: int) -> Tensor:
    """Two classes of unequal size."""
    return torch.where(torch.arange(size) % 3 == 0, 2.0, 1.0)


def make_loader(kind: str, size: int, batch_size: int, num_workers: int) -> Iterator[Any]:
    data = Jittered(size)
    sampler: Sampler[int] = RandomSampler(data, replacement=kind == "training")
    if kind == "balanced":
        sampler = WeightedRandomSampler(make_weights(size), num_samples=batch_size, replacement=True)
    return iterate(data, sampler, batch_size, num_workers, drop_last=kind != "evaluation")


def make_stream(kind: str, size: int, batch_size: int, num_workers: int, draws: bool = True) -> Stream:
    data = Jittered(size)
    return Stream(
        lambda indices: default_collate([data[index] for index in indices]),
        size,
        batch_size,
        num_workers,
        weights=make_weights(size) if kind == "balanced" else None,
        training=kind == "training",
        draws=draws,
    )


def take(iterators: list[Iterator[Any]], rounds: int) -> list[Tensor]:
    """Draw from several loaders in turns, as a train loop does."""
    return [next(iterator)[0] for _ in range(rounds) for iterator in iterators]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(our, their), f"batch {i}"


def compare_with_loaders(sizes: list[tuple[str, int, int]], num_workers: int, rounds: int, seed: int) -> None:
    seed_everything(seed)
    theirs = take([make_loader(*size, num_workers) for size in sizes], rounds)
    their_next = torch.rand(3)
    seed_everything(seed)
    ours = take([make_stream(*size, num_workers) for size in sizes], rounds)
    assert_same(ours, theirs)
    assert torch.equal(torch.rand(3), their_next)


@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(8, 70), st.integers(1, 8)),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 12),
    st.integers(0, 2**31),
)
def test_without_workers_streams_equal_loaders(sizes: list[tuple[str, int, int]], rounds: int, seed: int) -> None:
    compare_with_loaders(sizes, 0, rounds, seed)


def test_virtual_workers_equal_processes() -> None:
    # Over the end of the queue, of each pass, and of what a worker's first batch alone would show.
    compare_with_loaders([("training", 37, 8), ("evaluation", 11, 4), ("balanced", 9, 3)], 2, rounds=9, seed=3)


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(st.integers(0, 15), st.integers(0, 2**31))
def test_saved_stream_goes_on_bit_for_bit(kind: str, num_workers: int, position: int, seed: int) -> None:
    seed_everything(seed)
    stream = make_stream(kind, 13, 4, num_workers)
    take([stream], position)
    file = io.BytesIO()
    torch.save({"stream": stream.state_dict(), "random": capture_states()}, file)
    expected = take([stream], 8)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    seed_everything(seed + 1)
    for other in (make_stream(kind, 13, 4, num_workers), stream):  # a fresh one, and one that has gone further
        other.load_state_dict(saved["stream"])
        restore_states(saved["random"])
        assert_same(take([other], 8), expected)


def test_iterating_is_one_pass_over_every_sample() -> None:
    seed_everything(0)
    stream = make_stream("evaluation", 11, 4, num_workers=2)
    passes = [[labels.tolist() for _, labels in stream] for _ in range(2)]
    for batches in passes:
        assert [len(batch) for batch in batches] == [4, 4, 3]
        assert sorted(sum(batches, [])) == list(range(11))
    assert passes[0] != passes[1]


def test_balanced_stream_follows_the_weights_and_needs_no_full_batch_of_samples() -> None:
    seed_everything(0)
    weights = torch.tensor([0.0, 3.0, 1.0])
    stream = Stream(lambda indices: (torch.tensor(indices), torch.tensor(indices)), 3, 400, 0, weights=weights)
    counts = torch.bincount(next(stream)[0], minlength=3)
    assert counts.sum() == 400
    assert counts[0] == 0
    assert 250 < counts[1] < 350  # 300 expected, with a standard deviation below 9


def test_loading_in_a_worker_leaves_the_global_states_alone() -> None:
    seed_everything(0)
    stream = make_stream("training", 64, 4, num_workers=1)
    states = capture_states()
    next(stream)  # pulls an index batch of the pass in progress, whose seed has long been drawn
    drawn = torch.rand(2), np.random.rand(), random.random()
    restore_states(states)
    assert torch.equal(torch.rand(2), drawn[0])
    assert (np.random.rand(), random.random()) == drawn[1:]


def test_worker_states_are_kept_only_where_numbers_are_drawn() -> None:
    seed_everything(0)
    streams = [make_stream("training", 16, 4, num_workers=2, draws=draws) for draws in (True, False)]
    take(list(streams), 1)
    assert [len(stream.state_dict()["workers"]) for stream in streams] == [1, 0]


@pytest.mark.gpu
def test_loading_in_a_worker_leaves_cuda_generators_alone() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    seed_everything(0)
    stream = make_stream("training", 16, 4, num_workers=1)
    torch.cuda.manual_seed(7)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(7)
    next(stream)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
