"""What a record says of ranked lists beside accuracy: how they rank, as they are and under attack, and by BM25."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from daft_domainbed.data.loaders import read_split
from daft_domainbed.data.splits import Data
from daft_domainbed.functional.bm25 import Bm25
from daft_domainbed.functional.ranking import gains, rank_right, reciprocal_ranks
from daft_domainbed.functional.synonyms import find_synonyms
from daft_domainbed.models.ranker import find_ranker, moving_documents
from daft_domainbed.models.ranking_attacks import promote_by_embedding, promote_by_words

N_ATTACKED = 128  # lists of a held-out domain that are attacked
EPS, STEPS, N_WORDS = 0.5, 5, 4  # of the attacks: share of the norm, steps of the ascent, words replaced


class ListMeasures:
    """Measures on the in-splits of held-out domains; no name of theirs is one that model selection counts.

    Every wrong document is promoted against the model that is measured. Under attack the right one is ranked among all
    of them; an attack succeeds where a document, attacked alone, gets a better rank.

    Args:
        data: A data set of lists, split.
        test_envs: The held-out domains.
        device: Where the model computes.
    """

    def __init__(self, data: Data, test_envs: list[int], device: torch.device) -> None:
        self.device = device
        self.lists = {i: _read_whole(data.in_splits[i]) for i in test_envs}
        self.bm25 = {i: Bm25(data.dataset[i].documents) for i in test_envs}
        sources = [env.documents for i, env in enumerate(data.dataset) if i not in test_envs]
        self.synonyms = find_synonyms(torch.cat(sources))

    def measure(self, algorithm: Any, *, is_attacked: bool) -> dict[str, float]:
        """Return the measures by name.

        Args:
            algorithm: In training mode, and left so.
            is_attacked: Whether it is attacked, too; it needs a ranker for that.
        """
        measures: dict[str, float] = {}
        algorithm.eval()
        for i, (x, y) in self.lists.items():
            found = {"": torch.cat([self._predict(algorithm, part) for part in x.split(64)])}
            found["bm25_"] = self.bm25[i].score(x[:, 0], x[:, 1:])
            if is_attacked and find_ranker(algorithm) is not None:
                x, y = x[:N_ATTACKED], y[:N_ATTACKED]
                measures |= {f"env{i}_in_{name}": value for name, value in self._attack(algorithm, i, x, y).items()}
            for name, scores in found.items():
                measures |= {f"env{i}_in_{key}": v for key, v in _sum_up(scores, self.lists[i][1], name).items()}
        algorithm.train()
        return measures

    @torch.no_grad()
    def _predict(self, algorithm: Any, x: Tensor) -> Tensor:
        scores: Tensor = algorithm.predict(x.to(self.device))
        return scores.float().cpu()

    def _attack(self, algorithm: Any, env: int, x: Tensor, y: Tensor) -> dict[str, float]:
        clean = self._predict(algorithm, x)
        x_there, y_there = x.to(self.device), y.to(self.device)
        moved = promote_by_embedding(algorithm, algorithm.predict, x_there, y_there, EPS, STEPS)
        with moving_documents(algorithm, moved):
            by_embedding = self._predict(algorithm, x)
        synonyms = self.synonyms.to(self.device)
        words = promote_by_words(algorithm, algorithm.predict, x_there, y_there, synonyms, N_WORDS, EPS, STEPS).cpu()
        by_words = self._predict(algorithm, words)
        measures = {"words_replaced": (words != x).sum().item() / (len(x) * (x.shape[1] - 2))}
        for name, scores in (("embedding_", by_embedding), ("words_", by_words)):
            measures |= _sum_up(scores, y, name) | _compare(clean, scores, y, name)
        return measures | _sum_up(self.bm25[env].score(words[:, 0], words[:, 1:]), y, "words_bm25_")


def _read_whole(split: Any) -> tuple[Tensor, Tensor]:
    x, y = zip(*read_split(split), strict=True)
    return torch.cat(x), torch.cat(y)


def _sum_up(scores: Tensor, y: Tensor, name: str) -> dict[str, float]:
    ranks = rank_right(scores, y)
    return {f"{name}mrr10": reciprocal_ranks(ranks).mean().item(), f"{name}ndcg10": gains(ranks).mean().item()}


def _compare(clean: Tensor, attacked: Tensor, y: Tensor, name: str) -> dict[str, float]:
    """Return what wrong documents that were not first gain, each attacked by itself among the others as they were."""
    before = 1.0 + (clean.unsqueeze(1) > clean.unsqueeze(2)).sum(2)
    own = torch.eye(clean.shape[1], dtype=torch.bool)
    after = 1.0 + ((clean.unsqueeze(1) > attacked.unsqueeze(2)) & ~own).sum(2)
    can_gain = (before > 1) & (torch.arange(clean.shape[1]) != y[:, None])
    gain = (before - after)[can_gain]
    if not len(gain):
        return {}
    return {f"{name}success": (gain > 0).float().mean().item(), f"{name}rank_gain": gain.mean().item()}
