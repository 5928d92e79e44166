"""What a method may look at before it trains: images of its training domains, never of the held-out ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from daft_domainbed.data.loaders import make_stream, read_split
from daft_domainbed.data.views import make_views
from daft_domainbed.teachers.facts import RunFacts

Batch = tuple[Tensor, Tensor]


def draw_minibatches(facts: RunFacts, count: int) -> Iterator[list[Batch]]:
    """Yield minibatches as an update gets them, one a training domain; whoever iterates keeps the random states.

    Args:
        facts: Of the run.
        count: How many updates they are for.
    """
    batch_size = facts.hparams["batch_size"]
    weigh = (
        facts.host.misc.make_weights_for_balanced_classes if facts.hparams.get("class_balanced") else lambda split: None
    )
    streams = [
        make_stream(in_, batch_size, 0, weigh(in_), make_views(facts.hparams, facts.args.seed, env))
        for env, (in_, _) in _list_training_splits(facts)
    ]
    for _ in range(count):
        yield [_move(next(stream), facts) for stream in streams]


def read_in_splits(facts: RunFacts) -> Iterator[Batch]:
    """Yield the training images, each once, in one of its views."""
    for env, (in_, _) in _list_training_splits(facts):
        yield from _read(in_, env, facts)


def read_out_splits(facts: RunFacts) -> Iterator[list[Batch]]:
    """Yield the validation images of each training domain in turn, each once, in one of its views."""
    for env, (_, out) in _list_training_splits(facts):
        yield [*_read(out, env, facts)]


def _read(split: Any, env: int, facts: RunFacts) -> Iterator[Batch]:
    views = make_views(facts.hparams, facts.args.seed, env)
    yield from (_move(batch, facts) for batch in read_split(split, views))


def _list_training_splits(facts: RunFacts) -> list[tuple[int, Any]]:
    held_out = set(facts.args.test_envs)
    return [(env, pair) for env, pair in enumerate(facts.splits) if env not in held_out]


def _move(batch: Batch, facts: RunFacts) -> Batch:
    x, y = batch
    return x.to(facts.device), y.to(facts.device)
