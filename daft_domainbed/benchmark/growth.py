"""How cost grows with what a sweep asks for: domains, draws, students of a teacher, records."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from daft_domainbed.benchmark import inputs
from daft_domainbed.benchmark.sizes import RECORDS_PER_FOLDER
from daft_domainbed.benchmark.workers import Bench
from daft_domainbed.runtime.layout import read_records

DRAWS = (1, 5, 20)

_CLASSES = ("a", "b", "c", "d")
_IMAGES = 15  # in each class of each domain


def measure_growth(bench: Bench) -> list[dict[str, Any]]:
    """Return a table for each of the things that cost grows with."""
    return [
        {
            "title": f"domains: folder of {len(_CLASSES) * _IMAGES} images each, 32 px, resnet8_w8, batch 8 a domain",
            "rows": [_measure_domains(bench, count) for count in bench.size.domains],
        },
        {
            "title": "draws: jobs of ERM, KD and DAFT on EmojiStyles, three trials, singles and pairs of test domains",
            "rows": [bench.call("growth:count_jobs", draws=draws) for draws in DRAWS],
        },
        {
            "title": "records: collect_results, start included",
            "rows": [_measure_records(bench, folders) for folders in bench.size.growth_folders],
        },
    ]


def _measure_domains(bench: Bench, count: int) -> dict[str, float]:
    root = bench.make_folder("domains")
    names = tuple(f"{i:02}" for i in range(count))
    inputs.write_domains(root, names, _CLASSES, _IMAGES, side=32, ending="png")
    hparams = {"input_size": 32, "batch_size": 8, "backbone": "resnet8_w8"}
    run: dict[str, Any] = {
        "folder": str(bench.make_folder("run")),
        "dataset": f"folder:{root}",
        "hparams": json.dumps(hparams),
    }
    n_steps = 5 * bench.size.chunk
    measured = bench.call("growth:time_run", **run, steps=n_steps, checkpoint_freq=max(1, n_steps // 2))
    return {"domains": count, "images": count * len(_CLASSES) * _IMAGES} | measured


def time_run(folder: str, **args: Any) -> dict[str, float]:
    """Return milliseconds a step, seconds of an evaluation, and seconds of everything else of a run."""
    from daft_domainbed.benchmark.ours import run

    began = time.perf_counter()
    run(folder, **args)
    elapsed = time.perf_counter() - began
    records = read_records(Path(folder))
    steps = [record["step"] for record in records]
    counts = [b - a for a, b in zip([-1, *steps], steps, strict=False)]
    in_steps = sum(count * record["step_time"] for count, record in zip(counts, records, strict=True))
    return {
        "step_ms": 1000 * records[-1]["step_time"],
        "evaluation_s": (records[-1]["seconds"] - in_steps) / len(records),
        "rest_s": elapsed - records[-1]["seconds"],
    }


def count_jobs(draws: int) -> dict[str, float]:
    """Return how many jobs of each stage a sweep has with so many hyperparameter draws, and how long its plan takes."""
    from collections import Counter
    from tempfile import TemporaryDirectory

    from daft_domainbed.arguments import SweepArgs
    from daft_domainbed.launch.plan import make_plan

    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        jobs = make_plan(SweepArgs(["EmojiStyles"], ["ERM", "KD", "DAFT"], folder, n_trials=3, n_hparams=draws))
        seconds = time.perf_counter() - began
    students = [job for job in jobs if job.stage == "student"]
    taught = sum(len(job.needs) for job in students) / (len(jobs) - len(students))
    return {"draws": draws, **Counter(job.stage for job in jobs), "taught_per_teacher": taught, "plan_s": seconds}


def _measure_records(bench: Bench, folders: int) -> dict[str, float]:
    root = inputs.write_records(bench.make_folder("sweep"), folders)
    seconds = bench.time("daft_domainbed.scripts.collect_results", "--input_dir", root)
    count = folders * RECORDS_PER_FOLDER
    return {"folders": folders, "records": count, "seconds": seconds, "records_per_s": count / seconds}
