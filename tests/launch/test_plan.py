from __future__ import annotations

import json
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed import hparams, plugin
from daft_domainbed.arguments import SweepArgs, TrainArgs, list_differences
from daft_domainbed.embedded.misc import seed_hash
from daft_domainbed.errors import UsageError
from daft_domainbed.host.contract import find_host
from daft_domainbed.launch.domains import list_test_envs
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.plan_file import check_plan, read_jobs, read_sweep_args, write_plan
from daft_domainbed.training.first_network import keep_first_network
from daft_domainbed.training.prepare import prepare

TINY = {"batch_size": 8, "backbone": "resnet8_w2", "teacher_backbone": "resnet8_w4"}


def make_sweep(root: Path, **changes: Any) -> SweepArgs:
    """Debug28 (three environments), every domain held out once, defaults only."""
    sweep = SweepArgs(
        datasets=["Debug28"],
        algorithms=["ERM", "KD", "DAFT"],
        output_dir=str(root),
        n_trials=1,
        n_hparams=1,
        single_test_envs=True,
        steps=40,
        hparams=json.dumps(TINY),
    )
    return replace(sweep, **changes)


def get_hparams(job: Job) -> dict[str, Any]:
    return hparams.parse_json(job.args.hparams)


def count_stages(jobs: list[Job]) -> Counter[str]:
    return Counter(job.stage for job in jobs)


def test_every_held_out_domain_has_its_stages_once(tmp_path: Path) -> None:
    jobs = make_plan(make_sweep(tmp_path))
    assert count_stages(jobs) == {"erm_teacher": 3, "aft_teacher": 3, "student": 9}
    assert len({job.folder for job in jobs}) == 15


def test_teachers_stand_before_those_that_need_them_and_share_their_domains(tmp_path: Path) -> None:
    jobs = make_plan(make_sweep(tmp_path, single_test_envs=False))
    by_folder = {job.folder: job for job in jobs}
    seen: set[str] = set()
    for job in jobs:
        assert seen.issuperset(job.needs)
        seen.add(job.folder)
        teachers = [by_folder[need] for need in job.needs]
        expected = {"ERM": [], "KD": ["ERM"], "AFT": ["ERM"], "DAFT": ["AFT"]}[job.args.algorithm]
        assert [teacher.args.algorithm for teacher in teachers] == expected
        for teacher in teachers:
            assert teacher.folder.startswith(f"teachers/{teacher.args.algorithm}-")
            assert teacher.args.test_envs == job.args.test_envs
            assert teacher.args.trial_seed == job.args.trial_seed
            assert teacher.args.data_seed == job.args.seed  # Debug28's data follow their seed


def test_kd_and_the_finetuned_teacher_start_from_one_erm_teacher(tmp_path: Path) -> None:
    jobs = [job for job in make_plan(make_sweep(tmp_path)) if job.args.test_envs == [1]]
    (kd,) = [job for job in jobs if job.args.algorithm == "KD"]
    (aft,) = [job for job in jobs if job.stage == "aft_teacher"]
    assert kd.needs == aft.needs


def test_pairs_have_teachers_of_their_own(tmp_path: Path) -> None:
    jobs = make_plan(make_sweep(tmp_path, single_test_envs=False))
    assert count_stages(jobs) == {"erm_teacher": 6, "aft_teacher": 6, "student": 18}
    test_envs = [job.args.test_envs for job in jobs if job.stage == "erm_teacher"]
    assert sorted(test_envs) == [[0], [0, 1], [0, 2], [1], [1, 2], [2]]


@pytest.mark.parametrize(
    ("n_envs", "single", "expected"),
    [(2, False, [[0], [1]]), (3, True, [[0], [1], [2]]), (3, False, [[0], [0, 1], [0, 2], [1], [1, 2], [2]])],
)
def test_pairs_leave_something_to_train_on(n_envs: int, single: bool, expected: list[list[int]]) -> None:
    sweep = make_sweep(Path("anywhere"), single_test_envs=single)
    assert list_test_envs(sweep, "abcd"[:n_envs], "Any") == expected


