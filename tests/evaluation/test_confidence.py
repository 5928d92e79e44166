from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from daft_domainbed.evaluation import confidence

few_examples = settings(max_examples=25)
seeds = st.integers(0, 10_000)


def draw_logits(seed: int, n: int = 300, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Logits three times too confident about labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator)
    y = torch.multinomial(F.softmax(logits, dim=1), 1, generator=generator).squeeze(1)
    return 3 * logits, y


# --- calibration -------------------------------------------------------------------------------------------------


@few_examples
@given(seed=seeds, n_bins=st.sampled_from([1, 10, 15]), classes=st.integers(2, 9))
def test_calibration_error_is_torchmetrics(seed: int, n_bins: int, classes: int) -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, y = draw_logits(seed, 200, classes)
    theirs = multiclass_calibration_error(F.softmax(logits, dim=1), y, num_classes=classes, n_bins=n_bins, norm="l1")
    assert confidence.measure_reliability(logits, y, n_bins).ece == pytest.approx(theirs.item(), abs=1e-5)


def test_a_reliability_diagram_by_hand() -> None:
    # Confidences 0.6, 0.6 and 1 - 1e-13 in the bins (0.4, 0.6] or above, and (0.8, 1].
    logits = torch.tensor([[math.log(0.59 / 0.41), 0.0], [math.log(0.59 / 0.41), 0.0], [30.0, 0.0]])
    diagram = confidence.measure_reliability(logits, torch.tensor([0, 1, 0]), n_bins=5)
    assert diagram.count == [0, 0, 2, 0, 1]
    assert diagram.accuracy == [0, 0, 0.5, 0, 1]
    assert diagram.confidence == pytest.approx([0, 0, 0.59, 0, 1])
    assert diagram.ece == pytest.approx(0.06)


def test_certainty_falls_into_the_last_bin() -> None:
    assert confidence.measure_reliability(torch.tensor([[1e6, 0.0]]), torch.tensor([0])).count[-1] == 1


@few_examples
@given(seed=seeds)
def test_no_other_temperature_is_better(seed: int) -> None:
    logits, y = draw_logits(seed)
    best = confidence.fit_temperature(logits, y)
    losses = [F.cross_entropy(logits.double() / t, y).item() for t in (best, best * 1.02, best / 1.02)]
    assert losses[0] == min(losses)


def test_temperature_undoes_overconfidence() -> None:
    logits, y = draw_logits(0, n=20_000)
    temperature = confidence.fit_temperature(logits, y)
    assert temperature == pytest.approx(3, rel=0.03)
    before, after = (confidence.measure_reliability(z, y).ece for z in (logits, logits / temperature))
    assert before > 0.2
    assert after < 0.02


@pytest.mark.parametrize("logits", [torch.eye(3) * 5, torch.zeros(3, 3)], ids=["perfect", "constant"])
def test_where_no_temperature_is_best_it_is_finite(logits: Tensor) -> None:
    assert 1e-4 < confidence.fit_temperature(logits, torch.arange(3)) < 1e4


# --- detection ---------------------------------------------------------------------------------------------------


@few_examples
@given(seed=seeds, n=st.integers(1, 60), m=st.integers(1, 60), digits=st.integers(0, 3))
def test_auroc_and_fpr95_are_scikit_learns(seed: int, n: int, m: int, digits: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0**digits  # few digits make ties
    known = ((torch.randn(n, generator=generator) + 1) * scale).round() / scale
    other = (torch.randn(m, generator=generator) * scale).round() / scale
    truth, scores = np.r_[np.ones(n), np.zeros(m)], torch.cat([known, other]).numpy()
    assert confidence.measure_auroc(known, other) == pytest.approx(metrics.roc_auc_score(truth, scores))
    fpr, tpr, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
    assert confidence.measure_fpr95(known, other) == pytest.approx(fpr[np.argmax(tpr >= 0.95)])


def test_scores_rank_as_their_formulas() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [9.0, 0.0, 0.0], [9.0, 9.0, 0.0]])
    scores = confidence.score(logits)
    assert scores["msp"].exp().tolist() == pytest.approx(F.softmax(logits, dim=1).amax(1).tolist(), rel=1e-6)
    assert scores["max_logit"].tolist() == [2, 9, 9]
    assert scores["energy"].tolist() == pytest.approx(logits.exp().sum(1).log().tolist())
