"""What was asked for is what tables show: some domains, sets of domains, single sources; and several sweeps as one."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from daft_domainbed.cli import run_command
from daft_domainbed.results.asked import find_asked, guess_kind
from daft_domainbed.results.checklist import FORMATS as CHECKLIST_FORMATS
from daft_domainbed.results.checklist import build_checklist
from daft_domainbed.results.comparison import compare
from daft_domainbed.results.comparison_formats import FORMATS as COMPARISON_FORMATS
from daft_domainbed.results.draws import list_chosen
from daft_domainbed.results.figures import write_figures
from daft_domainbed.results.formats import FORMATS, to_json
from daft_domainbed.results.report import render
from daft_domainbed.results.robustness import FORMATS as ROBUSTNESS_FORMATS
from daft_domainbed.results.robustness import build_robustness
from daft_domainbed.results.settings import describe_settings, read_given
from daft_domainbed.results.sweeps import read_sweep, read_sweeps
from daft_domainbed.results.tables import build_results
from tests.results.conftest import SweepMaker, fill_full_sweep, find_row, level, print_as, read_json
from tests.results.test_robustness import write_evaluation

DOMAINS = ("red", "green", "blue", "gray")


def make(root, environments=DOMAINS):
    return SweepMaker(root, environments)


def accs(*percents):
    """A checkpoint with these accuracies on the in-splits."""
    return {10: [(percent / 100, 0.5) for percent in percents]}


def run(sweep, test_envs, values, algorithm="ERM", **args):
    """Write a run that was given arguments, hyperparameters among them, as text."""
    folder = sweep.plan(algorithm, test_envs, **args)
    sweep.write_run(folder, sweep.jobs[-1]["args"], values, first={"environments": sweep.environments})


def get_table(data, selection="training-domain"):
    (table,) = [table for table in data["tables"] if table["selection"] == selection]
    return table


def get_means(row):
    return [cell["mean"] and round(cell["mean"], 6) for cell in row["cells"]]


def test_averages_are_over_the_domains_that_were_asked_for(tmp_path):
    sweep = make(tmp_path / "s")
    sweep.run("ERM", [0], accs(10, 99, 99, 99))
    sweep.run("ERM", [1], accs(99, 20, 99, 99))
    data = read_json(sweep.write_plan(test_envs=["red", "1"], algorithms=["ERM"]))
    table = get_table(data)
    assert (table["kind"], table["held_out"]) == ("leave-out", ["red", "green"])
    row = find_row(data, "training-domain", "ERM")
    assert (get_means(row), row["average"]) == ([10, 20, None, None], 15)
    text = print_as("text", sweep.root)
    assert "Average: over red, green, the domains held out." in " ".join(text.split())
    assert "[1]" not in text  # nothing is missing
    assert "leave-one-domain-out cross-validation needs runs with every pair" in text


def test_domains_that_are_held_out_together_say_so(tmp_path):
    sweep = make(tmp_path / "s")
    run(sweep, [0, 1], accs(10, 20, 99, 99))
    run(sweep, [2], accs(99, 99, 30, 99))
    planned = read_json(sweep.write_plan(test_envs=["0,1", "blue"], algorithms=["ERM"]))
    (sweep.root / "plan.json").unlink()
    for data in (planned, read_json(sweep.root)):  # runs that were gathered in a folder are shown by the same rules
        table, row = get_table(data), find_row(data, "training-domain", "ERM")
        assert (table["kind"], sorted(table["held_out"])) == ("leave-out", ["blue", "green", "red"])
        assert (get_means(row), row["average"]) == ([10, 20, 30, None], 20)
        assert find_row(data, "oracle", "ERM")["average"] == 20
    text = print_as("text", sweep.root)
    assert "[1] ERM on red: held out together with green." in text
    assert "[2] ERM on green: held out together with red." in text


def test_single_sources_have_rows_and_means_of_their_own(tmp_path):
    sweep = make(tmp_path / "s", ("red", "green", "blue"))
    for source, values in enumerate([(99, 10, 20), (30, 99, 40), (50, 60, 99)]):
        run(sweep, [env for env in range(3) if env != source], accs(*values))
    planned = read_json(sweep.write_plan(single_source=True, algorithms=["ERM"]))
    (sweep.root / "plan.json").unlink()
    for data in (planned, read_json(sweep.root)):
        table = get_table(data)
        assert (table["kind"], table["held_out"]) == ("single-source", ["red", "green", "blue"])
        assert [(row["source"], get_means(row), row["average"]) for row in table["rows"]] == [
            ("red", [None, 10, 20], 15),
            ("green", [30, None, 40], 35),
            ("blue", [50, 60, None], 55),
        ]
        (mean,) = table["target_average"]
        assert (mean["algorithm"], get_means(mean), mean["average"]) == ("ERM", [40, 35, 30], 35)
    text = " ".join(print_as("text", sweep.root).split())
    assert "ERM from red – 10.0 20.0 15.0" in text
    assert "ERM from every other domain, averaged 40.0 35.0 30.0 35.0" in text
    assert "[1]" not in text
    for name in FORMATS:
        assert print_as(name, sweep.root)
    assert "ERM from green" in render(build_results(read_sweep(sweep.root)))


def test_pairs_of_three_domains_are_validation_beside_single_ones(tmp_path):
    sweep = make(tmp_path / "s", ("red", "green", "blue"))
    for test_envs in ([0], [1], [2], [0, 1], [0, 2], [1, 2]):
        sweep.run("ERM", test_envs, accs(10, 20, 30))
    data = read_json(sweep.root)
    assert {table["kind"] for table in data["tables"]} == {"leave-out"}
    assert get_means(find_row(data, "leave-one-domain-out", "ERM")) == [10, 20, 30]
    assert guess_kind((0, 1), 3, [(0,)]) == "leave-out"
    assert guess_kind((0, 1), 3, [(0, 2)]) == "single-source"
    assert guess_kind((0,), 2, []) == "leave-out"
    assert find_asked("leave-out", [(0,), (0, 1), (0, 2), (0, 3)], 4).has_pairs
    assert not find_asked("leave-out", [(0,), (0, 1)], 4).has_pairs


def test_comparisons_are_over_what_was_asked_for(tmp_path):
    sweep = make(tmp_path / "s", ("red", "green", "blue"))
    for trial in (0, 1):
        for source in range(3):
            held_out = [env for env in range(3) if env != source]
            sweep.run("ERM", held_out, accs(10, 20, 30), trial_seed=trial)
            sweep.run("KD", held_out, accs(11, 22, 33 + trial), trial_seed=trial)
    (entry,) = compare(build_results(read_sweep(sweep.write_plan(single_source=True))), "KD", ["ERM"])
    assert entry.n == 2
    assert entry.gain == pytest.approx((1 + 2 + 3.5) / 3)
    assert entry.gains == pytest.approx({"green": 2, "blue": 3.5, "red": 1})


# --- several sweeps --------------------------------------------------------------------------------------------------


def test_trials_of_two_sweeps_are_those_of_one(tmp_path):
    whole = make(tmp_path / "whole", ("red", "green", "blue"))
    fill_full_sweep(whole, trials=4)
    for name, trials in (("first", (0, 1)), ("second", (2, 3))):
        part = make(tmp_path / name, whole.environments)
        for job in whole.jobs:
            if job["args"]["trial_seed"] in trials:
                shutil.copytree(whole.root / job["folder"], part.root / job["folder"])
                part.jobs.append(job)
        part.write_plan(datasets=["Toy"], algorithms=["ERM", "KD", "DAFT"])
    both = read_sweeps([tmp_path / "first", tmp_path / "second"])
    assert to_json(build_results(both)) == read_json(whole.root)
    text = FORMATS["text"](build_results(both))
    assert text == print_as("text", whole.root)
    # A copy of one of them, under another name, adds nothing but notes.
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    three = read_sweeps([tmp_path / "first", tmp_path / "second", tmp_path / "copy"])
    assert to_json(build_results(three)) == read_json(whole.root)
    assert {note.why.split(" (")[0].partition(" of ")[0] for note in three.notes} == {"a copy"}
    # The folders of one put into the other, whose plan does not know them.
    shutil.copytree(tmp_path / "second", tmp_path / "first", dirs_exist_ok=True, ignore=lambda *_: ["plan.json"])
    merged = read_sweep(tmp_path / "first")
    assert to_json(build_results(merged)) == read_json(whole.root)
    assert [note.why for note in merged.notes] == ["not in plan.json; counted, as where folders were merged"]


def test_a_teacher_is_that_of_its_students_own_folder(tmp_path):
    for name, percent in (("a", 60), ("b", 70)):
        sweep = make(tmp_path / name, ("red", "green"))
        teacher = sweep.run("ERM", [0], accs(percent, 99), "erm_teacher", hparams={"backbone": name})
        first = {"teacher": {"algorithm": "ERM", "path": f"../{teacher}/model.pkl"}}
        sweep.run("KD", [0], accs(10, 20), trial_seed=int(name == "b"), first=first)
        sweep.write_plan(algorithms=["KD"], test_envs=["0"])
    rows = get_table(to_json(build_results(read_sweeps([tmp_path / "a", tmp_path / "b"]))))["rows"]
    found = [(row["setting"], get_means(row)[0]) for row in rows if row["role"] == "teacher"]
    assert found == [("backbone a", 60), ("backbone b", 70)]


def test_what_is_said_of_settings_is_said_of_each_sweep(tmp_path):
    for name, hparams in (("a", '{"lr": 0.1}'), ("b", '{"lr": 0.2}')):
        sweep = make(tmp_path / name, ("red", "green"))
        for env in range(2):
            run(sweep, [env], accs(10, 20), hparams=hparams)
        settings = [{"dataset": "Toy", "algorithm": "ERM", "hparams_seed": 3, "hparams": {"lr": 0.3}}]
        chosen = {"choose": "per-algorithm", "from": "../search", "settings": settings} if name == "b" else None
        sweep.write_plan(algorithms=["ERM"], hparams=hparams, chosen=chosen)
    results = build_results(read_sweeps([tmp_path / "a", tmp_path / "b"]))
    checklist = build_checklist(results)
    first, second = (entry.algorithm for entry in checklist.entries)
    assert first == "ERM (lr 0.1, chosen not given)"
    assert re.fullmatch(r"ERM \(lr 0\.2, chosen by rerun, per-algorithm \w{8}\)", second)
    assert [entry.n_trials for entry in checklist.entries] == [1, 1]
    assert 'set by hand: {"lr": 0.1} and {"lr": 0.2}' in checklist.notes
    assert list_chosen(results.sweep) == ["  ERM: draw 3 of trial None in ../search (lr 0.3)"]


def test_a_teacher_whose_accuracy_nobody_recorded_is_said_to_have_none(tmp_path):
    sweep = make(tmp_path / "s", ("red", "green"))
    sweep.run("KD", [0], accs(10, 20), first={"teacher": {"algorithm": "ERM", "path": "../mine/model.pkl"}})
    text = print_as("text", sweep.root)
    assert "ERM teacher on env0: its accuracy is not recorded (trial 0)." in " ".join(text.split())


@pytest.mark.parametrize("name", ["text", "markdown", "latex", "csv", "json"])
def test_marks_go_with_every_table(tmp_path, name):
    sweep = make(tmp_path / "s", ("red", "green"))
    mark = "weights of unknown origin (mine.pt)"
    for trial in range(2):
        for env in range(2):
            first = {"origins": {"weights": mark}}
            folder = sweep.run("KD", [env], accs(10, 20), trial_seed=trial, first=first)
            write_evaluation(sweep.root / folder, env, 50)
            sweep.run("ERM", [env], accs(10, 20), trial_seed=trial)
    sweep.write_plan(algorithms=["ERM", "KD"])
    results = build_results(read_sweep(sweep.root))
    assert mark in FORMATS[name](results).replace("\n", " ").replace("    ", "")
    assert mark in COMPARISON_FORMATS[name](compare(results, "KD", ["ERM"]))
    assert mark in CHECKLIST_FORMATS[name](build_checklist(results)) or name == "csv"  # which has no notes
    if name != "latex":
        assert mark in ROBUSTNESS_FORMATS[name](build_robustness(results.sweep)[0])


def test_what_is_missing_here_and_done_there_is_done(tmp_path):
    for name, is_done in (("a", False), ("b", True)):
        sweep = make(tmp_path / name, ("red", "green"))
        for env in range(2):
            sweep.run("ERM", [env], accs(10, 20), is_done=is_done or not env)
        sweep.write_plan(algorithms=["ERM"])
    assert len(read_sweep(tmp_path / "a").missing) == 1
    assert read_sweeps([tmp_path / "a", tmp_path / "b"]).missing == []


def test_what_was_given_otherwise_is_a_row_of_its_own(tmp_path):
    for name, changes in (
        ("a", {}),
        ("b", {"steps": 21}),
        ("c", {"hparams": '{"lr": 0.1}'}),
        ("d", {"device": "cuda"}),
    ):
        sweep = make(tmp_path / name, ("red", "green"))
        for env in range(2):
            run(sweep, [env], accs(10, 20), trial_seed=int(name == "d"), **changes)
        sweep.write_plan(algorithms=["ERM"])
    results = build_results(read_sweeps([tmp_path / name for name in "abcd"]))
    rows = get_table(to_json(results))["rows"]
    assert [(row["algorithm"], row["setting"], row["cells"][0]["n"]) for row in rows] == [
        ("ERM", "steps 11, lr not given", 2),
        ("ERM", "steps 21, lr not given", 1),
        ("ERM", "steps 11, lr 0.1", 1),
    ]
    assert "ERM (steps 21, lr not given)" in FORMATS["text"](results)


def test_other_networks_are_a_row_of_their_own_within_one_folder(tmp_path):
    sweep = make(tmp_path / "s", ("red", "green"))
    for backbone in ("resnet8_w2", "resnet8_w4"):
        for env in range(2):
            sweep.run("ERM", [env], accs(10, 20), hparams={"lr": 0.1, "backbone": backbone})
    rows = get_table(read_json(sweep.root))["rows"]
    assert [row["setting"] for row in rows] == ["backbone resnet8_w2", "backbone resnet8_w4"]


def test_several_commits_are_a_footnote(tmp_path):
    sweep = make(tmp_path / "s", ("red", "green"))
    for env, commit in enumerate(("aaaaaaaaaa", "bbbbbbbbbb")):
        sweep.run("ERM", [env], accs(10, 20), first={"machine": {"commit": commit}})
    assert "[1] ERM: runs of several commits (aaaaaaaa, bbbbbbbb)." in print_as("text", sweep.root)


def test_what_a_rerun_chose_is_one_row_in_it_and_another_beside_its_search(tmp_path):
    search, rerun = (make(tmp_path / name, ("red", "green")) for name in ("search", "rerun"))
    settings = []
    for env in range(2):
        search.run("ERM", [env], accs(10, 20))
        settings.append({"dataset": "Toy", "algorithm": "ERM", "test_env": env, "hparams": {"lr": 0.1 * (env + 1)}})
        run(rerun, [env], accs(30, 40), trial_seed=1, hparams=json.dumps({"ERM": {"lr": 0.1 * (env + 1)}}))
    search.write_plan(algorithms=["ERM"])
    rerun.write_plan(algorithms=["ERM"], chosen={"choose": "per-environment", "settings": settings})
    (row,) = get_table(read_json(rerun.root))["rows"]
    assert (get_means(row), "setting" in row) == ([30, 40], False)
    rows = get_table(to_json(build_results(read_sweeps([search.root, rerun.root]))))["rows"]
    assert rows[0]["setting"] == "chosen not given"
    assert rows[1]["setting"].startswith("chosen by rerun, per-environment ")


def test_what_two_reruns_chose_is_two_rows(tmp_path):
    for name, lr, trial in (("a", 0.1, 1), ("b", 0.7, 2)):
        rerun = make(tmp_path / name, ("red", "green"))
        settings = [{"dataset": "Toy", "algorithm": "ERM", "test_env": None, "hparams": {"lr": lr}}]
        for env in range(2):
            run(rerun, [env], accs(100 * lr, 100 * lr), trial_seed=trial, hparams=json.dumps({"ERM": {"lr": lr}}))
        rerun.write_plan(algorithms=["ERM"], chosen={"choose": "per-algorithm", "settings": settings})
    rows = get_table(to_json(build_results(read_sweeps([tmp_path / "a", tmp_path / "b"]))))["rows"]
    assert [get_means(row) for row in rows] == [[10, 10], [70, 70]]
    assert len({row["setting"] for row in rows}) == 2


def test_what_the_user_gives_beside_a_choice_is_a_setting():
    chosen = {"choose": "per-algorithm", "settings": [{"algorithm": "KD", "hparams": {"lr": 0.1}}]}
    as_chosen, other = (
        read_given({"algorithm": "KD", "hparams": json.dumps({"KD": {"lr": lr}})}, chosen) for lr in (0.1, 0.5)
    )
    assert set(other) - set(as_chosen) == {("hparams KD.lr", "0.5")}
    assert not set(as_chosen) - set(other)


def test_a_value_for_the_student_alone_is_another_setting_where_there_are_teachers():
    for algorithm, is_same in (("KD", False), ("ERM", True)):
        shared, own = (
            read_given({"algorithm": algorithm, "hparams": json.dumps(hparams)})
            for hparams in ({"lr": 0.1}, {algorithm: {"lr": 0.1}})
        )
        assert (shared == own) == is_same


def test_rows_of_several_settings_have_several_names():
    settings = [(("backbone", "a"), ("hparams backbone", "a")), (("backbone", "b"),), (("backbone", "c"),)]
    assert len({*describe_settings(settings).values()}) == 3


def test_what_another_setting_lacks_is_still_missing(tmp_path):
    for name, lr in (("x", 0.1), ("y", 0.2)):
        sweep = make(tmp_path / name, ("red", "green"))
        for env in range(2):
            for draw in range(2):
                folder = sweep.plan("ERM", [env], hparams=json.dumps({"lr": lr}), hparams_seed=draw)
                if (name, draw) != ("y", 1):
                    first = {"environments": sweep.environments}
                    sweep.write_run(folder, sweep.jobs[-1]["args"], accs(50, 50), first=first)
        sweep.write_plan(algorithms=["ERM"], hparams=json.dumps({"lr": lr}))
    data = to_json(build_results(read_sweeps([tmp_path / "x", tmp_path / "y"])))
    assert [(one["test_envs"], one["hparams_seed"], one["reason"]) for one in data["missing"]] == [
        ([env], 1, "not launched") for env in range(2)
    ]


def test_figures_name_their_rows_where_the_first_domain_is_not_held_out(tmp_path):
    pytest.importorskip("matplotlib")
    sweep = make(tmp_path / "s", ("red", "green", "blue"))
    for env, algorithm in ((1, "ERM"), (2, "KD")):
        run(sweep, [env], accs(99, 40, 30), algorithm=algorithm)
    files = write_figures(build_results(read_sweep(sweep.write_plan(algorithms=["ERM", "KD"]))), tmp_path / "figures")
    drawn = [file.read_text() for file in files if file.suffix == ".svg"]
    assert drawn and all("ERM" in svg and "KD" in svg for svg in drawn)


def test_weights_of_a_run_before_anybody_said_where_they_are_from(tmp_path):
    sweep = make(tmp_path / "s", ("red", "green"))
    sweep.run("ERM", [0], accs(10, 20), first={"hparams": {"weights": "mine/net.pt"}})
    sweep.run("KD", [0], accs(10, 20), first={"hparams": {"weights": "pretrained"}})
    rows = get_table(read_json(sweep.root))["rows"]
    origins = {row["algorithm"]: row.get("origins") for row in rows if row["role"] == "student"}
    assert origins == {"ERM": ["weights of unknown origin (net.pt)"], "KD": None}


def test_commands_take_several_folders(tmp_path, capfd):
    for name, trial in (("a", 0), ("b", 1)):
        sweep = make(tmp_path / name, ("red", "green"))
        for algorithm in ("ERM", "KD"):
            for env in range(2):
                sweep.run(algorithm, [env], {10: level(0.1, 0.2)}, trial_seed=trial)
        sweep.write_plan(algorithms=["ERM", "KD"])
    folders = ["--input_dir", str(tmp_path / "a"), str(tmp_path / "b")]
    assert run_command("collect_results", [*folders, "--compare", "KD", "ERM"]) == 0
    assert "n = 2 trials" in capfd.readouterr().out
    assert run_command("report", folders) == 0
    assert capfd.readouterr().out == f"{tmp_path}/a/report.html\n"
    assert "<title>a, b" in (tmp_path / "a" / "report.html").read_text()
