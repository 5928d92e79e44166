"""Records that prove nothing are refused: by the history of a repository made here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.errors import RunError
from tools import proof
from tools.trials import pack


class Repository:
    """A line of commits: before the settings, the settings, after them; and a branch beside it."""

    def __init__(self, root: Path) -> None:
        self.root, self.report = root, root / "report"
        self.git("init", "--quiet", "--initial-branch=main")
        self.commits = {"before": self.commit("a")}
        self.git("branch", "beside")
        self.report.mkdir()
        (self.report / "daft.yaml").write_text("algorithms: [DAFT]\n")
        self.commits["settings"] = self.commit("b")
        self.commits["after"] = self.commit("c")
        self.git("checkout", "--quiet", "-b", "off", "main~1")
        self.commits["off"] = self.commit("d")
        self.git("checkout", "--quiet", "main")

    def git(self, *command: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", str(self.root), *who, *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(self, name: str) -> str:
        (self.root / name).write_text(name)
        self.git("add", "--all")
        self.git("commit", "--quiet", "-m", name)
        return self.git("rev-parse", "--short", "HEAD")

    def pack(self, name: str, *runs: tuple[str, str | None], **args: Any) -> Path:
        """Write an archive of runs, each a place and a commit."""
        folders = []
        for place, commit in runs:
            folder = self.root / "runs" / name / place
            folder.mkdir(parents=True)
            given = {"trial_seed": 0, "test_envs": [0], "hparams_seed": 0} | args
            record = {"args": given, "machine": {"commit": self.commits.get(commit or "", commit)}}
            (folder / "results.jsonl").write_text(json.dumps(record) + "\n")
            folders.append(folder)
        archive = self.root / "records" / f"{name}.tar.xz"
        pack(folders, {"costs.json": "{}"}, archive)
        return archive


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


@pytest.fixture
def check(repository: Repository) -> Callable[..., None]:
    return lambda *archives: proof.check_records(archives, repository.report)


@pytest.mark.parametrize("commit", ["settings", "after"])
def test_records_of_the_settings_commit_and_of_later_ones_stand(
    repository: Repository, check: Callable[..., None], commit: str
) -> None:
    check(repository.pack("trial_0", ("daft/x", commit), ("teachers/AFT-1", commit)))


@pytest.mark.parametrize(
    ("commit", "why"),
    [
        ("before", "does not follow the one that fixed its settings"),
        ("off", "is not of this line"),
        ("1234567", "does not follow"),
        ("1234567+", "was run from a changed tree"),
        (None, "names no commit"),
    ],
)
@pytest.mark.parametrize("place", ["daft/x", "teachers/AFT-1"])
def test_others_are_refused(
    repository: Repository, check: Callable[..., None], commit: str | None, why: str, place: str
) -> None:
    archive = repository.pack("trial_0", (place, commit))
    others = [repository.pack("trial_1", ("daft/y", "after"), ("teachers/ERM-1", "after"), trial_seed=1)]
    if place != "daft/x":  # alone it would be nobody's
        archive = repository.pack("trial_2", ("daft/z", "after"), (place, commit), trial_seed=2)
    with pytest.raises(RunError, match=f"{archive.name}: {place}.*{why}"):
        check(*others, archive)


def test_settings_that_change_later_take_the_proof_away(repository: Repository, check: Callable[..., None]) -> None:
    archive = repository.pack("trial_0", ("daft/x", "after"))
    (repository.report / "daft.yaml").write_text("algorithms: [DAFT]\nsteps: 1\n")
    repository.commit("e")
    proof.ask.cache_clear()
    with pytest.raises(RunError, match="does not follow the one that fixed its settings"):
        check(archive)


def test_a_job_that_occurs_twice_is_refused(repository: Repository, check: Callable[..., None]) -> None:
    one, two = (repository.pack(f"trial_{i}", ("daft/x", "after")) for i in (0, 1))
    check(one)
    with pytest.raises(RunError, match=r"trial_1.tar.xz: daft/x occurs twice, in trial_0.tar.xz"):
        check(one, two)
    with pytest.raises(RunError, match=r"daft/b occurs twice, in trial_2.tar.xz as a"):
        check(repository.pack("trial_2", ("daft/a", "after"), ("daft/b", "after")))
    check(one, repository.pack("trial_3", ("daft/x", "after"), trial_seed=3))


def test_sweeps_without_a_file_are_refused_and_development_is_not_asked(
    repository: Repository, check: Callable[..., None]
) -> None:
    check(repository.pack("trial_102", ("kd_t1/x", "1234567+"), ("teachers/ERM-1", None)))
    with pytest.raises(RunError, match=r"no other.yaml"):
        check(repository.pack("trial_0", ("daft/x", "after"), ("other/x", "after")))
