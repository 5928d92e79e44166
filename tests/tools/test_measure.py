"""What is measured of the study's models, against their records and against a second way to compute it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tools import measure_claim

pytestmark = pytest.mark.skipif(find_spec("torchmetrics") is None, reason="needs torchmetrics")


@pytest.fixture
def run(tiny: Any) -> Path:
    flags = {"dataset": "EmojiStyles", "algorithm": "KD", "test_envs": [1], "steps": 2, "checkpoint_freq": 1}
    folder: Path = tiny.train("report/kd/run", {"batch_size": 4}, **flags)
    return folder


def find_chosen(folder: Path) -> dict[str, Any]:
    """Return the record that training-domain validation chooses."""
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    best: dict[str, Any] = max(records, key=lambda record: sum(record[f"env{i}_out_acc"] for i in (0, 2, 3)))
    return best


def test_measures_are_those_of_the_chosen_checkpoint(run: Path, tiny: Any) -> None:
    assert measure_claim.main([str(tiny.root), "kd", "--attacked_trials", "0"]) == 0
    (line,) = (json.loads(text) for text in (tiny.root / "measures.jsonl").read_text().splitlines())
    assert (line["sweep"], line["trial"], line["env"]) == ("kd", 0, 1)
    chosen = find_chosen(run)
    assert line["student"]["held_out"] == pytest.approx(chosen["env1_in_acc"])
    sizes = np.array([157, 157, 155])  # images of the out-splits
    assert line["student"]["trained"] == pytest.approx(sizes @ [chosen[f"env{i}_out_acc"] for i in (0, 2, 3)] / 469)
    recorded = json.loads((run / "results.jsonl").read_text().splitlines()[0])["teacher"]["accuracies"]
    assert line["teacher"]["held_out"] == pytest.approx(recorded["env1_in_acc"])
    assert 0 <= line["student"]["agreement"] <= 1
    assert not {"robust_small", "robust_large"} & line["student"].keys()
    assert measure_claim.main([str(tiny.root), "kd"]) == 0  # it has been
    assert len((tiny.root / "measures.jsonl").read_text().splitlines()) == 1


def test_runs_that_are_not_done_are_not_measured(run: Path, tiny: Any) -> None:
    (run / "done").unlink()
    assert measure_claim.main([str(tiny.root), "kd"]) == 0
    assert (tiny.root / "measures.jsonl").read_text() == ""


class Linear(nn.Module):
    """Two classes, told apart by the mean of the image: logits (s, -s), s = 10 (mean - 1/2)."""

    def predict(self, x: Tensor) -> Tensor:
        s = 10 * (x.flatten(1).mean(dim=1) - 0.5)
        return torch.stack([s, -s], dim=1)


def test_robust_accuracy_by_hand() -> None:
    # An image that is brighter than the middle by m is safe from every radius below m, and from none above.
    margins = torch.tensor([0.5, 1.5, 2.5]) / 255
    x = (0.5 + margins).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    y = torch.zeros(3, dtype=torch.long)
    values, _ = measure_claim.measure(Linear(), (x, y), (x, y), is_attacked=True)
    assert values["held_out"] == 1
    assert values["robust_small"] == pytest.approx(2 / 3)
    assert values["robust_large"] == pytest.approx(1 / 3)


def test_calibration_error_against_numpy() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(200, 3, 4, 4), torch.randint(2, (200,))
    values, logits = measure_claim.measure(Linear(), (x, y), (x, y), is_attacked=False)
    beliefs = logits.softmax(dim=1).numpy()
    confidence, is_right = beliefs.max(axis=1), beliefs.argmax(axis=1) == y.numpy()
    bins = np.ceil(confidence * 15)
    gaps = [
        abs(is_right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)
    ]
    assert values["calibration_error"] == pytest.approx(sum(gaps), abs=1e-5)
