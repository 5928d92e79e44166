from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from daft_domainbed.evaluation import fidelity

few_examples = settings(max_examples=20)
seeds = st.integers(0, 10_000)


def draw(seed: int, n: int = 40, size: int = 6) -> Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed))


def test_a_student_equal_to_its_teacher() -> None:
    logits, features = draw(0), draw(1, size=9)
    assert fidelity.measure_agreement(logits, logits) == 1
    assert fidelity.measure_kl(logits, logits) == pytest.approx(0, abs=1e-12)
    assert fidelity.measure_cka(features, features) == pytest.approx(1)
    assert fidelity.measure_cosine_correlation(features, features) == pytest.approx(1)


def test_agreement_and_kl_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0], [0.0, 5.0]]), torch.tensor([[math.log(3), 0.0], [5.0, 0.0]])
    assert fidelity.measure_agreement(student, teacher) == 0.5
    # 3/4 log(3/4 : 1/2) + 1/4 log(1/4 : 1/2) for the first one alone.
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert fidelity.measure_kl(student[:1], teacher[:1]) == pytest.approx(expected)


@few_examples
@given(seed=seeds)
def test_cka_is_that_of_centred_kernels(seed: int) -> None:
    x, y = draw(seed).double(), draw(seed + 1, size=3).double()
    centre = torch.eye(40, dtype=torch.float64) - 1 / 40
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    hsic = (k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()
    assert fidelity.measure_cka(x, y) == pytest.approx(hsic.item())


@few_examples
@given(seed=seeds)
def test_cka_ignores_rotation_scale_and_shift(seed: int) -> None:
    x = draw(seed).double()
    rotation = torch.linalg.qr(draw(seed + 1, 6).double()).Q
    assert fidelity.measure_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)


@few_examples
@given(seed=seeds, rows=st.sampled_from([1, 7, 1024]))
def test_cosine_correlation_is_numpys(seed: int, rows: int) -> None:
    x, y = draw(seed), draw(seed, size=6) + draw(seed + 1)
    pairs = np.triu_indices(40, 1)
    cosines = [(F.normalize(z.double(), dim=1) @ F.normalize(z.double(), dim=1).T).numpy()[pairs] for z in (x, y)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "_ROWS", rows)
        assert fidelity.measure_cosine_correlation(x, y) == pytest.approx(np.corrcoef(*cosines)[0, 1])


def test_features_that_tell_nothing_apart_have_no_correlation() -> None:
    assert math.isnan(fidelity.measure_cka(torch.ones(4, 2), draw(0, 4)))
