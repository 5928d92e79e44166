"""BM25: how well documents match a query by the words that they share, as a control for what is learnt."""

from __future__ import annotations

import torch
from torch import Tensor


class Bm25:
    """BM25 over a collection (Robertson and Zaragoza, 2009), with Lucene's weights of rare words, which are positive.

    The score of a document is the sum, over the words of the query, of

        log(1 + (N - n + 1/2) / (n + 1/2)) tf / (tf + k1 (1 - b + b length / mean length))

    with n of the N documents having the word, and tf its count in this one.

    Args:
        documents: Hashes of words, int64 [N, L]; 0 is no word.
        k1: How soon further occurrences count no more.
        b: How much a long document's occurrences count less.

    Example:
        >>> bm25 = Bm25(torch.tensor([[5, 6], [5, 7]]))
        >>> bm25.score(torch.tensor([[6]]), torch.tensor([[[5, 6], [5, 7]]]))
        tensor([[0.2773, 0.0000]])
    """

    def __init__(self, documents: Tensor, k1: float = 1.5, b: float = 0.75) -> None:
        self.k1, self.b = k1, b
        self.mean_length = (documents > 0).sum(1).float().mean()
        self.words, indices = documents.unique(return_inverse=True)
        has_word = torch.zeros(len(documents), len(self.words), dtype=torch.bool)
        has_word.scatter_(1, indices, True)
        n = has_word.sum(0)
        self.weights = torch.log1p((len(documents) - n + 0.5) / (n + 0.5))

    def score(self, queries: Tensor, documents: Tensor) -> Tensor:
        """Return scores, [B, C], of each query's documents.

        Args:
            queries: Hashes of words, int64 [B, Q]; words that the collection lacks count nothing.
            documents: The same, [B, C, L].
        """
        rows = torch.searchsorted(self.words, queries.contiguous()).clamp_max(len(self.words) - 1)
        is_known = (self.words[rows] == queries) & (queries > 0)
        weights = self.weights[rows] * is_known
        counts = torch.stack([(documents == word[:, None, None]).sum(2) for word in queries.T], dim=2).float()
        lengths = (documents > 0).sum(2, keepdim=True).float()
        saturation = self.k1 * (1 - self.b + self.b * lengths / self.mean_length)
        scores: Tensor = (weights[:, None] * counts / (counts + saturation)).sum(2)
        return scores
