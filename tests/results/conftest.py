"""A maker of small sweep folders in the format that our engine and DomainBed's own loop write."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.results.formats import FORMATS, to_json
from daft_domainbed.results.sweeps import read_sweep
from daft_domainbed.results.tables import build_results

Accs = Mapping[int, Sequence[tuple[float, float]]]  # step -> (in, out) of each environment


class SweepMaker:
    """Writes runs and, at `write_plan`, the plan of all jobs made so far."""

    def __init__(
        self, root: Path, environments: Sequence[str] = ("red", "green", "blue"), dataset: str = "Toy"
    ) -> None:
        self.root, self.environments, self.dataset = root, list(environments), dataset
        self.jobs: list[dict[str, Any]] = []
        self.all_environments = {dataset: self.environments}
        root.mkdir(parents=True, exist_ok=True)

    def make_args(self, algorithm: str, test_envs: Sequence[int], folder: str, **changes: Any) -> dict[str, Any]:
        args = {
            "algorithm": algorithm,
            "checkpoint_freq": 10,
            "data_dir": None,
            "dataset": self.dataset,
            "hparams": None,
            "hparams_seed": 0,
            "holdout_fraction": 0.2,
            "output_dir": str(self.root / folder),
            "save_model_every_checkpoint": False,
            "seed": 7,
            "skip_model_save": False,
            "steps": 11,
            "task": "domain_generalization",
            "test_envs": list(test_envs),
            "trial_seed": 0,
            "uda_holdout_fraction": 0.0,
            "host": "embedded",
            "device": "cpu",
            "precision": "fp32",
            "teachers_dir": None,
            "image_cache": None,
            "data_seed": None,
        }
        return {**args, **changes}

    def plan(
        self, algorithm: str, test_envs: Sequence[int], stage: str = "student", needs: Sequence[str] = (), **args: Any
    ) -> str:
        """Add a job to the plan; returns its folder."""
        place = "teachers/" if stage != "student" else ""
        folder = f"{place}{self.dataset}-{algorithm}-{'.'.join(map(str, test_envs))}-{len(self.jobs):02d}"
        job = {"stage": stage, "folder": folder, "needs": list(needs)}
        self.jobs.append({**job, "args": self.make_args(algorithm, test_envs, folder, **args)})
        return folder

    def write_run(
        self,
        folder: str,
        args: Mapping[str, Any],
        accs: Accs,
        is_done: bool = True,
        hparams: Mapping[str, Any] | None = None,
        first: Mapping[str, Any] | None = None,
        last: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a run's records; `first` and `last` go into the first and last record."""
        path = self.root / folder
        path.mkdir(parents=True, exist_ok=True)
        lines = []
        for step in accs:
            record: dict[str, Any] = {"step": step, "epoch": step / 4, "step_time": 0.5, "loss": 1.0, "mem_gb": 0.0}
            for env, (inside, outside) in enumerate(accs[step]):
                record |= {f"env{env}_in_acc": inside, f"env{env}_out_acc": outside}
            record |= {"args": dict(args), "hparams": dict(hparams or {"lr": 0.001})}
            record |= dict(first or {}) if step == min(accs) else {}
            record |= dict(last or {}) if step == max(accs) else {}
            lines.append(json.dumps(record, sort_keys=True) + "\n")
        (path / "results.jsonl").write_text("".join(lines))
        if is_done:
            (path / "done").write_text("done")
        return path

    def run(
        self,
        algorithm: str,
        test_envs: Sequence[int],
        accs: Accs,
        stage: str = "student",
        needs: Sequence[str] = (),
        is_done: bool = True,
        hparams: Mapping[str, Any] | None = None,
        first: Mapping[str, Any] | None = None,
        last: Mapping[str, Any] | None = None,
        **args: Any,
    ) -> str:
        """Plan a job and write its records; returns its folder."""
        folder = self.plan(algorithm, test_envs, stage, needs, **args)
        self.write_run(folder, self.jobs[-1]["args"], accs, is_done, hparams, first, last)
        return folder

    def write_plan(self, **args: Any) -> Path:
        """Write plan.json with everything planned or run so far."""
        plan = {"schema": 1, "args": args, "environments": self.all_environments, "jobs": self.jobs}
        (self.root / "plan.json").write_text(json.dumps(plan))
        return self.root


def level(*values: float) -> list[tuple[float, float]]:
    """One checkpoint's accuracies, the same in and out."""
    return [(value, value) for value in values]


