"""The sweeps of related systems: their pages say how many jobs come of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.sweep import collect_sweep_args
from daft_domainbed.scripts.sweep import read_config

RELATED = Path(__file__).parents[2] / "sweeps" / "related"
FILES = sorted(RELATED.glob("*/*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_page_says_how_many_jobs_there_are(file: Path) -> None:
    given = read_config(file, "launch")
    jobs = make_plan(collect_sweep_args(given))
    stages = Counter(job.stage for job in jobs)
    page = " ".join((file.parent / "README.md").read_text().split())
    teachers = [
        f"{n} {stage.removesuffix('_teacher').upper()} teachers" for stage, n in stages.items() if stage != "student"
    ]
    for said in (f"{len(jobs)} jobs", f"{stages['student']} students", *teachers):
        assert said in page
    assert f"--config sweeps/related/{file.parent.name}/{file.name}" in page
    assert given["output_dir"].startswith(f"runs/related/{file.parent.name}")
