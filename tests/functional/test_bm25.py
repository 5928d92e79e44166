"""BM25 against the kept package, on the lists of the data set."""

from __future__ import annotations

import warnings

import pytest
import torch

from daft_domainbed.embedded.documents import DocRanking, load_package
from daft_domainbed.functional.bm25 import Bm25


@pytest.mark.parametrize("package", DocRanking.ENVIRONMENTS)
def test_equals_the_kept_package_on_the_same_lists(package: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bm25s = pytest.importorskip("bm25s")
    domain = load_package(package)
    corpus = [[str(word) for word in document if word] for document in domain.documents.tolist()]
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index(corpus, show_progress=False)
    lists, _ = domain.fetch(torch.arange(40))
    scores = Bm25(domain.documents).score(lists[:, 0], lists[:, 1:])
    for i, query in enumerate(lists[:, 0].tolist()):
        known = [str(word) for word in query if str(word) in index.vocab_dict]
        theirs = torch.from_numpy(index.get_scores(known))[domain.candidates[i]]
        torch.testing.assert_close(scores[i], theirs, rtol=1e-5, atol=1e-5)


def test_a_number_worked_by_hand() -> None:
    documents = torch.tensor([[1, 1, 2, 0], [2, 3, 4, 5], [3, 0, 0, 0]])  # lengths 3, 4, 1; the mean is 8/3
    score = Bm25(documents, k1=1.5, b=0.75).score(torch.tensor([[1, 9, 0]]), documents.unsqueeze(0))
    weight = torch.log1p(torch.tensor((3 - 1 + 0.5) / (1 + 0.5)))
    wanted = weight * 2 / (2 + 1.5 * (0.25 + 0.75 * 3 / (8 / 3)))
    torch.testing.assert_close(score, torch.tensor([[wanted, 0.0, 0.0]]))


def test_padding_counts_nothing() -> None:
    documents = torch.tensor([[1, 2, 0, 0], [0, 0, 3, 4]])
    bm25 = Bm25(documents)
    wide = Bm25(torch.cat([documents, torch.zeros_like(documents)], dim=1))
    query = torch.tensor([[2, 4, 0]])
    assert torch.equal(bm25.score(query, documents[None]), wide.score(query, documents[None]))
