"""What a run records about the code and the machine that it ran on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from daft_domainbed.runtime import machine
from daft_domainbed.runtime.machine import find_commit


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one committed file, `code.py`."""
    (tmp_path / "code.py").write_text("x = 1\n")
    ask(tmp_path, "init", "--quiet")
    ask(tmp_path, "add", "code.py")
    ask(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "-m", "first")
    return tmp_path


def ask(folder: Path, *command: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *command], check=True, capture_output=True, text=True).stdout


def test_commit_of_a_tracked_file(repository: Path) -> None:
    commit = find_commit(repository / "code.py")
    assert commit and ask(repository, "rev-parse", "HEAD").startswith(commit)


def test_commit_of_a_changed_tree_is_marked(repository: Path) -> None:
    (repository / "code.py").write_text("x = 2\n")
    commit = find_commit(repository / "code.py")
    assert commit and commit.endswith("+")
    assert ask(repository, "rev-parse", "HEAD").startswith(commit.removesuffix("+"))


def test_it_is_asked_once(repository: Path) -> None:
    before = find_commit(repository / "code.py")
    (repository / "code.py").write_text("x = 2\n")
    assert find_commit(repository / "code.py") == before


def test_a_file_that_git_does_not_know_has_no_commit(repository: Path) -> None:
    installed = repository / "installed.py"
    installed.touch()
    assert find_commit(installed) is None


def test_no_repository_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "code.py").touch()
    assert find_commit(tmp_path / "code.py") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "other.py").touch()
    assert find_commit(tmp_path / "other.py") is None


@pytest.mark.parametrize(
    ("available", "limit", "expected"),
    [
        ("16777216 kB", "max", 2**32),  # 16 GiB: a quarter for each of two cores, half of its share
        ("16777216 kB", str(2**32), 2**30),  # a container's limit is the lower one
        ("1024 kB", "max", 2**28),
        (None, None, 2**28),
    ],
)
def test_what_may_be_kept_follows_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: str | None, limit: str | None, expected: int
) -> None:
    files = {
        "/proc/meminfo": available and f"MemTotal: 1 kB\nMemAvailable: {available}\n",
        "/sys/fs/cgroup/memory.max": limit,
    }
    for name, text in files.items():
        if text is not None:
            (tmp_path / Path(name).name).write_text(text)
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / Path(name).name)
    monkeypatch.setattr(machine, "count_cores", lambda: 2)
    assert machine.share_free_memory() == expected
