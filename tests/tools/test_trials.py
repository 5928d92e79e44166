"""Sweeps trial by trial: what is run when, and what is kept of it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.errors import RunError
from daft_domainbed.models.feature_store import FeatureStore
from tools import trials

SWEEP = """
datasets: [Debug28]
algorithms: [{algorithm}]
n_trials: {n_trials}
n_hparams: 1
single_test_envs: true
steps: 2
hparams: {{batch_size: 8, backbone: resnet8_w2{more}}}
output_dir: runs/{name}
teachers_dir: runs/teachers
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two sweeps, of which one has a trial more."""
    monkeypatch.chdir(tmp_path)
    files = []
    for name, algorithm, n_trials, more in (("erm", "ERM", 2, ""), ("kd", "KD", 1, ", teacher_backbone: resnet8_w2")):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(SWEEP.format(name=name, algorithm=algorithm, n_trials=n_trials, more=more))
    return files


def read(archive: Path) -> dict[str, Any]:
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]


@pytest.mark.usefixtures("warm_servers")
def test_a_trial_of_all_sweeps_before_the_next(study: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from daft_domainbed.scripts import sweep

    launched = []

    class Launch:
        returncode = 0

        def __init__(self, command: list[str], **options: Any) -> None:
            launched.append(
                (Path(command[command.index("--config") + 1]).stem, command[command.index("--n_trials") + 1])
            )
            sweep.main(command[3:])  # in this process, to be quick

    monkeypatch.setattr(trials.subprocess, "run", Launch)
    argv = [".", *map(str, study), "--trials", "0", "2", "--n_jobs", "1"]
    assert trials.main(argv) == 0
    assert launched == [("erm", "1"), ("kd", "1"), ("erm", "2")]
    first, second = (read(Path("records", f"trial_{trial}.tar.xz")) for trial in (0, 1))
    assert sorted(name.split("/")[0] for name in first) == ["costs.json", *["erm"] * 3, *["kd"] * 3, *["teachers"] * 3]
    assert sorted(name.split("/")[0] for name in second) == ["costs.json", *["erm"] * 3]
    assert {json.loads(text.splitlines()[0])["args"]["trial_seed"] for name, text in second.items() if "/" in name} == {
        1
    }
    trials.main(argv)
    assert len(launched) == 3  # both are there


def test_an_unfinished_run_is_not_packed(tmp_path: Path) -> None:
    run = tmp_path / "sweep" / "run"
    run.mkdir(parents=True)
    (run / "results.jsonl").write_text(json.dumps({"args": {"trial_seed": 3}}) + "\n")
    given = {"output_dir": str(tmp_path / "sweep")}
    assert trials.list_runs(given, 4) == []
    with pytest.raises(RunError, match="is not done"):
        trials.list_runs(given, 3)


def test_equal_records_make_equal_archives(tmp_path: Path) -> None:
    archives = []
    for place in ("a", "b"):
        run = tmp_path / place / "sweep" / "run"
        run.mkdir(parents=True)
        (run / "results.jsonl").write_text("{}\n")
        archives.append(tmp_path / f"{place}.tar.xz")
        trials.pack([run], {"costs.json": "[]\n"}, archives[-1])
    assert archives[0].read_bytes() == archives[1].read_bytes()


def test_a_cache_is_told_by_its_rows(tmp_path: Path) -> None:
    import torch

    store = FeatureStore(tmp_path / "a.sqlite", pytest.fail)
    store.recall(torch.rand(3, 4), lambda images: images.bfloat16())
    (told,) = trials.read_cache(tmp_path)
    assert (told["rows"], told["row_bytes"], told["dtype"]) == (3, 8, "bfloat16")
