"""What a pretrained student and a rich teacher cost on two cores, and what came of it: one trial of sweeps/laptop.

python -m tools.laptop time RUNS [--env 3]    processor seconds of each job for one held-out style, into times.jsonl
daft-domainbed benchmark --only pretrained_step --format json > sweeps/laptop/step.json    a step beside a bare loop
python -m tools.laptop write                  the tables of docs/pretrained_students.md, from the committed records
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from daft_domainbed.launch.job import name_job
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.plan_file import write_plan
from daft_domainbed.launch.sweep import collect_sweep_args
from daft_domainbed.results.cells import Table
from daft_domainbed.results.comparison import collect_trials
from daft_domainbed.results.sweeps import read_sweep
from daft_domainbed.results.tables import build_results
from daft_domainbed.runtime.layout import TEACHERS_FOLDER, read_first_record, read_last_record
from daft_domainbed.runtime.machine import find_commit
from daft_domainbed.scripts.sweep import read_config
from tools.archives import open_archive
from tools.marked_tables import fill_tables
from tools.study import make_table
from tools.trials import COSTS, read_cache

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "sweeps" / "laptop"
SWEEP, RECORDS = STUDY / "sweep.yaml", STUDY / "records" / "trial_100.tar.xz"
TIMES, STEP = STUDY / "times.jsonl", STUDY / "step.json"
PAGE = ROOT / "docs" / "pretrained_students.md"
# Plain and averaged weights, means over the held-out styles of trials 100 and 101: issue "Evidence II" has them.
PILOT = {"ERM": (62.6, 65.2), "KD": (64.3, 66.8), "DAFT": (65.6, 67.0)}


def measure_times(runs: Path, env: int) -> None:
    """Run the jobs of one held-out style one after the other, and write what each took.

    Args:
        runs: A new folder.
        env: The style.
    """
    given = read_config(SWEEP, "launch") | {"output_dir": str(runs / "sweep"), "feature_cache": str(runs / "features")}
    sweep = collect_sweep_args(given)
    jobs = [job for job in make_plan(sweep) if job.args.test_envs == [env]]
    write_plan(sweep, jobs)
    commit = find_commit(Path(__file__))  # before the records differ from those of the commit
    with TIMES.open("w") as file:
        for job in jobs:
            before = measure_children()
            command = [sys.executable, "-m", "daft_domainbed.launch.work", str(runs / "sweep"), job.folder]
            subprocess.run(command, check=True)
            entry = {
                "job": f"{job.args.algorithm} student" if job.stage == "student" else name_job(job),
                "steps": read_last_record(runs / "sweep" / job.folder)["step"] + 1,
                "processor_seconds": round(measure_children() - before, 1),
                "cache_bytes": sum(entry["bytes"] for entry in read_cache(runs / "features")),
                "load": round(os.getloadavg()[0], 1),
                "commit": commit,
            }
            print(json.dumps(entry), file=file, flush=True)


def measure_children() -> float:
    """Return the processor seconds of all processes that have ended below this one."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def show_times(times: Sequence[dict[str, Any]]) -> str:
    """Return the table of processor seconds and of what each job adds to the cache."""
    rows, before = [], 0
    for entry in times:
        added, before = entry["cache_bytes"] - before, entry["cache_bytes"]
        rows.append([entry["job"], str(entry["steps"]), f"{entry['processor_seconds']:.0f}", f"{added / 1e6:.0f}"])
    total = sum(entry["processor_seconds"] for entry in times)
    rows.append(["all, in this order", "", f"{total:.0f}", f"{before / 1e6:.0f}"])
    loads, commits = [entry["load"] for entry in times], {str(entry["commit"]) for entry in times}
    proof = (
        f"n = 1, one thread, held-out style contrast, trial 100; commit {', '.join(sorted(commits))}; load of the "
        f"machine meanwhile {min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} cores, so that processor seconds "
        f"are told, the start of each process included."
    )
    return f"{make_table(['job', 'steps', 'processor seconds', 'adds to the cache, MB'], rows)}\n\n{proof}"


