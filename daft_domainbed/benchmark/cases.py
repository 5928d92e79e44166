"""The rows: what is compared, on what, and what is to be reached."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daft_domainbed.benchmark import inputs
from daft_domainbed.benchmark.measure import Case, Column, Goal, Rounds, Turn
from daft_domainbed.benchmark.sizes import RECORDS_PER_FOLDER
from daft_domainbed.benchmark.workers import Bench, Worker, list_flags
from daft_domainbed.errors import RunError
from daft_domainbed.runtime.layout import read_last_record

CASES: dict[str, Case] = {}

TRAIN, HOST_TRAIN = "daft_domainbed.scripts.train", "domainbed.scripts.train"
BARE = "daft_domainbed.benchmark.bare"

STUDENT = "resnet8_w8"
PRETRAINED = "timm/tf_efficientnet_lite0"
EMOJI_BATCH = 96  # 32 drawings of each of three styles
EMOJI_EPOCH = 20  # steps in which a style is seen once

MakeRounds = Callable[[Bench], Rounds]


def case(bare: str, *goals: Goal) -> Callable[[MakeRounds], MakeRounds]:
    """Make a case of a function: its name, the first line of its docstring, and what it yields."""

    def add(rounds: MakeRounds) -> MakeRounds:
        about = (rounds.__doc__ or "").partition("\n")[0]
        CASES[rounds.__name__] = Case(rounds.__name__, about, bare, goals, rounds)
        return rounds

    return add


@case(
    "20 steps and three evaluations in plain torch, from the process's start to its end",
    Goal("wall", "s", "host", 0.35),
    Goal("memory", "MiB", "bare", 1.1),
    Goal("processes", "", None, 1),
)
def small_job(bench: Bench) -> Rounds:
    """`train` on Debug28: batch 8, 20 steps, a checkpoint every 10."""

    def use(bench_method: Callable[..., Any]) -> dict[Column, Callable[[], Any]]:
        def run(module: str, **options: Any) -> Any:
            flags = list_flags(dataset="Debug28", steps=20, checkpoint_freq=10, hparams={"batch_size": 8})
            return bench_method(module, *flags, "--output_dir", bench.make_folder("small"), **options)

        turns: dict[Column, Callable[[], Any]] = {"ours": lambda: run(TRAIN), "bare": lambda: bench_method(BARE, 1)}
        if bench.clone:
            turns["host"] = lambda: run(HOST_TRAIN, with_host=True)
        return turns

    yield {column: _name("wall", do) for column, do in use(bench.time).items()}
    yield use(bench.watch)


@case("the same jobs in plain torch, one after the other in one process", Goal("wall", "s", "host", 1 / 15))
def many_jobs(bench: Bench) -> Rounds:
    """24 such jobs through `sweep launch --command_launcher local`."""

    def launch(script: str, n_jobs: int, **options: Any) -> tuple[float, Path]:
        folder = bench.make_folder("sweep")
        flags = ["--single_test_envs", "--skip_confirmation"]
        flags += list_flags(datasets="Debug28", algorithms="ERM", steps=20, hparams={"batch_size": 8}, n_hparams=1)
        flags += list_flags(n_trials=n_jobs // 3, command_launcher="local", output_dir=folder)
        if not options:
            flags += list_flags(n_jobs=bench.threads, threads=1)
        return bench.time(script, "launch", *flags, **options), folder

    def launch_host() -> float:
        n_jobs = bench.size.host_jobs
        seconds, folder = launch("domainbed.scripts.sweep", n_jobs, with_host=True)
        ends = sorted(path.stat().st_mtime for path in folder.glob("*/done"))
        if len(ends) < n_jobs:
            raise RunError(f"{n_jobs - len(ends)} of {n_jobs} jobs of DomainBed's launcher are not done")
        # One job after the other: from one end to the next is one job, whatever was before the first.
        return seconds + (bench.size.jobs - n_jobs) * (ends[-1] - ends[0]) / (n_jobs - 1)

    turns: dict[Column, Turn] = {
        "ours": lambda: {"wall": launch("daft_domainbed.scripts.sweep", bench.size.jobs)[0]},
        "bare": lambda: {"wall": bench.time(BARE, bench.size.jobs)},
    }
    if bench.clone:
        turns["host"] = lambda: {"wall": launch_host()}
    yield turns


@case(
    "the same steps and evaluations in plain torch, the digits read but not rotated",
    Goal("wall", "s", "host", 0.55),
    Goal("step", "s", "bare", 1.05),
)
def digits(bench: Bench) -> Rounds:
    """RotatedMNIST job, batch 5 x 64: a checkpoint at the start, in the middle and at the end."""
    root, size = inputs.write_digits(bench.make_folder("digits"), bench.size.digits), bench.size
    arguments = {"dataset": "RotatedMNIST", "data_dir": str(root)}
    with _pace_engine(bench, **arguments) as ours, bench.pace("bare:train_digits", root=str(root)) as bare:
        yield {"ours": _take_steps(ours, size.chunk), "bare": _take_steps(bare, size.chunk)}

    def run(module: str, **options: Any) -> dict[str, float]:
        folder = bench.make_folder("job")
        flags = list_flags(**arguments, steps=size.digits_steps, checkpoint_freq=size.digits_checkpoint)
        seconds = bench.time(module, *flags, "--output_dir", folder, **options)
        steps = read_last_record(folder)["step_time"]
        shutil.rmtree(folder)
        return {"wall": seconds, "step": steps} if options else {"wall": seconds}

    turns: dict[Column, Turn] = {
        "ours": lambda: run(TRAIN),
        "bare": lambda: {"wall": bench.time(BARE, "digits", root, size.digits_steps, size.digits_checkpoint)},
    }
    if bench.clone:
        turns["host"] = lambda: run(HOST_TRAIN, with_host=True)
    yield turns


@case("the step in plain torch: eager, fp32", Goal("step", "s", "bare", 0.55))
def digits_fast(bench: Bench) -> Rounds:
    """RotatedMNIST step with the fast options: `--precision bf16`."""
    root = str(inputs.write_digits(bench.make_folder("digits"), bench.size.digits))
    arguments = {"dataset": "RotatedMNIST", "data_dir": root, "precision": "bf16"}
    with _pace_engine(bench, **arguments) as ours, bench.pace("bare:train_digits", root=root) as bare:
        yield {"ours": _take_steps(ours, bench.size.chunk), "bare": _take_steps(bare, bench.size.chunk)}


@case("our ERM step plus the forward pass of the teacher's network", Goal("step", "s", "bare", 1.05))
def daft_step(bench: Bench) -> Rounds:
    """DAFT step on EmojiStyles: student resnet8_w8, teacher resnet8_w32, batch 3 x 32."""
    teacher = {"teacher_backbone": bench.size.teacher, "teacher_steps": 8, "aft_steps": 2}
    n = 2 * bench.size.chunk
    with (
        _pace_engine(bench, dataset="EmojiStyles", algorithm="DAFT", hparams={"backbone": STUDENT} | teacher) as daft,
        _pace_engine(bench, dataset="EmojiStyles", hparams={"backbone": STUDENT}) as erm,
        bench.pace("bare:answer", backbone=bench.size.teacher, batch=EMOJI_BATCH) as answer,
    ):
        yield {
            "ours": _take_steps(daft, n),
            "bare": lambda: {"step": erm.take_median(n) + answer.take_median(n)},
        }


@case("10-step pixel PGD through the frozen backbone in plain torch, as many images", Goal("epoch", "s", "bare", 0.01))
def aft_features(bench: Bench) -> Rounds:
    """AFT epoch on features (closed form, head of resnet8_w32, not augmented, images encoded before) on EmojiStyles."""
    with (
        _pace_aft(bench, aft_attack="features", data_augmentation=False) as ours,
        bench.pace("bare:fine_tune", backbone=bench.size.teacher, batch=EMOJI_BATCH, attack_steps=10) as bare,
    ):
        yield {
            "ours": lambda: {"epoch": sum(ours.advance(EMOJI_EPOCH))},
            "bare": lambda: {"epoch": EMOJI_EPOCH * bare.take_median(max(1, bench.size.chunk // 3))},
        }


@case("5 forward and 3 backward passes in plain torch, no gradient for a weight of the backbone",
      Goal("step", "s", "bare", 1.1))  # fmt: skip
def aft_pixels(bench: Bench) -> Rounds:
    """AFT step of the head of resnet8_w32 on pixels: 3-step PGD through the frozen backbone, batch 3 x 32."""
    n = bench.size.chunk
    with (
        _pace_aft(bench, aft_attack="pixels", aft_attack_steps=3) as ours,
        bench.pace("bare:fine_tune", backbone=bench.size.teacher, batch=EMOJI_BATCH, attack_steps=3) as bare,
    ):
        yield {"ours": _take_steps(ours, n), "bare": _take_steps(bare, n)}


@case("the same steps behind the frozen stages in plain torch, their activations computed before",
      Goal("step", "s", "bare", 1.1))  # fmt: skip
def pretrained_step(bench: Bench) -> Rounds:
    """ERM step of an EfficientNet-Lite0 (timm) at 64 px, first stages frozen and remembered, EmojiStyles, 3 x 16."""
    backbone: dict[str, Any] = {"backbone": PRETRAINED, "batch_size": 16, "n_views": 1}
    cut = {"weights": "none", "backbone_input_size": 64, "backbone_frozen": "stages:3"}
    n = bench.size.chunk
    with (
        _pace_engine(bench, dataset="EmojiStyles", holdout_fraction=0.9, hparams=backbone | cut) as ours,
        bench.pace("bare:train_tail", backbone=PRETRAINED, side=64, n_stages=3, batch=48) as bare,
    ):
        ours.advance(1 if n == 1 else 40)  # until every image has come
        yield {"ours": _take_steps(ours, n), "bare": _take_steps(bare, n)}


LOADER = "torch's own loader, a worker a thread, the same augmentation"


@case(LOADER, Goal("rate", "images/s", "host", 1.5, at_least=True))
def folder(bench: Bench) -> Rounds:
    """PACS-format folder, 224 px, augmented: images through the data path."""
    yield _read_folder(bench, cache=None)


@case(LOADER, Goal("rate", "images/s", "host", 3, at_least=True))
def folder_cached(bench: Bench) -> Rounds:
    """The same from a cache of decoded images, made before."""
    turns = _read_folder(bench, cache=str(bench.make_folder("cache")))
    turns["ours"]()
    yield turns


def _read_folder(bench: Bench, cache: str | None) -> dict[Column, Turn]:
    root, size = str(inputs.write_folder(bench.make_folder("folder"), bench.size.images)), bench.size
    work: dict[str, Any] = {"steps": size.read_steps, "batch": size.batch}

    def read_ours() -> float:
        hparams = json.dumps({"batch_size": size.batch, "backbone": "resnet8_w2"})
        place: dict[str, Any] = {"dataset": "PACS", "data_dir": root, "hparams": hparams, "cache": cache}
        rate: float = bench.call("ours:read_folder", folder=str(bench.make_folder("run")), **place, **work)
        return rate

    turns: dict[Column, Turn] = {
        "ours": lambda: {"rate": read_ours()},
        "bare": lambda: {"rate": bench.call("bare:read_folder", root=root, threads=bench.threads, **work)},
    }
    if bench.clone:
        turns["host"] = lambda: {"rate": bench.call("host:read_folder", with_host=True, root=root, **work)}
    return turns


@case("the forward passes in plain torch, 64 images at a time", Goal("pass", "s", "bare", 1.05))
def evaluation(bench: Bench) -> Rounds:
    """One checkpoint of the RotatedMNIST job: all splits, the record, the resume file."""
    root = str(inputs.write_digits(bench.make_folder("digits"), bench.size.digits))
    work: dict[str, Any] = {
        "folder": str(bench.make_folder("run")),
        "dataset": "RotatedMNIST",
        "data_dir": root,
        "checkpoint_freq": 1,
    }
    with bench.pace("ours:run_idle", **work) as ours, bench.pace("bare:evaluate_digits", root=root) as bare:
        yield {"ours": lambda: {"pass": ours.take_median(1)}, "bare": lambda: {"pass": bare.take_median(1)}}


@case("nothing", Goal("share", "%", None, 2))
def resume_file(bench: Bench) -> Rounds:
    """Writing the resume file, of a whole EmojiStyles run of ERM: 400 steps, a checkpoint every 100."""
    steps = 400 if bench.size.chunk > 1 else 2

    def measure() -> dict[str, float]:
        return {"share": bench.call("ours:measure_saving", folder=str(bench.make_folder("run")),
                                    dataset="EmojiStyles", steps=steps, checkpoint_freq=100)}  # fmt: skip

    yield {"ours": measure}


@case("every line parsed, nothing made of it", Goal("rate", "records/s", None, 100_000, at_least=True))
def collect_results(bench: Bench) -> Rounds:
    """`collect_results` over 200,000 records in 4,000 folders, its start included; upstream's without its imports."""
    root = inputs.write_records(bench.make_folder("sweep"), bench.size.folders)
    n_records = bench.size.folders * RECORDS_PER_FOLDER
    turns: dict[Column, Turn] = {
        "ours": lambda: {"rate": n_records / bench.time("daft_domainbed.scripts.collect_results", "--input_dir", root)},
        "bare": lambda: {"rate": bench.call("bare:read_records", root=str(root))},
    }
    if bench.clone:
        part = str(inputs.write_records(bench.make_folder("part"), bench.size.host_folders))
        turns["host"] = lambda: {"rate": bench.call("host:read_records", with_host=True, root=part)}
    yield turns


