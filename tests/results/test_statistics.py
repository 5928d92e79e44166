from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daft_domainbed.results.statistics import mean, standard_error


def test_by_hand():
    # deviations -2, 0, 2: variance 8 / 2 = 4, deviation 2, error 2 / sqrt(3)
    assert mean([1.0, 3.0, 5.0]) == 3.0
    assert standard_error([1.0, 3.0, 5.0]) == pytest.approx(2 / math.sqrt(3))


def test_of_nothing_and_of_one():
    assert mean([]) is None
    assert standard_error([]) is None
    assert standard_error([3.0]) is None


@given(st.lists(st.floats(0, 100), min_size=2, max_size=20))
def test_against_numpy(values):
    assert mean(values) == pytest.approx(np.mean(values))
    assert standard_error(values) == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-9)
