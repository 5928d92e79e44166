from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.progress import SweepProgress

ENVIRONMENTS = {"EmojiStyles": ["noto", "twemoji", "openmoji", "contrast"]}


def make_job(stage: str, algorithm: str, test_envs: list[int], hparams_seed: int = 0, trial_seed: int = 0) -> Job:
    args = TrainArgs(
        dataset="EmojiStyles",
        algorithm=algorithm,
        test_envs=test_envs,
        hparams_seed=hparams_seed,
        trial_seed=trial_seed,
    )
    return Job(stage, f"{algorithm}{test_envs}{hparams_seed}{trial_seed}", args)


STUDENTS = [make_job("student", "ERM", [i]) for i in range(4)]
TEACHERS = [make_job("erm_teacher", "ERM", [i]) for i in range(4)]


@pytest.fixture
def make() -> Callable[..., tuple[SweepProgress, io.StringIO]]:
    """Makes the display of a sweep of eight jobs, of which none was done before, and the text that it writes."""

    def build(n_jobs: int = 2, terminal: bool = False) -> tuple[SweepProgress, io.StringIO]:
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=60)
        progress = SweepProgress(STUDENTS + TEACHERS, n_jobs, ENVIRONMENTS, console)
        progress.plan(STUDENTS + TEACHERS)
        return progress, text

    return build


def test_job_is_named_by_stage_domains_trial_and_draw(make: Callable[..., tuple[SweepProgress, io.StringIO]]) -> None:
    progress, _ = make()
    assert progress.describe(TEACHERS[3]) == "ERM teacher, contrast held out, trial 0"
    assert progress.describe(make_job("mine_teacher", "Mine", [1])) == "Mine teacher, twemoji held out, trial 0"
    assert progress.describe(make_job("aft_teacher", "AFT", [0], trial_seed=2)) == "AFT teacher, noto held out, trial 2"
    pair = make_job("student", "DAFT", [0, 2], hparams_seed=5)
    assert progress.describe(pair) == "DAFT student, noto and openmoji held out, trial 0, draw 5"


def test_elsewhere_than_on_a_terminal_each_end_is_one_plain_line(
    make: Callable[..., tuple[SweepProgress, io.StringIO]],
) -> None:
    progress, text = make()
    with progress:
        for job, failure in ((STUDENTS[0], None), (STUDENTS[1], "the loss is nan, at step 3 of a long explanation")):
            progress.start(job)
            progress.advance(job, 1, 10)
            progress.advance(job, 10, 10)
            progress.end(job, failure, 12.4)
        progress.end(STUDENTS[2], "its teacher failed", 0.0)  # never started
    assert text.getvalue().splitlines() == [
        "[1/8] ERM student, noto held out, trial 0: done in 12.4 s",
        "[2/8] ERM student, twemoji held out, trial 0: FAILED: the loss is nan, at step 3 of a long explanation",
        "[3/8] ERM student, openmoji held out, trial 0: FAILED: its teacher failed",
    ]


def test_a_terminal_is_shown_the_jobs_at_work(make: Callable[..., tuple[SweepProgress, io.StringIO]]) -> None:
    progress, text = make(terminal=True)
    with progress:
        progress.start(STUDENTS[0])
        progress.advance(STUDENTS[0], 3, 10)
        progress.bars.refresh()
    assert "ERM student, noto" in text.getvalue()
    assert "3/10" in text.getvalue()


def test_jobs_done_before_are_counted() -> None:
    text = io.StringIO()
    progress = SweepProgress(STUDENTS, 1, ENVIRONMENTS, Console(file=text, width=60))
    progress.plan(STUDENTS[2:])
    progress.plan(STUDENTS[3:])  # one ended in the meantime
    progress.end(STUDENTS[3], None, 5.0)
    assert text.getvalue().startswith("[4/4] ")


def test_time_left_is_each_kinds_mean_times_its_number_over_the_jobs_at_a_time(
    make: Callable[..., tuple[SweepProgress, io.StringIO]],
) -> None:
    progress, _ = make(n_jobs=2)
    progress.end(TEACHERS[0], None, 100.0)
    assert progress.estimate_time_left() == ""  # nothing is known of students yet
    progress.end(TEACHERS[1], None, 140.0)
    progress.end(STUDENTS[0], None, 10.0)
    # 2 teachers of 120 s, 3 students of 10 s: 270 s, two at a time 135 s.
    assert progress.estimate_time_left() == "about 2 min 15 s left"
    progress.end(TEACHERS[2], None, 60.0)
    progress.end(TEACHERS[3], "failed", 1.0)  # says nothing of how long one takes
    progress.end(STUDENTS[1], None, 20.0)
    # 2 students of 15 s, two at a time.
    assert progress.estimate_time_left() == "about 15.0 s left"
    progress.end(STUDENTS[2], None, 15.0)
    progress.end(STUDENTS[3], None, 15.0)
    assert progress.estimate_time_left() == ""


def test_rate_counts_from_the_first_report(
    make: Callable[..., tuple[SweepProgress, io.StringIO]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress, _ = make()
    progress.start(STUDENTS[0])
    now[0] = 107.0  # loading, and for a resumed job all the steps before
    progress.advance(STUDENTS[0], 50, 200)
    now[0] = 112.0
    progress.advance(STUDENTS[0], 90, 200)
    task = progress.bars.tasks[-1]
    assert task.fields["note"] == "8.0 steps/s"  # 40 steps in 5 s
    assert (task.completed, task.total) == (90, 200)


def test_one_cause_is_said_once_and_counted(make: Callable[..., tuple[SweepProgress, io.StringIO]]) -> None:
    progress, text = make()
    with progress:
        for job in STUDENTS:
            progress.start(job)
            progress.end(job, "no such file: a.png", 1.0)
        progress.start(TEACHERS[0])
        progress.end(TEACHERS[0], "the loss is nan", 1.0)
    lines = text.getvalue().splitlines()
    assert [line for line in lines if "no such file" in line] == [
        "[1/8] ERM student, noto held out, trial 0: FAILED: no such file: a.png",
        "4 jobs FAILED, all of them: no such file: a.png",
    ]
    assert sum("the loss is nan" in line for line in lines) == 1


def test_defaults_are_named_where_there_are_draws() -> None:
    jobs = [make_job("student", "ERM", [0]), make_job("student", "ERM", [0], hparams_seed=2)]
    progress = SweepProgress(jobs, 1, ENVIRONMENTS, Console(file=io.StringIO()))
    assert progress.describe(jobs[0]) == "ERM student, noto held out, trial 0, defaults"
    assert progress.describe(jobs[1]) == "ERM student, noto held out, trial 0, draw 2"
