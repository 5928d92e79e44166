"""Train every stage for every held-out domain of a data set, print the table, write the report.

The main job: the same as a sweep, then `collect_results`, then `report`. Running it again resumes.

Example:
    daft-domainbed run
    daft-domainbed run --n_trials 3
    daft-domainbed run --dataset folder:birds --algorithms ERM KD DAFT --steps 1000 --output_dir runs/birds
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from daft_domainbed.cli import ArgumentParser, positive_int, run_command
from daft_domainbed.errors import RunError
from daft_domainbed.scripts.train import add_shared_flags

THREADS_PER_JOB = 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `run`."""
    parser = ArgumentParser(prog="daft-domainbed run", doc=__doc__)
    parser.add_argument("--dataset", default="EmojiStyles", help="a data set's name, or folder:PATH")
    parser.add_argument("--algorithms", nargs="+", default=["ERM", "KD", "DAFT"], help="what is compared")
    parser.add_argument("--n_trials", type=positive_int, default=1, help="repetitions, each with its own splits")
    parser.add_argument("--n_hparams", type=positive_int, default=1, help="hyperparameter draws; the first: defaults")
    parser.add_argument("--output_dir", help="the sweep's folder; runs/<dataset> by default")
    parser.add_argument("--steps", type=positive_int, help="updates; the data set's own number by default")
    parser.add_argument("--n_jobs", type=positive_int, default=os.cpu_count() or 1, help="jobs at a time")
    parser.add_argument(
        "--threads", type=positive_int, default=THREADS_PER_JOB, help="threads a job; numbers may depend on it"
    )
    add_shared_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the main job."""
    args = vars(build_parser().parse_args(argv))
    dataset, n_jobs, threads = args.pop("dataset"), args.pop("n_jobs"), args.pop("threads")

    from daft_domainbed.launch.local import is_done, run_jobs
    from daft_domainbed.launch.plan import SweepArgs, make_plan, write_plan
    from daft_domainbed.launch.progress import SweepProgress
    from daft_domainbed.plugin import find_host, get_environments
    from daft_domainbed.provenance import name_dataset

    name = re.sub(r"[^\w.-]+", "_", name_dataset(dataset).removeprefix("folder:"))
    args["output_dir"] = args["output_dir"] or f"runs/{name}"
    sweep = SweepArgs(datasets=[dataset], single_test_envs=True, **args)
    jobs = make_plan(sweep)
    root = Path(sweep.output_dir)
    write_plan(sweep, jobs)
    waiting = [job for job in jobs if not is_done(root / job.folder)]
    environments = {dataset: get_environments(find_host(sweep.host), dataset)}
    with SweepProgress(jobs, len(jobs) - len(waiting), n_jobs, environments) as progress:
        progress.plan(waiting)
        failures = run_jobs(root, jobs, n_jobs=n_jobs, threads=threads, observer=progress)

    from daft_domainbed.scripts import collect_results, report

    collect_results.main(["--input_dir", str(root)])
    report.main(["--input_dir", str(root)])
    if failures:
        folder, reason = next(iter(failures.items()))
        raise RunError(f"{len(failures)} of {len(jobs)} jobs failed, the first in {root / folder}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("run"))
