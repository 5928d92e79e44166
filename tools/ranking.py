"""What runs on lists of texts are compared by: the measures that their last records hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from daft_domainbed.runtime.layout import read_last_record

DATASET = "DocRanking"


def read_list_measures(folder: Path) -> dict[str, Any] | None:
    """Return the measures of a finished run's last record, or None of a run on images.

    Args:
        folder: Of the run.
    """
    record = read_last_record(folder)
    args = record["args"]
    if args["dataset"] != DATASET:
        return None
    (env,) = args["test_envs"]
    start = f"env{env}_in_"
    measures = {name.removeprefix(start): value for name, value in record.items() if name.startswith(start)}
    return {"algorithm": args["algorithm"], "trial": args["trial_seed"], "env": env} | measures


def read_percent(name: str) -> Callable[[Mapping[str, Any]], float]:
    """Return what reads a share in percent."""
    return lambda measures: 100 * measures[name]


LIST_MEASURES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "MRR@10": read_percent("mrr10"),
    "words: MRR@10": read_percent("words_mrr10"),
    "words: success": read_percent("words_success"),
    "words: ranks gained": lambda measures: measures["words_rank_gain"],
    "embeddings: MRR@10": read_percent("embedding_mrr10"),
    "embeddings: success": read_percent("embedding_success"),
    "embeddings: ranks gained": lambda measures: measures["embedding_rank_gain"],
    "NDCG@10": read_percent("ndcg10"),
    "BM25: MRR@10": read_percent("bm25_mrr10"),
    "BM25 on words: MRR@10": read_percent("words_bm25_mrr10"),
}
