"""What is measured of teachers, by hand on two classes, and on a store of small ones."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from tools import measure_teachers
from tools.measure_teachers import Beliefs, count_agreement, find_margins, measure


def make(features: list[list[float]], labels: list[int], things: str, head: nn.Linear) -> Beliefs:
    x = torch.tensor(features)
    with torch.no_grad():
        return Beliefs(x, head(x), torch.tensor(labels), tuple(things))


@pytest.fixture
def head() -> nn.Linear:
    """Two classes, told apart by the sign of the first feature."""
    head = nn.Linear(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        head.bias.zero_()
    return head


def test_margins_are_distances(head: nn.Linear) -> None:
    beliefs = make([[3.0, 4.0], [1.0, 0.0], [-2.0, 0.0]], [0, 1, 1], "abc", head)
    mean_norm = (5 + 1 + 2) / 3
    assert find_margins(beliefs, head).tolist() == pytest.approx([3 / mean_norm, -1 / mean_norm, 2 / mean_norm])


def test_agreement_is_over_things_of_both(head: nn.Linear) -> None:
    one = make([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], [0, 0, 1], "abc", head)
    other = make([[2.0, 0.0], [-2.0, 0.0], [5.0, 0.0]], [0, 1, 0], "abz", head)
    assert count_agreement(one, other) == 1 / 2


def test_all_of_it(head: nn.Linear) -> None:
    held_out = make([[1.0, 0.0], [1.0, 0.0]], [0, 1], "ab", head)
    trained = make([[0.0, 1.0]], [0], "a", head)
    found = measure(held_out, [trained], head)
    right = 1 / (1 + math.exp(-2))
    assert found == pytest.approx(
        {
            "accuracy": 50,
            "nll": -(math.log(right) + math.log(1 - right)) / 2,
            "margin": 0,
            "agreement": 100,
            "entropy": math.log(2),
        }
    )


def test_a_store(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    hparams = {"aft_attack": "features", "batch_size": 8}
    run = tiny.train("run", hparams, algorithm="DAFT", dataset="EmojiStyles", steps=2, test_envs=[3])
    store = run.parent / "teachers"
    assert measure_teachers.main([str(store), "--feature_cache", str(tiny.root / "features")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["kind"], line["env"]) for line in lines] == [("AFT", "contrast"), ("ERM", "contrast")]
    (aft,) = store.glob("AFT-*")
    record = json.loads((aft / "results.jsonl").read_text().splitlines()[-1])
    whole = 0.8 * record["env3_in_acc"] + 0.2 * record["env3_out_acc"]
    assert lines[0]["accuracy"] == pytest.approx(100 * whole, abs=0.2)
    assert measure_teachers.main([str(store), "--trial", "7"]) == 0
    assert capsys.readouterr().out == ""
