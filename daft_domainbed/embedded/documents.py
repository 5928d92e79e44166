"""DocRanking: which documentation belongs to a summary line? Lists of documents, in the packages they come from."""

from __future__ import annotations

import json
import lzma
import re
import zlib
from collections.abc import Collection
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from daft_domainbed.embedded.domains import MultipleDomainDataset

N_CANDIDATES = 20
N_WORDS = 40  # of a document, and at most of a query
_STOP_WORDS = """
a an and are as at be been but by can could do does each either for from had has have if in into is it its may more
must no not of on only or other s shall should so some such than that the their them then there these they this
those to under up was were when where whether which while who will with would you your
"""


class ListsDomain(Dataset[tuple[Tensor, Tensor]]):
    """Queries, each with its candidates, of which one is right.

    Args:
        queries: Hashes of words, int64 [N, L]; 0 where there is no word.
        documents: The same of the package's documents, [M, L].
        candidates: Which documents a query's list has, int64 [N, C].
        places: Where in its list the right one is, int64 [N].
    """

    def __init__(self, queries: Tensor, documents: Tensor, candidates: Tensor, places: Tensor) -> None:
        self.queries, self.documents, self.candidates, self.places = queries, documents, candidates, places

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.fetch(torch.tensor([index]))
        return x[0], y[0]

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return lists, int64 [B, 1 + C, L], the query before its candidates, and where the right one is, [B]."""
        documents = self.documents[self.candidates[indices]]
        return torch.cat([self.queries[indices].unsqueeze(1), documents], dim=1), self.places[indices]

    raw = fetch


class DocRanking(MultipleDomainDataset):
    """Known-item search in the documentation of four packages: a domain is a package, a class the place in the list.

    The summary line is the query, the text below it the document; the other 19 candidates are those that BM25 finds
    best for the query in the same package. So accuracy is MRR@1. Words are known by their hashes: no vocabulary has
    seen a held-out package.
    """

    ENVIRONMENTS = ["python", "numpy", "scipy", "sklearn"]
    N_STEPS = 120
    N_WORKERS = 0
    INPUT_SHAPE = (1 + N_CANDIDATES, N_WORDS)
    INPUT_SPEC = "tokens"
    SMALL = True
    HPARAMS = {
        "batch_size": (4, lambda random: int(2 ** random.uniform(2, 5))),
        "lr": (2e-3, lambda random: float(10 ** random.uniform(-3.5, -2))),
        "backbone": ("ranker_w32", None),
    }
    num_classes = N_CANDIDATES

    def __init__(self, root: str | None, test_envs: Collection[int], hparams: dict[str, Any]) -> None:
        self.input_shape = self.INPUT_SHAPE
        self.datasets = [load_package(package) for package in self.ENVIRONMENTS]


@cache
def load_package(name: str) -> ListsDomain:
    """Return a package's lists; the file is read once per process."""
    pairs = _read_pairs()[name]
    return ListsDomain(
        torch.tensor([hash_words(pair["query"]) for pair in pairs]),
        torch.tensor([hash_words(pair["text"]) for pair in pairs]),
        torch.tensor([pair["candidates"] for pair in pairs]),
        torch.tensor([pair["candidates"].index(i) for i, pair in enumerate(pairs)]),
    )


@cache
def _read_pairs() -> dict[str, list[dict[str, Any]]]:
    content = lzma.decompress(files("daft_domainbed.embedded.data").joinpath("documents.json.xz").read_bytes())
    packages: dict[str, list[dict[str, Any]]] = json.loads(content)["packages"]
    return packages


def hash_words(text: str) -> list[int]:
    """Return the hashes of a text's first words, as many as a list's row has, with 0 after the last.

    Example:
        >>> hash_words("The arrays")[:2] == [zlib.crc32(b"array") + 1, 0]
        True
    """
    hashes = [zlib.crc32(word.encode()) + 1 for word in list_words(text)[:N_WORDS]]
    return hashes + [0] * (N_WORDS - len(hashes))


@cache
def _list_stop_words() -> frozenset[str]:
    return frozenset(_STOP_WORDS.split())


def list_words(text: str) -> list[str]:
    """Return a text's words in lower case, without stop words, in the singular.

    Example:
        >>> list_words("Return the indices of `x_values`, as a class.")
        ['return', 'indice', 'x', 'value', 'class']
    """
    words = (word for word in re.findall(r"[a-z]+", text.lower()) if word not in _list_stop_words())
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words]
