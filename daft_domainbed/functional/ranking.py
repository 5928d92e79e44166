"""Lists of scores: how well they rank, and how far two lists of the same candidates are apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.functional.robust import kl_divergence


def pairwise_divergence(scores: Tensor, others: Tensor) -> Tensor:
    """Return the KL divergence of every pair's preference, summed over the pairs, [B]; the gradient reaches both.

    With p_ij = sigmoid(s_i - s_j): the sum over i < j of KL(p_ij || p'_ij).

    Args:
        scores: Of the candidates, [B, C].
        others: The same candidates' other scores, [B, C].

    Example:
        >>> s = torch.tensor([[1.0, 0.0, 2.0]])
        >>> pairwise_divergence(s, s)
        tensor([0.])
    """
    i, j = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    p, q = scores[:, i] - scores[:, j], others[:, i] - others[:, j]
    preferred = torch.sigmoid(p) * (F.logsigmoid(p) - F.logsigmoid(q))
    return (preferred + torch.sigmoid(-p) * (F.logsigmoid(-p) - F.logsigmoid(-q))).sum(1)


def listmle_loss(scores: Tensor, order: Tensor) -> Tensor:
    """Return the negative log-likelihood of an order under the Plackett-Luce model, [B] (Xia et al., 2008).

    Args:
        scores: Of the candidates, [B, C].
        order: The candidates from first to last, int64 [B, C].

    Example:
        >>> listmle_loss(torch.zeros(1, 3), torch.tensor([[2, 0, 1]])).exp()
        tensor([6.])
    """
    ranked = scores.gather(1, order)
    left = ranked.flip(1).logcumsumexp(1).flip(1)
    return (left - ranked).sum(1)


def listmle_divergence(scores: Tensor, others: Tensor) -> Tensor:
    """Return how much less likely the other scores find the first ones' order than these do themselves, [B].

    It is ListMLE's loss less a constant, so that it is 0 for equal lists; its gradient reaches the others alone. Below
    0 the others are surer of the same order.
    """
    scores = scores.detach()
    order = scores.argsort(dim=1, descending=True, stable=True)
    return listmle_loss(others, order) - listmle_loss(scores, order)


DIVERGENCES = {"kl": kl_divergence, "pairwise": pairwise_divergence, "listmle": listmle_divergence}


def rank_right(scores: Tensor, right: Tensor) -> Tensor:
    """Return the rank of the right candidate, 1 for the first, float [B]; of equal scores it comes last.

    Args:
        scores: Of the candidates, [B, C].
        right: Which one is right, [B].
    """
    own = scores.gather(1, right[:, None])
    rivals = (scores >= own).sum(1) - 1
    return 1.0 + rivals


def reciprocal_ranks(ranks: Tensor, cut: int = 10) -> Tensor:
    """Return 1 / rank, and 0 beyond the cut: their mean is MRR@10.

    Example:
        >>> reciprocal_ranks(torch.tensor([1.0, 4.0, 11.0]))
        tensor([1.0000, 0.2500, 0.0000])
    """
    return torch.where(ranks <= cut, 1 / ranks, 0)


def gains(ranks: Tensor, cut: int = 10) -> Tensor:
    """Return NDCG at the cut where one candidate alone is right: 1 / log2(1 + rank), and 0 beyond.

    Example:
        >>> gains(torch.tensor([1.0, 3.0, 11.0]))
        tensor([1.0000, 0.5000, 0.0000])
    """
    return torch.where(ranks <= cut, 1 / torch.log2(1 + ranks), 0)
