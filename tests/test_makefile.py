"""`make demo`: what it runs, with the extra and without."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from daft_domainbed.arguments import SweepArgs
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.scripts.run import build_parser

ROOT = Path(__file__).parents[1]


def make_demo(folder: Path, *, has_extra: bool, can_install: bool) -> tuple[list[list[str]], str]:
    """Run `make demo` with programs that only say how they were called; return the calls, and what was said."""
    bin_ = folder / "venv" / "bin"
    bin_.mkdir(parents=True)
    for name in ("develop.stamp", "run.stamp"):
        (folder / "venv" / name).touch()
    python = f'case "$*" in -c*) exit {int(not has_extra)};; *pip*) exit {int(not can_install)};; esac'
    run = f'printf "%s\\0" "$@" >> {shlex.quote(str(folder / "calls"))}'
    for name, script in (("python", python), ("daft-domainbed", run)):
        (bin_ / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin_ / name).chmod(0o755)
    done = subprocess.run(
        ["make", "--no-print-directory", "demo", f"VENV={folder / 'venv'}", "ARGS=--n_trials 2"],
        cwd=ROOT, env=os.environ | {"MAKEFLAGS": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [(folder / "calls").read_text().split("\0")[:-1]], done.stdout


@pytest.mark.parametrize(("has_extra", "can_install"), [(True, False), (False, True)])
def test_the_demo_is_of_pretrained_networks(tmp_path: Path, has_extra: bool, can_install: bool) -> None:
    ((name, *argv),), said = make_demo(tmp_path, has_extra=has_extra, can_install=can_install)
    assert name == "run"
    args = vars(build_parser().parse_args(argv))
    assert (args["n_trials"], args["output_dir"]) == (2, "runs/demo_pretrained")
    own = {field: value for field, value in args.items() if field in SweepArgs.__dataclass_fields__}
    jobs = make_plan(
        SweepArgs(datasets=[args["dataset"]], single_test_envs=True, **own | {"threads": 1, "n_trials": 1})
    )
    assert len(jobs) == 20
    assert "So few trials tell nothing" in said


def test_without_the_extra_it_says_so(tmp_path: Path) -> None:
    ((name, *argv),), said = make_demo(tmp_path, has_extra=False, can_install=False)
    assert (name, argv) == ("run", ["--n_trials", "2"])
    assert "'pretrained' cannot be installed (no network?)" in said
