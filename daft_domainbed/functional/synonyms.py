"""Which words stand for one another: neighbours of words by the company that they keep in a collection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDTH = 48
_ROUNDS = 6  # of the iteration, after which the leading subspace hardly moves
_FEWEST = 5  # occurrences of a word, below which its company is chance
_WINDOW = 4  # words to either side


@dataclass(frozen=True)
class Synonyms:
    """Words, and those that may stand for each.

    Attributes:
        words: Their hashes, ascending, int64 [V].
        neighbours: The nearest first, int64 [V, K]; 0 where there is none.
    """

    words: Tensor
    neighbours: Tensor

    def find(self, words: Tensor) -> Tensor:
        """Return the neighbours of words, [..., K]; a word that is not known has none."""
        rows = torch.searchsorted(self.words, words.contiguous()).clamp_max(len(self.words) - 1)
        is_known = self.words[rows] == words
        return self.neighbours[rows] * is_known.unsqueeze(-1)

    def to(self, device: torch.device) -> Synonyms:
        """Return the same on a device."""
        return Synonyms(self.words.to(device), self.neighbours.to(device))


def find_synonyms(documents: Tensor, count: int = 10, threshold: float = 0.5) -> Synonyms:
    """Find synonyms by vectors of words: positive pointwise mutual information, reduced to its leading directions.

    Levy and Goldberg (2014) show that word2vec factorises such a matrix. Deterministic; draws no global numbers.

    Args:
        documents: Hashes of words, int64 [N, L]; 0 is no word.
        count: The most neighbours of a word.
        threshold: The least cosine of a neighbour.
    """
    words, indices, counts = documents.unique(return_inverse=True, return_counts=True)
    is_kept = (counts >= _FEWEST) & (words > 0)
    new = torch.where(is_kept, is_kept.cumsum(0) - 1, -1)[indices]
    words = words[is_kept]
    size = len(words)
    together = torch.zeros(size, size)
    for shift in range(1, min(_WINDOW, documents.shape[1] - 1) + 1):
        left, right = new[:, :-shift].flatten(), new[:, shift:].flatten()
        is_pair = (left >= 0) & (right >= 0)
        pairs = left[is_pair] * size + right[is_pair]
        together.view(-1).index_add_(0, pairs, torch.ones(len(pairs)))
    together = together + together.T
    alone = together.sum(1)
    total = alone.sum().clamp_min(1)
    information = torch.log((together * total).clamp_min(1e-9) / (alone[:, None] * alone[None]).clamp_min(1e-9))
    information = information.clamp_min(0)
    basis = torch.randn(size, min(_WIDTH, size), generator=torch.Generator().manual_seed(0))
    for _ in range(_ROUNDS):
        basis, _ = torch.linalg.qr(information @ basis)
    vectors = F.normalize(information @ basis, dim=1)
    cosines = (vectors @ vectors.T).fill_diagonal_(-1)
    best, rows = cosines.topk(min(count, size), dim=1)
    return Synonyms(words, torch.where(best >= threshold, words[rows], 0))
