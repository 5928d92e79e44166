"""How cost grows with what a sweep asks for: domains, draws, students of a teacher, records."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from typing import Any

from daft_domainbed.benchmark import inputs
from daft_domainbed.benchmark.measure import Bench
from daft_domainbed.benchmark.sizes import RECORDS_PER_FOLDER

DRAWS = (1, 5, 20)
GPUS = (8, 64, 512)

# sweeps/domainbed: images, domains and steps between evaluations of each of its data sets.
SETS = {
    "VLCS": (10_729, 4, 300),
    "PACS": (9_991, 4, 300),
    "OfficeHome": (15_588, 4, 300),
    "TerraIncognita": (24_788, 4, 300),
    "DomainNet": (586_575, 6, 1000),
}
STEPS, TRIALS, N_DRAWS = 5001, 3, 20
AFT_TEACHERS = 50  # a held-out domain, of three trials: the draws of aft_* that differ, as the plan counts them

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
        {
            "title": f"sweeps/domainbed, estimated for {Machine()}",
            "rows": [estimate_sweep(Machine(), gpus) for gpus in GPUS],
        },
    ]


@dataclass(frozen=True)
class Machine:
    """What a sweep's hours follow from; the numbers are assumed, put yours in their place.

    Attributes:
        student: Images a second that a GPU takes forward through a ResNet-18 of 224 px.
        teacher: The same of a ResNet-50.
        read: Images a second that a core reads and augments.
        cores: For each GPU.
        start: Seconds of a job beside its steps and evaluations.
    """

    student: float = 5_500
    teacher: float = 2_400
    read: float = 400
    cores: int = 8
    start: float = 10


def estimate_sweep(machine: Machine, gpus: int) -> dict[str, float]:
    """Return the jobs, hours and disk of sweeps/domainbed, every GPU busy, each job on one.

    A forward pass of an image is the unit: a step costs 3 for what is trained, 1 for a teacher that answers, and 8 for
    adversarial fine-tuning of a head (5 forward, 3 backward to the image). A job takes as long as its GPU, or its
    cores, whichever is slower.
    """
    student, teacher = 1 / machine.student, 1 / machine.teacher  # a unit in seconds

    def take(trained: float, step: float, evaluated: float, forward: float) -> float:
        read = (trained + evaluated) / (machine.read * machine.cores)
        return machine.start + max(trained * step + evaluated * forward, read)

    n_jobs, seconds, longest = 0, 0.0, 0.0
    for name, (images, domains, every) in SETS.items():
        # Batches of a random draw: 2^U(3, 5.5), DomainNet's 2^U(3, 5); the first draw, and teachers, have 32.
        top = 5 if name == "DomainNet" else 5.5
        drawn = (2**top - 2**3) / ((top - 3) * math.log(2))
        batch = (32 + (N_DRAWS - 1) * drawn) / N_DRAWS

        trained, evaluated = STEPS * batch * (domains - 1), _count_evaluations(STEPS, every) * images
        plain = take(trained, 3 * student, evaluated, student)
        taught = take(trained, 3 * student + teacher, evaluated, student)
        erm = take(STEPS * 32 * (domains - 1), 3 * teacher, evaluated, teacher)
        aft_steps = STEPS // 4
        aft = take(aft_steps * 32 * (domains - 1), 8 * teacher, _count_evaluations(aft_steps, every) * images, teacher)

        n_students = domains * TRIALS * N_DRAWS
        seconds += n_students * (plain + 2 * taught) + domains * (TRIALS * erm + AFT_TEACHERS * aft)
        n_jobs += 3 * n_students + domains * (TRIALS + AFT_TEACHERS)
        longest = max(longest, erm + aft + taught)
    n_teachers = sum(domains for _, domains, _ in SETS.values()) * (TRIALS + AFT_TEACHERS)
    resnet50 = 0.094  # GB; a teacher keeps two, a running job weights and Adam's two moments
    disk = n_teachers * 2 * resnet50 + gpus * 3 * resnet50 + n_jobs * 18 * 2e-6
    hours = max(seconds / gpus, longest) / 3600
    return {"gpus": gpus, "jobs": n_jobs, "gpu_hours": seconds / 3600, "hours": hours, "disk_gb": disk}


def _count_evaluations(steps: int, every: int) -> int:
    return len({*range(0, steps, every), steps - 1})


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
    from daft_domainbed.benchmark.ours import read_steps, run

    began = time.perf_counter()
    run(folder, **args)
    elapsed = time.perf_counter() - began
    records = read_steps(folder)
    steps = [record["step"] for record in records]
    counts = [b - a for a, b in zip([-1, *steps], steps, strict=False)]
    in_steps = sum(count * record["step_time"] for count, record in zip(counts, records, strict=True))
    return {
        "step_ms": 1000 * records[-1]["step_time"],
        "evaluation_s": (records[-1]["seconds"] - in_steps) / len(records),
        "rest_s": elapsed - records[-1]["seconds"],
    }


def count_jobs(draws: int) -> dict[str, float]:
    """Return how many jobs a sweep has with so many hyperparameter draws, and how long its plan takes."""
    from collections import Counter
    from tempfile import TemporaryDirectory

    from daft_domainbed.launch.plan import SweepArgs, make_plan

    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        jobs = make_plan(SweepArgs(["EmojiStyles"], ["ERM", "KD", "DAFT"], folder, n_trials=3, n_hparams=draws))
        seconds = time.perf_counter() - began
    stages = Counter(job.stage for job in jobs)
    teachers = stages["erm_teacher"] + stages["aft_teacher"]
    return {
        "draws": draws,
        "students": stages["student"],
        "erm_teachers": stages["erm_teacher"],
        "aft_teachers": stages["aft_teacher"],
        "taught_per_teacher": stages["student"] * 2 / 3 / teachers,
        "plan_s": seconds,
    }


def _measure_records(bench: Bench, folders: int) -> dict[str, float]:
    root = inputs.write_records(bench.make_folder("sweep"), folders)
    seconds = bench.time("daft_domainbed.scripts.collect_results", "--input_dir", root)
    count = folders * RECORDS_PER_FOLDER
    return {"folders": folders, "records": count, "seconds": seconds, "records_per_s": count / seconds}
