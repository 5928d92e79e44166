"""The page on writing one's own algorithm does what it says."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import read_records
from tests.processes import run_warm
from tests.testing.test_contract import run_contract

PAGE = Path(__file__).parents[2] / "docs" / "own_algorithm.md"
SCRIPT, TEST = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
SMALL = {f"{prefix}backbone": "resnet8_w2" for prefix in ("", "plain_", "robust_")} | {"batch_size": 8}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's script, in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("two_teachers.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(tmp_path)
    yield Path("two_teachers.py")
    sys.modules.pop("two_teachers", None)


def run(script: Path, *argv: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the script in this process, as Python would."""
    monkeypatch.setattr(sys, "argv", [str(script), *argv])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(script), run_name="__main__")
    return int(exit_.value.code or 0)


def test_code_is_about_thirty_lines() -> None:
    assert len([line for line in SCRIPT.splitlines() if line and not line.startswith(("import", "from"))]) < 30


def test_script_trains_with_both_teachers(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("train", "--dataset", "Debug28", "--algorithm", "TwoTeachers", "--steps", "2", "--output_dir", "run")
    assert run(script, *argv, "--hparams", json.dumps(SMALL | {"two_share": 0.25}), monkeypatch=monkeypatch) == 0
    first = read_records(Path("run"))[0]
    assert {prefix: facts["algorithm"] for prefix, facts in first["teachers"].items()} == {
        "plain": "ERM",
        "robust": "AFT",
    }
    assert first["hparams"]["two_share"] == 0.25


def test_script_shows_its_hyperparameters(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, "methods", "TwoTeachers", "--format", "json", monkeypatch=monkeypatch) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["hparams"]["two_share"] == {
        "default": 0.5,
        "draw": "U[0, 1]",
        "meaning": "share of the robust teacher",
    }
    page = PAGE.read_text()
    assert all(f"`{name}`" in page for name in shown["hparams"] if name.startswith("plain"))


def test_script_sweeps_in_processes_of_its_own(script: Path) -> None:
    command = [
        *(sys.executable, str(script), "sweep", "launch", "--datasets", "Debug28", "--algorithms", "TwoTeachers"),
        *("--steps", "2", "--n_trials", "1", "--n_hparams", "1", "--single_test_envs", "--skip_confirmation"),
        *("--n_jobs", "1", "--output_dir", "sweep", "--hparams", json.dumps(SMALL)),
    ]
    result = run_warm(command)
    assert result.returncode == 0, result.stderr
    jobs = json.loads(Path("sweep/plan.json").read_text())["jobs"]
    assert [job["stage"] for job in jobs] == ["erm_teacher"] * 3 + ["aft_teacher"] * 3 + ["student"] * 3
    assert all(Path("sweep", job["folder"], "done").is_file() for job in jobs)


def test_a_mistake_before_main_ends_the_script_in_one_line() -> None:
    code = "from daft_domainbed import cli, plugin; plugin.add_algorithm('KD', object)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "daft-domainbed: add_algorithm: 'KD' is one of our methods: choose another name\n"
    assert (result.returncode, result.stderr) == (2, message)


def test_its_test_is_found_and_passes(script: Path, tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(TEST, names)
    assert names["TestTwoTeachers"].algorithm == "TwoTeachers"
    assert run_contract("TwoTeachers", tmp_path / "bench") == {}
