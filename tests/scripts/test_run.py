"""The main job, small: every stage in processes of its own, then the tables and the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from daft_domainbed.cli import run_command
from daft_domainbed.scripts.run import build_parser
from tests.conftest import HPARAMS, TEACHER_HPARAMS

TINY = HPARAMS | TEACHER_HPARAMS
SMALL = ["--steps", "4", "--checkpoint_freq", "2", "--n_jobs", "2", "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("warm_servers")


def make_argv(root: Path, **user: object) -> list[str]:
    return [
        *("--dataset", "Debug28", "--algorithms", "ERM", "DAFT", "--output_dir", str(root)),
        *("--hparams", json.dumps(TINY | user), *SMALL),
    ]


def test_defaults_are_the_main_job() -> None:
    args = build_parser().parse_args([])
    assert (args.dataset, args.algorithms) == ("EmojiStyles", ["ERM", "KD", "DAFT"])
    assert (args.n_trials, args.n_hparams, args.command_launcher, args.host) == (1, 1, "local", "embedded")


def test_every_stage_then_tables_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("run", make_argv(tmp_path)) == 0
    output, log = capsys.readouterr()
    assert "training-domain validation" in output
    for name in ("ERM", "DAFT", "AFT", "teachers"):
        assert any(line.split()[:1] == [name] for line in output.splitlines())
    assert (tmp_path / "report.html").stat().st_size > 0
    # 3 held-out domains: 6 students, 3 teachers of each kind.
    assert len(json.loads((tmp_path / "plan.json").read_text())["jobs"]) == 12
    # Which of the last two ends first is for the machine to say.
    assert "] DAFT student, 2 held out, trial 0: done in" in log
    assert "[12/12] DAFT student, " in log
    assert len(list(tmp_path.glob("*/done"))) == 6
    assert len(list(tmp_path.glob("teachers/*/done"))) == 6

    # Again: nothing is left to do, and the same is shown.
    assert run_command("run", make_argv(tmp_path)) == 0
    output_again, log = capsys.readouterr()
    assert output_again == output
    assert "/12]" not in log

    assert run_command("run", [*make_argv(tmp_path), "--holdout_fraction", "0.4"]) == 2
    assert "holdout_fraction is 0.2 there and 0.4 here" in capsys.readouterr().err


def test_a_failed_job_fails_the_run_and_leaves_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("run", make_argv(tmp_path, teacher_weights=str(tmp_path / "nowhere.pt"))) == 1
    output, log = capsys.readouterr()
    last = log.splitlines()[-1]
    assert last.startswith("daft-domainbed run: 9 of 12 jobs failed, the first in ")
    assert "nowhere.pt" in last
    assert any(line.split()[:1] == ["ERM"] for line in output.splitlines())
    assert (tmp_path / "report.html").is_file()


def test_own_folder_gets_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for domain in ("field", "town"):
        for label in ("crow", "swan"):
            folder = tmp_path / "my birds" / domain / label
            folder.mkdir(parents=True)
            for i in range(5):
                Image.fromarray(np.full((16, 16, 3), 40 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    user = {"input_size": 16, "backbone": "resnet8_w2", "batch_size": 4}
    argv = ["--dataset", "folder:my birds/", "--algorithms", "ERM", "--hparams", json.dumps(user), *SMALL]
    assert run_command("run", argv) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["my_birds"]
    assert len(list(Path("runs/my_birds").glob("*/done"))) == 2