@case("one job at a time, with all threads", Goal("wall", "s", "bare"))
def demo(bench: Bench) -> Rounds:
    """A slice of the EmojiStyles demo: ERM for every style, as many jobs at a time as threads, one thread each."""

    def run(n_jobs: int, threads: int) -> dict[str, float]:
        flags = list_flags(dataset="EmojiStyles", algorithms="ERM", steps=bench.size.demo_steps, n_jobs=n_jobs)
        flags += list_flags(threads=threads, output_dir=bench.make_folder("demo"))
        return {"wall": bench.time("daft_domainbed.scripts.run", *flags)}

    yield {"ours": lambda: run(bench.threads, 1), "bare": lambda: run(1, bench.threads)}


# --- what rows have in common ---------------------------------------------------------------------------------------


def _pace_engine(bench: Bench, **args: Any) -> Any:
    if "hparams" in args:
        args["hparams"] = json.dumps(args["hparams"])
    return bench.pace("ours:run", folder=str(bench.make_folder("run")), **args)


def _pace_aft(bench: Bench, **hparams: Any) -> Any:
    teacher = {"teacher_backbone": bench.size.teacher, "teacher_steps": 8}
    return _pace_engine(bench, dataset="EmojiStyles", algorithm="AFT", hparams=teacher | hparams)


def _name(metric: str, measure: Callable[[], float]) -> Turn:
    return lambda: {metric: measure()}


def _take_steps(worker: Worker, n_steps: int) -> Turn:
    return _name("step", lambda: worker.take_median(n_steps))
