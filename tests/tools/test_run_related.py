"""The tool that runs comparisons in rounds: order, needs, and what a run is asked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from daft_domainbed.methods import STUDENT
from tools.measure_related import count, draw_outside
from tools.run_related import plan

SWEEPS = Path(__file__).parents[2] / "sweeps" / "related"


def test_rounds_hold_out_a_domain_in_every_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    groups = [[SWEEPS / "at" / "sweep.yaml", SWEEPS / "bmtard" / "sweep.yaml"], [SWEEPS / "faal" / "sweep.yaml"]]
    tasks = plan(groups, "cpu")
    jobs = [task.job for task in tasks]
    assert Counter(job.args.algorithm for job in jobs) == {"ERM": 48, "AT": 24, "BMTARD": 24, "FAAL": 24}
    first = [job.args for job in jobs if job.args.algorithm == "AT"][:6]
    assert [(args.trial_seed, args.test_envs) for args in first] == [(t, [t % 4]) for t in range(6)]
    assert [job.args.algorithm for job in jobs[-24:]] == ["FAAL"] * 24  # the next group comes after all of this one

    by_folder = {task.folder: task for task in tasks}
    for task in tasks:
        needs = Counter(by_folder[need].job.args.algorithm for need in task.needs)
        wanted = {"BMTARD": {"ERM": 2, "AT": 1}, "FAAL": {"ERM": 1, "AT": 1}}.get(task.job.args.algorithm, {})
        assert needs == wanted  # of at/ce both rows; of its own store the clean teacher
        for need in task.needs:
            theirs = by_folder[need].job.args
            assert (theirs.trial_seed, theirs.test_envs) == (task.job.args.trial_seed, task.job.args.test_envs)
    assert sum(job.stage == STUDENT for job in jobs) == 96


@pytest.mark.parametrize("name", ["digits", "noise", "smooth"])
def test_outside_images_fill_the_box_and_come_again(name: str) -> None:
    images = draw_outside(name, (3, 32, 32))
    assert images.shape == (256, 3, 32, 32)
    assert 0 <= images.min() < 0.2
    assert 0.8 < images.max() <= 1
    assert torch.equal(images, draw_outside(name, (3, 32, 32)))


def test_counts_are_by_class() -> None:
    y = torch.tensor([0, 2, 2, 1])
    assert count(torch.tensor([True, True, False, False]), y, 4) == [1, 0, 1, 0]