def test_draws_share_erm_teachers_and_adversarial_ones_where_those_agree(tmp_path: Path) -> None:
    jobs = make_plan(make_sweep(tmp_path, n_hparams=6))
    counts = count_stages(jobs)
    assert counts["student"] == 3 * 3 * 6
    assert counts["erm_teacher"] == 3  # no student's draw changes its ERM teacher
    by_folder = {job.folder: job for job in jobs}
    for test_env in range(3):
        finetuned: dict[str, set[str]] = {}
        for job in jobs:
            if job.args.algorithm == "DAFT" and job.args.test_envs == [test_env]:
                (need,) = job.needs
                chosen = {k: v for k, v in get_hparams(by_folder[need]).items() if k.startswith("aft_")}
                finetuned.setdefault(json.dumps(chosen, sort_keys=True), set()).add(need)
        assert all(len(folders) == 1 for folders in finetuned.values())  # equal teachers are one
        assert len(set().union(*finetuned.values())) == len(finetuned) > 1  # different ones are two


def test_asking_for_one_draw_more_keeps_the_others(tmp_path: Path) -> None:
    folders = {job.folder for job in make_plan(make_sweep(tmp_path, n_hparams=2))}
    more = make_plan(make_sweep(tmp_path, n_hparams=3))
    assert folders < {job.folder for job in more}
    last = make_plan(make_sweep(tmp_path, n_hparams=3, n_hparams_from=2))
    assert {job.args.hparams_seed for job in last if job.stage == "student"} == {2}
    assert {job.folder for job in last if job.stage == "student"} == {
        job.folder for job in more if job.args.hparams_seed == 2
    }


def test_trials_may_begin_later(tmp_path: Path) -> None:
    jobs = make_plan(make_sweep(tmp_path, n_trials=3))
    last = make_plan(make_sweep(tmp_path, n_trials=3, n_trials_from=2))
    assert [job for job in jobs if job.args.trial_seed == 2] == last


def test_a_sweep_grows_without_gaps(tmp_path: Path) -> None:
    begun = make_sweep(tmp_path, n_trials=4, n_trials_from=2)
    jobs = make_plan(begun)
    write_plan(begun, jobs)
    (tmp_path / jobs[0].folder).mkdir(parents=True)
    (tmp_path / jobs[0].folder / "results.jsonl").touch()
    for more in ({"n_trials": 6, "n_trials_from": 4}, {"n_trials": 3, "n_trials_from": 1}, {"n_trials": 2}):
        check_plan(make_sweep(tmp_path, **more))
    for gap, says in (({"n_trials": 1}, "0 to 0"), ({"n_trials": 9, "n_trials_from": 5}, "5 to 8")):
        with pytest.raises(UsageError, match=f"holds trials 2 to 3, and {says} would leave a gap"):
            check_plan(make_sweep(tmp_path, **gap))


def test_a_sweep_of_an_older_version_goes_on(tmp_path: Path) -> None:
    jobs = make_plan(make_sweep(tmp_path))
    write_plan(make_sweep(tmp_path), jobs)
    (tmp_path / jobs[0].folder).mkdir(parents=True)
    (tmp_path / jobs[0].folder / "results.jsonl").touch()
    plan = json.loads((tmp_path / "plan.json").read_text())
    for args in (plan["args"], *(job["args"] for job in plan["jobs"])):
        for name in ("n_trials_from", "image_cache"):
            args.pop(name, None)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert read_jobs(tmp_path) == jobs
    write_plan(make_sweep(tmp_path, n_trials=2), make_plan(make_sweep(tmp_path, n_trials=2)))
    assert read_sweep_args(tmp_path)["n_trials_from"] == 0


def test_one_seed_for_all_algorithms_and_stages_of_a_split(tmp_path: Path) -> None:
    for job in make_plan(make_sweep(tmp_path, n_trials=2, n_hparams=2)):
        assert job.args.seed == seed_hash("Debug28", job.args.test_envs, job.args.trial_seed)


def test_folders_depend_on_what_is_run_and_not_on_where(tmp_path: Path) -> None:
    folders = [job.folder for job in make_plan(make_sweep(tmp_path / "a"))]
    elsewhere = make_sweep(tmp_path / "b", device="cpu", data_dir=str(tmp_path))
    assert [job.folder for job in make_plan(elsewhere)] == folders
    for change in ({"steps": 41}, {"holdout_fraction": 0.3}, {"hparams": json.dumps(TINY | {"lr": 0.1})}):
        assert not set(folders) & {job.folder for job in make_plan(make_sweep(tmp_path / "a", **change))}


