"""Attacks on documents stay in their balls, leave the right one alone and promote the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from daft_domainbed.embedded.documents import load_package
from daft_domainbed.functional.synonyms import Synonyms, find_synonyms
from daft_domainbed.models.ranker import ListHead, Ranker, moving_documents
from daft_domainbed.models.ranking_attacks import promote_by_embedding, promote_by_words


@pytest.fixture(scope="module")
def model() -> Iterator[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield nn.Sequential(Ranker((21, 40), 8), ListHead(20, nn.Linear(4, 1)))


@pytest.fixture(scope="module")
def lists() -> tuple[Tensor, Tensor]:
    return load_package("scipy").fetch(torch.arange(5))


@pytest.fixture(scope="module")
def synonyms() -> Synonyms:
    return find_synonyms(load_package("numpy").documents)


def is_right(y: Tensor) -> Tensor:
    return torch.arange(20) == y[:, None]


@pytest.mark.parametrize("eps", [0.1, 0.5])
def test_embeddings_stay_in_each_documents_own_ball(model: Any, lists: tuple[Tensor, Tensor], eps: float) -> None:
    x, y = lists
    moved = promote_by_embedding(model, model, x, y, eps, steps=3)
    sizes = moved.flatten(2).norm(dim=2) / model[0].embed(x[:, 1:]).flatten(2).norm(dim=2)
    assert (sizes <= eps * (1 + 1e-5)).all()
    assert not moved[is_right(y)].any() and not moved[x[:, 1:] == 0].any()
    assert (sizes[~is_right(y)] > 0).all() and sizes[~is_right(y)].mean() > 0.5 * eps


def test_scores_rise(model: Any, lists: tuple[Tensor, Tensor], synonyms: Synonyms) -> None:
    x, y = lists
    with torch.no_grad():
        before = model(x)
        with moving_documents(model, promote_by_embedding(model, model, x, y, 0.5, steps=3)):
            by_embedding = model(x)
        by_words = model(promote_by_words(model, model, x, y, synonyms, 4, 0.5, steps=2))
    wrong = ~is_right(y)
    assert (by_embedding[wrong] > before[wrong]).float().mean() > 0.9
    assert (by_words >= before - 1e-5).all() and (by_words[wrong] > before[wrong] + 1e-4).float().mean() > 0.3
    torch.testing.assert_close(by_words[~wrong], before[~wrong])


def test_words_are_replaced_by_synonyms_and_not_too_many(
    model: Any, lists: tuple[Tensor, Tensor], synonyms: Synonyms
) -> None:
    x, y = lists
    attacked = promote_by_words(model, model, x, y, synonyms, 3, 0.5, steps=2)
    changed = attacked != x
    assert changed.any() and changed.sum(2).max() <= 3
    assert not changed[:, 0].any() and not changed[:, 1:][is_right(y)].any()
    offered = synonyms.find(x[changed])
    assert (offered == attacked[changed].unsqueeze(1)).any(1).all()


def test_without_a_budget_nothing_moves(model: Any, lists: tuple[Tensor, Tensor]) -> None:
    x, y = lists
    assert not promote_by_embedding(model, model, x, y, 0.0, steps=3).any()
    nobody = Synonyms(torch.tensor([1]), torch.zeros(1, 2, dtype=torch.int64))
    assert torch.equal(promote_by_words(model, model, x, y, nobody, 4, 0.5, steps=1), x)


def test_an_attack_leaves_no_trace(model: Any, lists: tuple[Tensor, Tensor], synonyms: Synonyms) -> None:
    x, y = lists
    before, state = x.clone(), torch.get_rng_state()
    model.train()
    promote_by_words(model, model, x, y, synonyms, 2, 0.5, steps=1)
    assert model.training and torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
