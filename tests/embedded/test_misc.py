from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from daft_domainbed.embedded import misc
from daft_domainbed.errors import UsageError


def label_data(labels: list[int]) -> list[tuple[Tensor, int]]:
    return [(torch.zeros(1), label) for label in labels]


class Echo(nn.Module):
    """Answers with its input, and remembers in which mode it was asked."""

    def predict(self, x: Tensor) -> Tensor:
        self.answered_in_training = self.training
        return x


def test_seed_hash_is_md5_of_the_arguments() -> None:
    # printf '(1, 2)' | md5sum: 85985a7bd912508f89c96f0ff61e15a6, of which 31 bits stay.
    assert misc.seed_hash(1, 2) == 0x761E15A6


@given(st.integers(0, 50), st.data())
def test_split_dataset_deals_every_sample_once(size: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, size))
    seed = data.draw(st.integers(0, 2**32 - 1))
    first, rest = misc.split_dataset(range(100, 100 + size), n, seed)
    assert len(first) == n
    assert sorted([*first, *rest]) == list(range(100, 100 + size))
    assert misc.split_dataset(range(size), n, seed)[0].keys == first.keys


def test_split_dataset_depends_on_the_seed() -> None:
    splits = [misc.split_dataset(range(50), 25, seed)[0].keys for seed in (0, 1)]
    assert splits[0] != splits[1]


def test_split_dataset_refuses_more_than_there_is() -> None:
    with pytest.raises(UsageError, match="5 samples off a data set of 4"):
        misc.split_dataset(range(4), 5)


def test_balanced_weights_by_hand() -> None:
    weights = misc.make_weights_for_balanced_classes(label_data([0, 2, 0, 0]))
    assert torch.equal(weights, torch.tensor([1 / 6, 1 / 2, 1 / 6, 1 / 6]))


def test_balanced_weights_of_nothing() -> None:
    assert misc.make_weights_for_balanced_classes([]).shape == (0,)


def test_accuracy_by_hand() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    loader = [(logits[:3], torch.tensor([0, 0, 0])), (logits[3:], torch.tensor([1]))]
    network = Echo()
    assert misc.accuracy(network, loader, None, "cpu") == 3 / 4
    assert misc.accuracy(network, loader, torch.tensor([1.0, 5.0, 1.0, 3.0]), "cpu") == 5 / 10
    assert network.training
    assert not network.answered_in_training


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_accuracy_of_a_single_logit_is_that_of_its_sign(shape: tuple[int, ...]) -> None:
    loader = [(torch.tensor([[2.0], [-1.0], [3.0], [-0.5]]), torch.tensor([1, 0, 0, 1]).view(shape))]
    assert misc.accuracy(Echo(), loader, None, "cpu") == 1 / 2


@pytest.mark.parametrize("arguments", [(), (0,), (0, "lr"), (1, 2, 3), ("PACS", [0, 1], None)])
def test_seed_hash_equals_upstream(upstream: SimpleNamespace, arguments: tuple[object, ...]) -> None:
    assert misc.seed_hash(*arguments) == upstream.misc.seed_hash(*arguments)


@pytest.mark.parametrize(("size", "n", "seed"), [(1, 0, 0), (10, 2, 1), (786, 157, 12345), (70000, 14000, 2**31 - 1)])
def test_split_dataset_equals_upstream(upstream: SimpleNamespace, size: int, n: int, seed: int) -> None:
    ours = misc.split_dataset(range(size), n, seed)
    theirs = upstream.misc.split_dataset(range(size), n, seed)
    assert [split.keys for split in ours] == [split.keys for split in theirs]
    assert {type(key) for key in ours[1].keys} == {int}


def test_balanced_weights_equal_upstream(upstream: SimpleNamespace) -> None:
    data = label_data(torch.randint(0, 7, (999,)).tolist())
    ours, theirs = (m.make_weights_for_balanced_classes(data) for m in (misc, upstream.misc))
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("weighted", [False, True])
def test_accuracy_equals_upstream(upstream: SimpleNamespace, weighted: bool) -> None:
    loader = [(torch.randn(64, 5), torch.randint(0, 5, (64,))) for _ in range(3)]
    weights = torch.rand(192) if weighted else None
    ours, theirs = (m.accuracy(Echo(), loader, weights, "cpu") for m in (misc, upstream.misc))
    assert ours == theirs
