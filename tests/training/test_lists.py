"""What records say of ranked lists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from daft_domainbed.cli import run_command
from daft_domainbed.training import lists
from daft_domainbed.training.lists import _compare
from tools.ranking import LIST_MEASURES, read_list_measures

FLAGS = {"dataset": "DocRanking", "test_envs": [2], "steps": 2, "checkpoint_freq": 1}


@pytest.fixture
def run(tiny: Any, few_lists: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lists, "N_ATTACKED", 16)  # all of the in-split: clean and attacked lists are the same
    return tiny.train("lists", {"backbone": "ranker_w4", "batch_size": 2}, algorithm="ERM", **FLAGS)


def test_records_hold_the_measures_of_held_out_lists(run: Path, records: Any) -> None:
    first, last = records(run)
    names = {name for name in last if name.startswith("env2_in_")} - {"env2_in_acc"}
    attacked = {f"{kind}_{what}" for kind in ("embedding", "words") for what in ("success", "rank_gain")}
    clean = {f"{kind}{what}" for kind in ("", "bm25_") for what in ("mrr10", "ndcg10")}
    attacked |= {f"{kind}_{what}" for kind in ("embedding", "words", "words_bm25") for what in ("mrr10", "ndcg10")}
    assert names == {f"env2_in_{name}" for name in clean | attacked | {"words_replaced"}}
    assert {f"env2_in_{name}" for name in clean} == {name for name in first if name.startswith("env2_in_")} - {
        "env2_in_acc"
    }
    assert all(0 <= last[name] <= 1 for name in names if not name.endswith(("rank_gain", "replaced")))
    assert last["env2_in_acc"] <= last["env2_in_mrr10"]
    assert last["env2_in_embedding_mrr10"] <= last["env2_in_mrr10"]
    assert first["env2_in_bm25_mrr10"] == last["env2_in_bm25_mrr10"] > 0.5
    assert not [name for name in last if re.fullmatch(r"env(?!2)\d_(in|out)_(?!acc).*", name)]


def test_what_a_column_cannot_tell_apart_is_not_printed(run: Path) -> None:
    printed = (run / "out.txt").read_text()
    assert "env2_in_acc" in printed and "env2_in_mrr1" in printed and "env2_in_bm25" not in printed


def test_the_comparison_reads_them(run: Path, tiny: Any) -> None:
    measures = read_list_measures(run)
    assert measures is not None and (measures["algorithm"], measures["env"]) == ("ERM", 2)
    assert all(isinstance(read(measures), float) for read in LIST_MEASURES.values())
    assert read_list_measures(tiny.train("images")) is None


def test_rankers_are_not_judged_as_models_of_images(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["evaluate"], ["adapt", "--test_env", "2"]):
        assert run_command(command[0], [str(run / "model.pkl"), *command[1:], "--device", "cpu"]) == 2
        assert "ranks the texts of DocRanking: only models of images" in capfd.readouterr().err


def test_gains_of_documents_attacked_alone_worked_by_hand() -> None:
    clean = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    attacked = torch.tensor([[5.0, 6.0, 4.5, 2.5]])
    # The right one is the last. The first cannot gain; the second gains one rank; the third, before the second as that
    # was, gains one. Attacked together the third would have gained nothing.
    assert _compare(clean, attacked, torch.tensor([3]), "a_") == {"a_success": 1.0, "a_rank_gain": 1.0}
    worse: Tensor = torch.tensor([[5.0, 2.5, 3.0, 2.0]])
    assert _compare(clean, worse, torch.tensor([3]), "a_") == {"a_success": 0.0, "a_rank_gain": -0.5}
