"""A small transformer that ranks documents for a query, as a featurizer and a head that a host accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 8192  # rows that words are hashed to; the first is that of no word
QUERY_WORDS = 16  # so far a query is read
_HEADS = 2
_KERNELS = (0.4, 0.6, 0.8, 1.0)  # cosines at which matches are counted; lower ones are those of any two words
_SCALES = (0.0, 0.0, 0.1, 2.0)  # at first the same word counts, and hardly any other
_SHARPNESS = 0.1  # standard deviation of a kernel
_MIX = 2.0  # logit of a word's own share in its vector, at first


class ListWidth(int):
    """The number of features of a list, n_candidates times those of each, which `Classifier` is asked with.

    Attributes:
        n_candidates: Documents of the list.
    """

    n_candidates: int

    def __new__(cls, n_candidates: int, n_features: int) -> ListWidth:
        """Return their product."""
        width = super().__new__(cls, n_candidates * n_features)
        width.n_candidates = n_candidates
        return width

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]  # for copies; an int's own is one number
        return self.n_candidates, self // self.n_candidates


class Ranker(nn.Module):
    """Soft matches of words in their contexts, counted by kernels (TK, Hofstätter et al., 2020, arXiv 2002.01854).

    Words are embedded by their hashes and mixed with what a transformer layer makes of them, query and document each by
    itself. Every word of the query counts the document's words near four cosines; the counts' logarithms are summed
    over the query, with weights that are learnt. Each candidate has these four features, whatever its place and its
    rivals are. At first it ranks by equal words.

    Args:
        input_shape: (1 + C, L): the words of the query, then of each of C candidates.
        width: Of the embeddings.
    """

    rebuilt = ("n_outputs", "moved")  # nothing that a resumed run would miss

    def __init__(self, input_shape: Sequence[int], width: int) -> None:
        super().__init__()
        n_rows, n_words = input_shape
        self.n_outputs = ListWidth(n_rows - 1, len(_KERNELS))
        self.moved: Tensor | None = None
        self.words = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.places = nn.Parameter(torch.zeros(n_words, width))
        self.context = nn.TransformerEncoderLayer(width, _HEADS, 2 * width, dropout=0.0, batch_first=True)
        self.mix = nn.Parameter(torch.tensor(_MIX))
        self.weigh = nn.Linear(width, 1, bias=False)
        self.scales = nn.Parameter(torch.tensor(_SCALES))

    def forward(self, x: Tensor) -> Tensor:
        """Encode lists of hashes of words, int64 [B, 1 + C, L], into features, [B, C * 4]."""
        queries, documents = x[:, :1, :QUERY_WORDS], x[:, 1:]
        asked, read = self.embed(queries), self.embed(documents)
        if self.moved is not None:
            read = read + self.moved
        cosines = torch.einsum(
            "bqw,bclw->bcql", self._put_in_context(asked, queries).squeeze(1), self._put_in_context(read, documents)
        ).float()
        is_word = (documents > 0).unsqueeze(2)
        counts = [
            torch.log1p((torch.exp((cosines - centre) ** 2 * (-0.5 / _SHARPNESS**2)) * is_word).sum(3))
            for centre in _KERNELS  # one at a time takes the least memory
        ]
        weights = F.softplus(self.weigh(asked)).float().view(len(x), -1) * (queries[:, 0] > 0)
        features = torch.einsum("bcqk,bq->bck", torch.stack(counts, dim=3), weights) * self.scales
        return features.flatten(1)

    def embed(self, words: Tensor) -> Tensor:
        """Return the embeddings of words, [..., width], by their hashes; of no word it is 0."""
        rows = torch.where(words > 0, 1 + words % (VOCABULARY - 1), 0)
        return self.words(rows)

    def _put_in_context(self, embedded: Tensor, words: Tensor) -> Tensor:
        """Return unit vectors, [B, N, L, width], of words mixed with what their text makes of them."""
        flat, is_none = embedded.flatten(0, 1), words.flatten(0, 1) == 0
        in_context = self.context(flat + self.places[: flat.shape[1]], src_key_padding_mask=is_none)
        share = torch.sigmoid(self.mix)
        mixed = share * F.normalize(flat, dim=2) + (1 - share) * F.normalize(in_context, dim=2)
        return F.normalize(mixed, dim=2).view_as(embedded)


class ListHead(nn.Module):
    """A head that scores every candidate of a list alike, from its own features.

    A linear one starts at their sum, so that what matches counts for a document from the beginning.

    Args:
        n_candidates: Of a list.
        head: Maps the features of one, [..., D], to its score, [..., 1].
    """

    def __init__(self, n_candidates: int, head: nn.Module) -> None:
        super().__init__()
        self.n_candidates, self.head = n_candidates, head
        if isinstance(head, nn.Linear):
            nn.init.ones_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return scores, [B, C], for features, [B, C * D]."""
        return self.head(features.view(len(features), self.n_candidates, -1)).squeeze(2)


def build_head(
    build: Callable[[int, int, bool], nn.Module], in_features: int, out_features: int, is_nonlinear: bool = False
) -> nn.Module:
    """Return the host's head; over the features of a list, one of its heads for all candidates."""
    if isinstance(in_features, ListWidth):
        n = in_features.n_candidates
        return ListHead(n, build(in_features // n, 1, is_nonlinear))
    return build(in_features, out_features, is_nonlinear)


def find_ranker(model: Any) -> Ranker | None:
    """Return the ranker in a model, the first of several, or None."""
    return next((module for module in model.modules() if isinstance(module, Ranker)), None)


@contextmanager
def moving_documents(model: nn.Module, by: Tensor | None) -> Iterator[None]:
    """Have a model's rankers see documents whose words' embeddings were moved, [B, C, L, W], inside the block."""
    rankers = [module for module in model.modules() if isinstance(module, Ranker)]
    for ranker in rankers:
        ranker.moved = by
    try:
        yield
    finally:
        for ranker in rankers:
            ranker.moved = None