def show_cache(costs: dict[str, Any]) -> str:
    """Return a sentence on the cache of the whole sweep."""
    entries = [entry for sweep in costs["sweeps"] for entry in sweep["cache"]]
    parts = [
        f"{entry['rows']:,} rows of {entry['row_bytes']:,} bytes"
        for entry in sorted(entries, key=lambda entry: -entry["bytes"])[:2]
    ]
    total, dtypes = sum(entry["bytes"] for entry in entries), {entry["dtype"] for entry in entries}
    return (
        f"The whole sweep, four held-out styles, left {total / 1e9:.1f} GB of cache ({', '.join(sorted(dtypes))}): "
        f"{parts[0]} of the teachers' frozen stages, {parts[1]} of the students', and the teachers' features."
    )


def show_step(content: dict[str, Any]) -> str:
    """Return a sentence on a step of the student beside a bare loop with the same memory."""
    (row,), machine = content["rows"], content["machine"]
    values = [ours / bare for ours, bare in zip(row["values"]["ours"], row["values"]["bare"], strict=True)]
    return (
        f"A step of this student takes {row['ratio']:.2f} times a bare loop in plain torch over the same remembered "
        f"activations (goal {row['goal']}; medians of n = {row['n']} rounds in turns, single rounds {min(values):.2f} "
        f"to {max(values):.2f}; fp32, {machine['threads']} thread, load {row['load']}; commit {machine['commit']})."
    )


def show_accuracies(root: Path) -> str:
    """Return the table of held-out accuracies beside the pilot's.

    Args:
        root: The sweep's records.
    """
    plain, averaged = (_read_table(root, weights) for weights in ("plain", "averaged"))
    rows = []
    for algorithm, pilot in PILOT.items():
        for weights, table, mean in (("plain", plain, pilot[0]), ("averaged", averaged, pilot[1])):
            (accuracies,) = collect_trials(table, algorithm).values()
            shown = [f"{value:.1f}" for value in [*accuracies, float(np.mean(accuracies))]]
            rows.append([f"{algorithm}, {weights}", *shown, f"{mean:.1f}"])
    for algorithm in ("ERM", "AFT"):
        records = [read_last_record(folder) for folder in (root / TEACHERS_FOLDER).glob(f"{algorithm}-*")]
        found = {env: record[f"env{env}_in_acc"] for record in records for env in record["args"]["test_envs"]}
        values = [100 * found[env] for env in sorted(found)]
        rows.append([f"{algorithm} teacher", *(f"{value:.1f}" for value in [*values, float(np.mean(values))]), ""])
    first = read_first_record(next(path.parent for path in sorted(root.glob("*/results.jsonl"))))
    machine = first["machine"]
    proof = (
        f"n = 1 trial; commit {machine['commit']}, torch {machine['torch']}, "
        "timm's networks, weights of the extra; the pilot's are means of its two trials."
    )
    header = ["", *plain.environments, "average", "pilot"]
    return f"{make_table(header, rows)}\n\n{proof}"


def _read_table(root: Path, weights: str) -> Table:
    tables = build_results(read_sweep(root, weights)).tables
    return next(table for table in tables if table.selection == "training-domain")


def fill_page(text: str) -> str:
    """Return the page with its tables made anew."""
    times = [json.loads(line) for line in TIMES.read_text().splitlines()]
    with open_archive(RECORDS) as folder:
        cache = show_cache(json.loads((folder / COSTS).read_text()))
        (folder / TEACHERS_FOLDER).rename(folder / "sweep" / TEACHERS_FOLDER)
        step = show_step(json.loads(STEP.read_text().splitlines()[-1]))
        tables = {
            "times": f"{show_times(times)}\n\n{cache}\n\n{step}",
            "accuracies": show_accuracies(folder / "sweep"),
        }
    return fill_tables(text, "laptop", tables.__getitem__)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    timed = commands.add_parser("time")
    timed.add_argument("runs", type=Path)
    timed.add_argument("--env", type=int, default=3)
    commands.add_parser("write")
    args = parser.parse_args(argv)
    if args.command == "time":
        measure_times(args.runs, args.env)
    else:
        PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