def test_jobs_write_where_the_plan_says(tmp_path: Path) -> None:
    for job in make_plan(make_sweep(tmp_path)):
        assert Path(job.args.output_dir) == tmp_path / job.folder
        assert Path(job.args.teachers_dir or "") == tmp_path / "teachers"


def test_a_store_outside_the_sweep_is_named_in_full(tmp_path: Path) -> None:
    store = tmp_path / "store"
    jobs = make_plan(make_sweep(tmp_path / "sweep", teachers_dir=str(store)))
    assert {Path(job.folder).parent for job in jobs if job.stage != "student"} == {store}
    inside = {job.folder for job in make_plan(make_sweep(tmp_path / "sweep")) if job.stage == "student"}
    assert {job.folder for job in jobs if job.stage == "student"} == inside


def test_a_given_teacher_is_not_planned(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, algorithms=["KD"], hparams=json.dumps(TINY | {"teacher": "mine.pkl"}))
    jobs = make_plan(sweep)
    assert count_stages(jobs) == {"student": 3}
    assert all(not job.needs for job in jobs)


def test_each_job_is_given_its_own_hyperparameters(tmp_path: Path) -> None:
    user = TINY | {"batch_size": 8, "kd_weight": 0.6, "aft_weight": 0.5, "aft_steps": 7}
    jobs = make_plan(make_sweep(tmp_path, hparams=json.dumps(user)))
    known = {(job.stage, job.args.algorithm): get_hparams(job) for job in jobs}
    assert known["student", "ERM"] == {"batch_size": 8, "backbone": "resnet8_w2"}
    assert known["student", "KD"] == {name: value for name, value in user.items() if not name.startswith("aft_")}
    assert known["student", "DAFT"] == user
    erm = known["erm_teacher", "ERM"]
    assert (erm["batch_size"], erm["backbone"]) == (8, "resnet8_w4")
    assert not [name for name in erm if name.startswith(("kd_", "aft_", "teacher"))]
    aft = known["aft_teacher", "AFT"]
    assert (aft["batch_size"], aft["aft_weight"], aft["teacher_backbone"]) == (8, 0.5, "resnet8_w4")
    assert not [name for name in aft if name.startswith("kd_")]
    assert {job.args.steps for job in jobs if job.stage == "aft_teacher"} == {7}


