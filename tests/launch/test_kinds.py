from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.kinds import estimate_seconds, name_kind


@pytest.mark.parametrize(
    ("stage", "algorithm", "name"),
    [
        ("student", "ERM", "ERM, PACS"),
        ("erm_teacher", "ERM", "ERM teacher, PACS"),
        ("aft_teacher", "AFT", "AFT teacher, PACS"),
        ("mine_teacher", "Mine", "Mine teacher, PACS"),
        ("evaluation", "Mine", "Mine evaluation, PACS"),
    ],
)
def test_kinds_are_told_apart_by_stage_algorithm_and_data_set(stage: str, algorithm: str, name: str) -> None:
    for seed in range(2):
        assert (
            name_kind(Job(stage, str(seed), TrainArgs("PACS", algorithm, hparams_seed=seed, trial_seed=seed))) == name
        )


@given(st.dictionaries(st.sampled_from("abc"), st.lists(st.floats(0, 1e6), min_size=1), min_size=1))
def test_as_many_jobs_as_are_done_take_as_long_again(took: dict[str, list[float]]) -> None:
    left = {kind: len(seconds) for kind, seconds in took.items()}
    assert estimate_seconds(left, took) == pytest.approx(sum(map(sum, took.values())))
    assert estimate_seconds(left | {"d": 1}, took) is None
    assert estimate_seconds(left | {"d": 0}, took) is not None
    assert estimate_seconds({}, took) == 0
