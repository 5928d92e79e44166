"""DocRanking: lists of documents, the same from file to tensor, and apart by package."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from daft_domainbed.embedded import datasets
from daft_domainbed.embedded.documents import (
    N_CANDIDATES,
    N_WORDS,
    DocRanking,
    _read_pairs,
    hash_words,
    list_words,
    load_package,
)
from daft_domainbed.functional.bm25 import Bm25
from daft_domainbed.models.ranker import QUERY_WORDS


@pytest.fixture(scope="module")
def dataset() -> DocRanking:
    return datasets.get_dataset_class("DocRanking")(None, [0], {})


def test_has_enough_pairs_in_four_packages(dataset: DocRanking) -> None:
    assert list(_read_pairs()) == dataset.ENVIRONMENTS
    assert sum(len(env) for env in dataset) >= 2000
    assert datasets.num_environments("DocRanking") == len(dataset) == 4


def test_a_sample_is_a_query_with_its_candidates(dataset: DocRanking) -> None:
    pairs = _read_pairs()["numpy"]
    x, y = dataset[1][7]
    assert (x.shape, x.dtype, y.dtype) == (dataset.input_shape, torch.int64, torch.int64)
    assert x[0].tolist() == hash_words(pairs[7]["query"])
    for place, candidate in enumerate(pairs[7]["candidates"]):
        assert x[1 + place].tolist() == hash_words(pairs[candidate]["text"])
    assert pairs[7]["candidates"][y] == 7


def test_every_list_has_different_documents_of_its_package(dataset: DocRanking) -> None:
    for env in dataset:
        assert env.candidates.shape == (len(env), N_CANDIDATES)
        assert all(len(set(row)) == N_CANDIDATES for row in env.candidates.tolist())
        assert env.candidates.min() >= 0 and env.candidates.max() < len(env)
        assert torch.equal(env.candidates.gather(1, env.places[:, None]).flatten(), torch.arange(len(env)))


def test_the_place_says_nothing(dataset: DocRanking) -> None:
    for env in dataset:
        counts = torch.bincount(env.places, minlength=N_CANDIDATES).float()
        expected = len(env) / N_CANDIDATES
        assert ((counts - expected) ** 2 / expected).sum() < 44  # chi-squared with 19 degrees of freedom, p 0.001


def test_other_candidates_are_those_that_bm25_finds_best(dataset: DocRanking) -> None:
    env = dataset[3]
    bm25 = Bm25(torch.tensor([hash_words(pair["text"]) for pair in _read_pairs()["sklearn"]]))
    everything = env.documents.unsqueeze(0).expand(20, -1, -1)
    scores = bm25.score(env.queries[:20], everything)
    for i in range(20):
        others = [j for j in env.candidates[i].tolist() if j != i]
        left = torch.tensor([j for j in range(len(env)) if j not in others and j != i])
        assert scores[i, others].min() >= scores[i, left].max() - 1e-4


def test_no_document_begins_with_its_query(dataset: DocRanking) -> None:
    for pairs in _read_pairs().values():
        assert not [pair["name"] for pair in pairs if pair["query"] in pair["text"]]
        queries = [tuple(list_words(pair["query"])) for pair in pairs]
        texts = [tuple(list_words(pair["text"])[:N_WORDS]) for pair in pairs]
        assert len(set(queries)) == len(queries) and len(set(texts)) == len(texts)
        assert max(map(len, queries)) <= QUERY_WORDS


def test_a_batch_at_once_equals_its_samples_one_by_one(dataset: DocRanking) -> None:
    indices = torch.tensor([5, 0, 5, 99])
    x, y = dataset[2].fetch(indices)
    samples = [dataset[2][i] for i in indices.tolist()]
    assert torch.equal(x, torch.stack([x for x, _ in samples]))
    assert torch.equal(y, torch.stack([y for _, y in samples]))
    with pytest.raises(IndexError):
        dataset[2][len(dataset[2])]


def test_what_is_held_out_changes_nothing_but_who_may_learn(dataset: DocRanking) -> None:
    other = DocRanking(None, [2, 3], {"data_augmentation": True})
    assert all(
        torch.equal(a.fetch(torch.arange(9))[0], b.fetch(torch.arange(9))[0])
        for a, b in zip(dataset, other, strict=True)
    )


def test_the_file_is_read_once() -> None:
    assert load_package("scipy") is load_package("scipy")


@given(st.text())
def test_any_text_has_a_row_of_hashes(text: str) -> None:
    hashes, words = hash_words(text), list_words(text)
    assert len(hashes) == N_WORDS
    assert hashes[: len(words)] == [zlib.crc32(word.encode()) + 1 for word in words[:N_WORDS]]
    assert not any(hashes[len(words) :])