def test_adversarial_finetuning_takes_a_quarter_of_the_steps_unless_told(tmp_path: Path) -> None:
    jobs = make_plan(make_sweep(tmp_path))
    steps = {job.stage: job.args.steps for job in jobs}
    assert steps == {"erm_teacher": 40, "aft_teacher": 10, "student": 40}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithms": ["ERM", "DATF"]}, "DATF.*Did you mean 'DAFT'"),
        ({"datasets": ["Debug82"]}, "Debug82.*Did you mean 'Debug28'"),
        ({"hparams": '{"kd_wieght": 1}'}, "kd_wieght.*Did you mean 'kd_weight'"),
        ({"algorithms": ["ERM"], "hparams": '{"kd_weight": 0.5}'}, "no hyperparameter 'kd_weight' of ERM"),
        ({"algorithms": ["ERM"], "hparams": '{"lr": -1}'}, "lr is -1: it must be a number above 0"),
        ({"hparams": '{"aft_weight": 2}'}, "aft_weight is 2: it must be"),
    ],
)
def test_what_no_job_could_run_is_refused_before_any_does(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(make_sweep(tmp_path, **changes))


# --- the plan's file -------------------------------------------------------------------------------------------------


def store(sweep: SweepArgs) -> dict[str, Any]:
    jobs = make_plan(sweep)
    write_plan(sweep, jobs)
    begun = Path(sweep.output_dir, jobs[0].folder)  # a plan of which nothing came may be replaced
    begun.mkdir(parents=True, exist_ok=True)
    (begun / "results.jsonl").touch()
    plan: dict[str, Any] = json.loads((Path(sweep.output_dir) / "plan.json").read_text())
    return plan


def test_stored_plan_says_what_the_sweep_consists_of(tmp_path: Path) -> None:
    plan = store(make_sweep(tmp_path, device="cpu"))
    assert plan["schema"] == 2
    assert plan["environments"] == {"Debug28": ["0", "1", "2"]}
    assert plan["args"]["algorithms"] == ["ERM", "KD", "DAFT"]
    assert not {"output_dir", "data_dir", "teachers_dir", "image_cache", "device"} & plan["args"].keys()
    jobs = make_plan(make_sweep(tmp_path, device="cpu"))
    assert [(job["stage"], job["folder"], job["needs"]) for job in plan["jobs"]] == [
        (job.stage, job.folder, job.needs) for job in jobs
    ]
    assert plan["jobs"][-1]["args"]["hparams"] == jobs[-1].args.hparams


@pytest.mark.parametrize(
    "growth",
    [{"n_trials": 2}, {"n_hparams": 2}, {"algorithms": ["AFT"]}, {"datasets": ["ColoredDigits"]}],
    ids=lambda growth: next(iter(growth)),
)
def test_a_sweep_may_grow_and_keeps_its_jobs(tmp_path: Path, growth: dict[str, Any]) -> None:
    before = store(make_sweep(tmp_path))
    after = store(make_sweep(tmp_path, **growth))
    assert {job["folder"] for job in before["jobs"]} < {job["folder"] for job in after["jobs"]}
    assert set(before["args"]["algorithms"]) <= set(after["args"]["algorithms"])
    assert before["environments"].items() <= after["environments"].items()
    # Asking for the smaller one again forgets nothing.
    again = store(make_sweep(tmp_path))
    assert {job["folder"] for job in again["jobs"]} == {job["folder"] for job in after["jobs"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 41}, "steps is 40 there and 41 here"),
        ({"single_test_envs": False}, "single_test_envs is True there and False here"),
        ({"hparams": json.dumps({"batch_size": 8, "lr": 0.1})}, "hparams is .* there and .* here"),
        ({"precision": "bf16"}, "precision is fp32 there and bf16 here"),
    ],
)
def test_another_sweep_is_refused_in_its_folder(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    before = store(make_sweep(tmp_path))
    with pytest.raises(UsageError, match=f"{tmp_path} holds a sweep with other arguments .{message}"):
        store(make_sweep(tmp_path, **change))
    assert json.loads((tmp_path / "plan.json").read_text()) == before


def test_a_draw_that_the_data_cannot_serve_is_refused_before_anything_is_launched(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, n_hparams=20, algorithms=["ERM"], hparams=None)  # 13 images, batches to 2**9
    with pytest.raises(UsageError, match=r"batch_size is \d+( \(hparams_seed \d+ of ERM\))?, .* add --cap_batch_size"):
        make_plan(sweep)
    assert count_stages(make_plan(replace(sweep, cap_batch_size=True))) == {"student": 60}


@pytest.mark.parametrize("file", [None, "<stdin>"])
def test_an_algorithm_that_no_job_would_find_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str | None
) -> None:
    """As one of a notebook, of `python -c` or of standard input, which have no file."""
    mine = type("Mine", (), {"update": lambda self, batches, unlabeled=None: {"loss": 0.0}, "__module__": "__main__"})
    main = types.ModuleType("__main__")
    main.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", main)
    plugin.add_algorithm("Mine", mine)
    try:
        with pytest.raises(UsageError, match="Mine was added where no job of a sweep finds it .*: put its class"):
            make_plan(make_sweep(tmp_path, algorithms=["KD", "Mine"]))
        assert len(make_plan(make_sweep(tmp_path, algorithms=["KD"]))) == 6
    finally:
        plugin.unregister(find_host())


