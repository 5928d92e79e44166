"""The report: self-contained, escaped, complete, of sensible size."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from daft_domainbed.errors import UsageError
from daft_domainbed.results.report import write_command, write_report
from daft_domainbed.results.sweeps import read_sweep
from daft_domainbed.scripts import report as command

ONE = {10: [(0.5, 0.5)] * 3}


class Page(HTMLParser):
    """What a browser would find: tags with attributes, text, and whether every tag is closed in order."""

    VOID = {"meta", "input", "br"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


def report_on(root: Path) -> tuple[str, Page]:
    html = write_report(root, root / "report.html").read_text()
    return html, Page(html)


def test_everything_is_in_one_file(full_sweep):
    html, page = report_on(full_sweep.root)
    assert page.open == []
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert page.attributes("src") == []
    assert all(link.startswith("#") for link in page.attributes("href"))
    assert not re.search(r"https?://|@import|url\(|//[a-z]+\.", html)
    assert sorted(path.name for path in full_sweep.root.iterdir() if path.is_file()) == ["plan.json", "report.html"]


def test_every_link_has_its_target_and_every_id_is_one_of_a_kind(full_sweep):
    _, page = report_on(full_sweep.root)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.attributes("href")} | set(page.attributes("for")) <= set(ids)


def test_what_it_shows(full_sweep):
    html, page = report_on(full_sweep.root)
    text = " ".join(page.text)
    for shown in ("66.5", "± 0.5", "teachers behind them", "Nothing: every planned job is done.", "a CPU"):
        assert shown in text
    # 6 teachers of 20 s, 6 of 20 s, 18 students of 10 s: 2 min, 2 min and 1 min an algorithm
    assert re.findall(r"(\w+ (?:teacher|student))</th><td data-value=\"6\">6</td>.*?(\d min \d\d s)</td>", html) == [
        ("ERM teacher", "2 min 00 s"),
        ("AFT teacher", "2 min 00 s"),
        ("ERM student", "1 min 00 s"),
        ("KD student", "1 min 00 s"),
        ("DAFT student", "1 min 00 s"),
    ]
    assert "30 of 30" in text
    assert "leave-one-domain-out cross-validation needs runs with every pair" in text


def test_the_command_behind_each_number(full_sweep):
    html, _ = report_on(full_sweep.root)
    runs = [run for run in read_sweep(full_sweep.root).runs if run.key.algorithm == "DAFT"]
    words = shlex.split(write_command(runs[0].args))
    assert words[:8] == ["daft-domainbed", "train", "--dataset", "Toy", "--algorithm", "DAFT", "--test_envs", "0"]
    assert words[words.index("--steps") + 1] == "11"
    assert not {"--hparams", "--skip_model_save", "--data_dir"} & set(words)  # null, false, null
    for run in runs:
        assert write_command(run.args) in html


def test_commands_of_awkward_arguments(sweep):
    hparams = json.dumps({"lr": 1e-3, "backbone": "a b"})
    args = sweep.make_args("ERM", [0, 2], "a", data_dir="/my data/it's", skip_model_save=True, hparams=hparams)
    sweep.write_run("a", args, ONE)
    (run,) = read_sweep(sweep.root).runs
    words = shlex.split(write_command(run.args))
    assert words[words.index("--data_dir") + 1] == "/my data/it's"
    assert words[words.index("--hparams") + 1] == hparams
    assert words[words.index("--test_envs") + 1 :][:2] == ["0", "2"]
    assert words[words.index("--skip_model_save") + 1].startswith("--")


def test_a_run_of_domainbeds_own_loop_has_its_own_command(sweep):
    folder = sweep.run("ERM", [0], ONE)
    path = sweep.root / folder / "results.jsonl"
    record = json.loads(path.read_text())
    del record["args"]["host"]
    path.write_text(json.dumps(record) + "\n")
    (run,) = read_sweep(sweep.root).runs
    assert write_command(run.args).startswith("python -m domainbed.scripts.train --dataset Toy --algorithm ERM")


def test_hostile_names_are_escaped(make_sweep, tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    sweep = make_sweep(tmp_path / "a&b <i>", [evil, "b", "c"], evil)
    block = {"algorithm": evil, "path": f"../teachers/{evil}", "sha256": evil, "accuracies": {"env0_in_acc": 0.5}}
    first = {"machine": {evil: evil}, "teacher": block}
    sweep.run(evil.replace("/", ""), [0], ONE, hparams={evil: evil}, first=first, task=evil)
    sweep.run("ERM", [0], ONE)
    failed = sweep.plan("KD", [0])
    (sweep.root / failed).mkdir(parents=True)
    (sweep.root / failed / "failed").write_text(evil)
    (sweep.root / "<img src=x>").mkdir()
    # folders are made of names, and a name with a slash is two folders: put them where a sweep has them
    for number, job in enumerate(sweep.jobs):
        (sweep.root / job["folder"]).rename(sweep.root / f"run{number}")
        job["folder"] = f"run{number}"
    sweep.write_plan()
    html, page = report_on(sweep.root)
    assert page.open == []
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not {"i", "img"} & {tag for tag, _ in page.tags}
    assert evil in "".join(page.text)
    assert "alert(1)</script>" not in html.replace("&lt;/script&gt;", "")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_names_that_are_no_text_do_not_stop_it(sweep):
    sweep.run("ERM", [0], ONE, hparams={"a": "\ud800"}, first={"machine": {"cpu": "\ud800\x00"}})
    _, page = report_on(sweep.root)
    assert page.open == []


def test_missing_jobs_and_notes(full_sweep):
    shutil.rmtree(full_sweep.root / full_sweep.jobs[4]["folder"])
    (full_sweep.root / "stray").mkdir()
    _, page = report_on(full_sweep.root)
    text = " ".join(" ".join(page.text).split())
    assert "1 planned job is not done and counts nowhere" in text
    assert "DAFT on red (n = 1): not launched (trial 0, hparams_seed 0)." in text
    assert "stray not a run: no results.jsonl; left out" in text


@pytest.mark.parametrize("planned", [True, False])
def test_folders_with_little_in_them(sweep, planned):
    if planned:
        sweep.plan("ERM", [0])
        sweep.write_plan()
    else:
        sweep.run("ERM", [0], {0: [(0.0, 0.0)] * 3}, is_done=False)
    _, page = report_on(sweep.root)
    assert page.open == []


def test_pairs_and_several_data_sets(sweep, make_sweep):
    for envs in ([0], [1], [2], [0, 1], [0, 2], [1, 2]):
        sweep.run("ERM", envs, ONE)
    other = make_sweep(sweep.root, ["p", "q"], "Other")
    other.run("ERM", [0], {10: [(1.0, 1.0)] * 2})
    _, page = report_on(sweep.root)
    assert "Averages over data sets" in " ".join(page.text)
    assert page.open == []


def test_teachers_of_several_slots_are_told_apart(sweep):
    below = {"algorithm": "ERM", "path": "../teachers/c"}
    teachers = {
        "teacher": {"algorithm": "ERM", "path": "../teachers/a", "accuracies": {"env0_in_acc": 0.7}},
        "teachers": {"robust_teacher": {"algorithm": "AT", "path": "../teachers/b", "teacher": below}},
    }
    sweep.run("BMTARD", [0], ONE, first=teachers)
    _, page = report_on(sweep.root)
    text = " ".join(" ".join(page.text).split())
    assert "Teacher: ERM a , 70.00 on the held-out domain Teacher (robust_teacher): AT b Its teacher: ERM c" in text


def test_seconds_that_nobody_recorded_are_a_dash(sweep):
    path = sweep.root / sweep.run("ERM", [0], ONE) / "results.jsonl"
    path.write_text(path.read_text().replace('"step_time": 0.5', '"step_time": null'))
    html, _ = report_on(sweep.root)
    assert "Trained in –" in html


def test_the_command_prints_the_path(full_sweep, capsys, tmp_path):
    assert command.main(["--input_dir", str(full_sweep.root)]) == 0
    assert capsys.readouterr().out == f"{full_sweep.root / 'report.html'}\n"
    assert command.main(["--input_dir", str(full_sweep.root), "--output", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_bytes() == (full_sweep.root / "report.html").read_bytes()


def test_a_place_that_cannot_be_written_is_bad_usage(full_sweep, tmp_path):
    with pytest.raises(UsageError, match="cannot write the report to .*nowhere.*--output"):
        write_report(full_sweep.root, tmp_path / "nowhere" / "report.html")
    with pytest.raises(UsageError, match="is not a folder"):
        write_report(tmp_path / "none", tmp_path / "report.html")
