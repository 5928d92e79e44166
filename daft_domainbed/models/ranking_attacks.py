"""Promotion of documents that are not the right ones: in the space of embeddings, or by other words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from daft_domainbed.functional.attacks import evaluating, get_norms, run_pgd
from daft_domainbed.functional.synonyms import Synonyms
from daft_domainbed.models.ranker import Ranker, find_ranker, moving_documents

Predict = Callable[[Tensor], Tensor]


def promote_by_embedding(model: Any, predict: Predict, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """Return how the embeddings of the wrong documents move so that their scores rise, [B, C, L, W].

    Projected gradient ascent in each document's own ball; the right one stays.

    Args:
        model: Holds the ranker.
        predict: Maps lists to scores, [B, C].
        x: Lists, int64 [B, 1 + C, L].
        y: Where the right one is, [B].
        eps: Radius, as a share of the norm of a document's embeddings.
        steps: Of the ascent.
    """
    ranker = _require_ranker(model)
    with evaluating(model):
        embedded = ranker.embed(x[:, 1:]).detach()
        flat, is_word = embedded.flatten(0, 1).flatten(1), (x[:, 1:] > 0).unsqueeze(3)
        is_wrong = _tell_wrong(x, y)
        radius = eps * get_norms(flat, "l2") * is_wrong.view(-1, 1)

        def promote(moved: Tensor) -> Tensor:
            with moving_documents(model, (moved.view_as(embedded) - embedded) * is_word):
                return predict(x).sum()

        if eps == 0 or steps == 0:
            return torch.zeros_like(embedded)
        moved = run_pgd(promote, flat, eps=radius, norm="l2", steps=steps)
    return (moved.view_as(embedded) - embedded) * is_word


def promote_by_words(
    model: Any, predict: Predict, x: Tensor, y: Tensor, synonyms: Synonyms, n_words: int, eps: float, steps: int
) -> Tensor:
    """Return lists whose wrong documents have some words replaced by synonyms, so that their scores rise.

    As PRADA (Wu et al., 2023): the words whose embeddings have the largest gradients are replaced, one after the other,
    by the synonym nearest to where the ascent moves them, and only where the document's score rises.

    Args:
        model: Holds the ranker.
        predict: Maps lists to scores, [B, C].
        x: Lists, int64 [B, 1 + C, L].
        y: Where the right one is, [B].
        synonyms: Of words.
        n_words: The most words of a document that are replaced.
        eps: Radius of the ascent, as a share of the norm of a document's embeddings.
        steps: Of the ascent.
    """
    ranker = _require_ranker(model)
    first = promote_by_embedding(model, predict, x, y, eps, steps)
    with evaluating(model), torch.no_grad():
        targets = ranker.embed(x[:, 1:]) + first
        others = synonyms.find(x[:, 1:])
        can_change = (others > 0).any(3) & _tell_wrong(x, y).unsqueeze(2)
        importance = _measure_slopes(model, predict, x, ranker).masked_fill(~can_change, -1)
        places = importance.argsort(dim=2, descending=True, stable=True)[:, :, :n_words]
        best = predict(x)
        for i in range(places.shape[2]):
            place = places[:, :, i : i + 1]
            deeper = place.unsqueeze(3)
            offered = others.gather(2, deeper.expand(-1, -1, -1, others.shape[3])).squeeze(2)
            wanted = targets.gather(2, deeper.expand(-1, -1, -1, targets.shape[3]))
            distances = (ranker.embed(offered) - wanted).square().sum(3).masked_fill(offered == 0, torch.inf)
            chosen = offered.gather(2, distances.argmin(2, keepdim=True))
            is_possible = can_change.gather(2, place)
            documents = x[:, 1:].scatter(2, place, torch.where(is_possible, chosen, x[:, 1:].gather(2, place)))
            tried = torch.cat([x[:, :1], documents], dim=1)
            scores = predict(tried)
            rises = scores > best
            x = torch.cat([x[:, :1], torch.where(rises.unsqueeze(2), documents, x[:, 1:])], dim=1)
            best = torch.where(rises, scores, best)
    return x


def _measure_slopes(model: Any, predict: Predict, x: Tensor, ranker: Ranker) -> Tensor:
    """Return the norm of the gradient of each document's score with respect to each of its words, [B, C, L]."""
    moved = torch.zeros_like(ranker.embed(x[:, 1:])).requires_grad_()
    with torch.enable_grad(), moving_documents(model, moved):
        (slope,) = torch.autograd.grad(predict(x).sum(), moved)
    return torch.linalg.vector_norm(slope, dim=3)


def _tell_wrong(x: Tensor, y: Tensor) -> Tensor:
    """Return whether a candidate is not the right one, [B, C]."""
    return torch.arange(x.shape[1] - 1, device=x.device) != y[:, None]


def _require_ranker(model: Any) -> Ranker:
    ranker = find_ranker(model)
    assert ranker is not None, "texts are attacked through a ranker's embeddings"
    return ranker