def test_a_moved_sweep_is_the_same_sweep(tmp_path: Path) -> None:
    before = store(make_sweep(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    after = store(make_sweep(tmp_path / "b", device="cpu"))
    assert [job["folder"] for job in after["jobs"]] == [job["folder"] for job in before["jobs"]]


def test_broken_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"schema": 1, "jo')
    with pytest.raises(UsageError, match="plan.json is no plan of a sweep .*: delete it"):
        store(make_sweep(tmp_path))


def test_a_plan_of_which_nothing_came_is_replaced(tmp_path: Path) -> None:
    write_plan(sweep := make_sweep(tmp_path), make_plan(sweep))
    write_plan(sweep := make_sweep(tmp_path, steps=41), make_plan(sweep))
    assert json.loads((tmp_path / "plan.json").read_text())["args"]["steps"] == 41


class TestSweepOfBefore:
    """Planned when students of small images of one's own had the host's network, it goes on with that."""

    @pytest.fixture
    def begun(self, tmp_path: Path) -> SweepArgs:
        sweep = make_sweep(tmp_path / "sweep", datasets=["ColoredDigits"], hparams='{"batch_size": 8}')
        write_plan(sweep, make_plan(sweep))
        path = tmp_path / "sweep" / "plan.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
        first = next(job for job in read_jobs(tmp_path / "sweep") if job.stage == "student")
        (tmp_path / "sweep" / first.folder).mkdir()
        (tmp_path / "sweep" / first.folder / "results.jsonl").write_text("")
        return sweep

    def test_its_students_keep_their_network(self, begun: SweepArgs, tmp_path: Path) -> None:
        assert check_plan(begun)
        more = replace(begun, n_trials=2)
        jobs = make_plan(more, is_of_before=True)
        write_plan(more, jobs)
        assert check_plan(more)
        for job in read_jobs(tmp_path / "sweep"):
            expected = "default" if job.stage == "student" else "resnet8_w32"
            assert prepare(job.args).hparams.get("backbone", expected) == expected
        now = make_plan(more)
        assert [(job.folder, job.needs) for job in jobs] == [(job.folder, job.needs) for job in now]
        assert {prepare(job.args).hparams["backbone"] for job in now if job.stage == "student"} == {"resnet8_w8"}
        before, after = (next(job.args for job in plan if job.stage == "student") for plan in (now, jobs))
        assert list_differences(vars(before), after) == []  # so that what was interrupted goes on

    def test_what_was_never_begun_is_planned_anew(self, begun: SweepArgs, tmp_path: Path) -> None:
        for path in (tmp_path / "sweep").glob("*/results.jsonl"):
            path.unlink()
        assert not check_plan(begun)

    def test_a_network_that_was_given_stays(self) -> None:
        for given in ({"backbone": "resnet18"}, {"ERM": {"backbone": "resnet18"}}):
            args = TrainArgs("ColoredDigits", "ERM", hparams=json.dumps(given))
            assert keep_first_network(args) == args
        others = ("EmojiStyles", "ERM", None), ("folder:a", "ERM", '{"input_size": 48}'), ("ColoredDigits", "AFT", None)
        for dataset, algorithm, text in others:
            args = TrainArgs(dataset, algorithm, hparams=text)
            assert keep_first_network(args) == args
        folder = TrainArgs("folder:a", "ERM", hparams='{"input_size": 32}')
        assert json.loads(keep_first_network(folder).hparams or "")["ERM"] == {"backbone": "default"}


def test_number_of_evaluations_sets_the_interval(tmp_path: Path) -> None:
    jobs = make_plan(make_sweep(tmp_path, n_checkpoints=3))
    assert {job.args.checkpoint_freq for job in jobs if job.stage == "student"} == {14}  # of 40 steps: 0, 14, 28, 39
    assert {job.args.checkpoint_freq for job in jobs if job.stage != "student"} == {None}
    with pytest.raises(UsageError, match="--n_checkpoints and --checkpoint_freq both say when to evaluate"):
        make_plan(make_sweep(tmp_path, n_checkpoints=3, checkpoint_freq=5))
    own = make_plan(make_sweep(tmp_path, datasets=["EmojiStyles"], steps=None, n_checkpoints=4))
    assert {job.args.checkpoint_freq for job in own if job.stage == "student"} == {
        100
    }  # of the 400 steps of the data set


def test_small_images_of_ones_own_have_a_small_student(image_folder: Path) -> None:
    for side, student in (
        (16, "resnet8_w8"),
        (28, "resnet8_w8"),
        (32, "resnet8_w8"),
        (64, "resnet8_w8"),
        (65, "default"),
    ):
        user = json.dumps({"input_size": side, "batch_size": 4})
        hparams = prepare(TrainArgs(f"folder:{image_folder}", "KD", hparams=user)).hparams
        assert hparams["backbone"] == student
        assert hparams["teacher_backbone"] == ("resnet8_w32" if side <= 64 else "resnet50")
    assert prepare(TrainArgs("ColoredDigits", "KD")).hparams["backbone"] == "resnet8_w8"
    for own in ("RotatedMNIST", "ColoredMNIST", "Debug28"):  # DomainBed's own are as DomainBed has them
        assert prepare(TrainArgs(own, "KD")).hparams["backbone"] == "default"
