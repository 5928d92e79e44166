"""No related method makes more passes a step than it needs, but for a tenth."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.count_passes import CASES, MOST, Case, measure


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{'-'.join(map(str, case.hparams.values()))}")
def test_a_step_makes_the_passes_that_it_needs(case: Case, tmp_path: Path) -> None:
    found = measure(case, tmp_path)
    needed = {"forward": case.forward, "backward": case.backward, "others": case.others}
    assert all(found[name] <= MOST * needed[name] for name in needed), found
    assert all(found[name] >= needed[name] for name in needed), "fewer than it needs: the count, or the need, is wrong"