@pytest.fixture
def sweep(tmp_path: Path) -> SweepMaker:
    return SweepMaker(tmp_path / "sweep")


@pytest.fixture
def make_sweep(tmp_path: Path) -> type[SweepMaker]:
    return SweepMaker


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's clone of DomainBed, importable during the test."""
    root = os.environ.get("DOMAINBED_ROOT")
    if not root:
        pytest.skip("DOMAINBED_ROOT does not name a clone of DomainBed")
    before = set(sys.modules)
    monkeypatch.syspath_prepend(root)
    yield Path(root)
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "domainbed":
            del sys.modules[name]


def fill_full_sweep(sweep: SweepMaker, trials: int = 2) -> Path:
    """ERM, KD and DAFT with both teachers on every held-out domain; round numbers that can be checked by hand.

    A student's accuracies: (60 + bonus + env + trial) percent in-split on the held-out domain at the last step.
    """
    bonus = {"ERM": 0, "KD": 2, "DAFT": 5}
    for trial in range(trials):
        for env in range(len(sweep.environments)):

            def checkpoints(percent: float, held_out: int = env) -> dict[int, list[tuple[float, float]]]:
                early = level(*[0.25] * len(sweep.environments))
                late = [(0.9, 0.8)] * len(sweep.environments)
                late[held_out] = (percent / 100, 0.5)
                return {0: early, 10: late}

            def accuracies(percent: float, held_out: int = env) -> dict[str, float]:
                return {f"env{held_out}_in_acc": percent / 100, f"env{held_out}_out_acc": 0.5}

            seeds = {"trial_seed": trial}
            last = {"last": {"seconds": 20.0}}
            erm_teacher = sweep.run("ERM", [env], checkpoints(70 + env), "erm_teacher", **seeds, **last)
            erm = {"algorithm": "ERM", "path": f"../{erm_teacher}", "sha256": "aa", "steps": 11, "seconds": 20.0}
            erm["accuracies"] = accuracies(70 + env)
            first = {"environments": sweep.environments, "machine": {"python": "3.12", "cpu": "a CPU", "threads": 1}}
            aft_teacher = sweep.run(
                "AFT",
                [env],
                checkpoints(75 + env),
                "aft_teacher",
                [erm_teacher],
                first={**first, "teacher": erm},
                hparams={"aft_eps": 0.01},
                **seeds,
                **last,
            )
            aft = {"algorithm": "AFT", "path": f"../{aft_teacher}", "sha256": "bb", "steps": 11, "seconds": 5.0}
            aft |= {"accuracies": accuracies(75 + env), "teacher": erm}
            teachers = {"ERM": None, "KD": erm, "DAFT": aft}
            needs = {"ERM": [], "KD": [erm_teacher], "DAFT": [aft_teacher]}
            for algorithm, plus in bonus.items():
                sweep.run(
                    algorithm,
                    [env],
                    checkpoints(60 + plus + env + trial),
                    needs=needs[algorithm],
                    first={**first, **({"teacher": teachers[algorithm]} if teachers[algorithm] else {})},
                    last={"seconds": 10.0},
                    hparams={"lr": 0.001, "kd_weight": 0.7} if plus else {"lr": 0.001},
                    **seeds,
                )
    return sweep.write_plan(datasets=[sweep.dataset], algorithms=["ERM", "KD", "DAFT"], n_trials=trials)


@pytest.fixture
def full_sweep(sweep: SweepMaker) -> SweepMaker:
    fill_full_sweep(sweep)
    return sweep


def read_json(root: Path) -> dict:
    return to_json(build_results(read_sweep(root)))


def find_row(data: dict, selection: str, algorithm: str, role: str = "student") -> dict:
    (table,) = [table for table in data["tables"] if table["selection"] == selection]
    (row,) = [row for row in table["rows"] if (row["algorithm"], row["role"]) == (algorithm, role)]
    return row


def print_as(name: str, root: Path) -> str:
    return FORMATS[name](build_results(read_sweep(root)))


def find_job(sweep: SweepMaker, algorithm: str, env: int, trial: int, stage: str = "student") -> dict:
    (job,) = [
        job
        for job in sweep.jobs
        if (job["stage"], job["args"]["algorithm"]) == (stage, algorithm)
        and (job["args"]["test_envs"], job["args"]["trial_seed"]) == ([env], trial)
    ]
    return job
