"""Synonyms: words in the same company."""

from __future__ import annotations

import torch
from torch import Tensor

from daft_domainbed.functional.synonyms import find_synonyms


def make_documents() -> Tensor:
    """Words 1 and 2 stand among 10 to 13, words 3 and 4 among 20 to 23; 99 comes once."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(200):
        low, twins = (10, (1, 2)) if i % 2 else (20, (3, 4))
        row = low + torch.randint(4, (8,), generator=generator)
        row[3] = twins[(i // 2) % 2]
        rows.append(row)
    documents = torch.stack(rows)
    documents[0, 0] = 99
    documents[1, 6:] = 0
    return documents


def test_words_in_the_same_company_stand_for_one_another() -> None:
    synonyms = find_synonyms(make_documents(), count=3)
    first = synonyms.find(torch.tensor([1, 2, 3, 4]))[:, :1].flatten().tolist()
    assert first[0] == 2 and first[2] == 4
    assert 99 not in synonyms.words and 0 not in synonyms.words
    assert not synonyms.find(torch.tensor([[99, 0, 12345]])).any()


def test_no_word_stands_for_itself_and_far_ones_for_none() -> None:
    synonyms = find_synonyms(make_documents(), count=10, threshold=0.9)
    for word, row in zip(synonyms.words.tolist(), synonyms.neighbours.tolist(), strict=True):
        assert word not in row
    assert not set(synonyms.find(torch.tensor(1)).tolist()) & {3, 4, 20, 21, 22, 23}
    assert not find_synonyms(make_documents(), threshold=1.1).neighbours.any()


def test_the_same_each_time_and_no_global_number_drawn() -> None:
    state = torch.get_rng_state()
    first, again = find_synonyms(make_documents()), find_synonyms(make_documents())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.neighbours, again.neighbours)
