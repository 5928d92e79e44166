"""The train loop: DomainBed's records and checkpoints, resumable at any moment, without worker processes."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from daft_domainbed import checkpoints, hparams, plugin, provenance, randomness, resume, stopping, streams
from daft_domainbed.arguments import Job, TrainArgs, make_request, make_teacher_args, prepare
from daft_domainbed.backbones import share_features
from daft_domainbed.errors import RunError, UsageError
from daft_domainbed.image_cache import cache_images
from daft_domainbed.loaders import make_eval_stream, make_stream
from daft_domainbed.locks import Claim
from daft_domainbed.machine import describe_machine, keep_freed_memory
from daft_domainbed.precision import Precision, find_drawback
from daft_domainbed.provenance import Request, RunFacts
from daft_domainbed.run_folder import (
    DONE_FILE,
    RECORDS_FILE,
    RESUME_FILE,
    Log,
    explain_unwritable,
    format_row,
    keep_records,
    own,
    read_unfinished,
    remove_finished_run,
)
from daft_domainbed.splits import NO_UNLABELLED, Data, build_data, check_sizes, split_environments
from daft_domainbed.teacher import CHECKPOINT, PROVENANCE, Teacher

SECONDS_BETWEEN_SAVES = 60.0


def train(
    args: TrainArgs, *, quiet: bool = False, as_teacher: bool = False, on_step: Callable[[int, int], None] | None = None
) -> Path:
    """Train one model, or go on with the run that was interrupted in the same folder.

    Args:
        args: What to train.
        quiet: Write the rows of numbers to the run's files only.
        as_teacher: Its weights are what counts: another process that is at work in the same folder is waited for, and
            a finished run whose weights were removed is done again.
        on_step: Told after each step how many are done, and of how many.

    Returns:
        The run's folder.

    Raises:
        UsageError: An argument, the data, a teacher or the folder is not usable; nothing in the folder was lost.
        RunError: The loss became non-finite, or another process has taken the folder over.
        Stopped: As was asked through `stopping`; the same call goes on.
        OSError: The disk is full; the same call goes on once there is room.
    """
    job = prepare(args)
    folder = Path(args.output_dir)
    is_new = not os.path.exists(folder)  # False, too, where it may not be asked
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--output_dir {folder} is a file, not a folder: choose another") from error
    except OSError as error:
        raise explain_unwritable(folder, error) from error
    try:
        with own(folder, wait=as_teacher) as claim:
            if as_teacher and not (folder / CHECKPOINT).is_file():
                remove_finished_run(folder)
            saved = read_unfinished(args, folder)
            if saved is None and (folder / DONE_FILE).is_file():
                return folder
            for leftover in folder.glob(".*.tmp"):  # what a killed owner left half written
                leftover.unlink(missing_ok=True)
            _Run(job, folder, claim, Log(folder, quiet=quiet), on_step).execute(saved)
    finally:
        if is_new:
            with suppress(OSError):  # it stays, unless nothing came of it
                folder.rmdir()
    return folder


class _Run:
    """One run in its folder, from the first step or from where it was."""

    def __init__(
        self, job: Job, folder: Path, claim: Claim, log: Log, on_step: Callable[[int, int], None] | None
    ) -> None:
        self.job, self.folder, self.claim, self.log, self.on_step = job, folder, claim, log, on_step
        self.args, self.host, self.device = job.args, job.host, job.device
        self.began = datetime.now(timezone.utc)
        self.hparams = dict(job.hparams)  # the algorithm replaces each "auto" by its value

    def execute(self, saved: dict[str, Any] | None) -> None:
        args = self.args
        randomness.seed_everything(args.seed if args.data_seed is None else args.data_seed)
        keep_freed_memory()
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        self.request = make_request(args, self.job.n_steps)
        self.data = build_data(self.host, self.request, self.hparams, self.job.dataset_class)
        if args.data_seed is not None:
            randomness.seed_everything(args.seed)
        check_sizes(self.data, self.request, self.hparams, self.job.dataset_class.ENVIRONMENTS)
        if args.task == "domain_adaptation" and not self.data.uda_splits:
            raise UsageError(NO_UNLABELLED)
        if args.image_cache:
            cache_images(self.data.dataset, Path(args.image_cache), self.log.warn)
        self._make_streams()
        self.facts = _gather_facts(args, self.host, self.request, self.data, self.hparams, self.folder, self.log.warn)
        if saved is not None and saved["step"] == 0:
            saved = None  # nothing was trained yet, so that an image may have been mended meanwhile
            (self.folder / "out.txt").unlink(missing_ok=True)
        if saved is not None:
            self._check_data(saved)
        dataset = self.data.dataset
        n_domains = len(dataset) - len(args.test_envs)
        with provenance.run_in_progress(self.facts):
            algorithm_class = plugin.get_algorithm_class(self.host, args.algorithm)
            self.algorithm = algorithm_class(dataset.input_shape, dataset.num_classes, n_domains, self.hparams)
        self._say_which_teacher()
        self.algorithm.to(self.device)
        if drawback := find_drawback(args.precision, self.device):
            self.log.warn(drawback)
        self.precision = Precision(args.precision, self.device)
        self.precision.prepare(self.algorithm, dataset.input_shape)
        if teacher := self._get_teacher():
            self.precision.prepare(teacher.model, dataset.input_shape)
        if args.feature_cache:
            self._share_features(Path(args.feature_cache))
        self._start(saved)
        self._loop()
        self._finish()

    def _share_features(self, folder: Path) -> None:
        """Keep on disk what backbones encode that no training changed: of others every run has its own."""
        teacher = self._get_teacher()
        models = [(self.algorithm, self.hparams), *([(teacher.model, teacher.hparams)] if teacher else [])]
        for model, wanted in models:
            if wanted.get("backbone_frozen") or wanted.get("teacher_frozen"):
                share_features(model, folder, self.log.warn)

    def _say_which_teacher(self) -> None:
        """Name the teacher that a file or folder gave, and the hyperparameters that would have made another one."""
        teacher = self._get_teacher_facts()
        if not teacher or self.hparams["teacher"] == "auto":
            return
        self.log.warn(f"the teacher is {teacher['path']} ({teacher['algorithm']})")
        made_by = ("teacher_", "aft_") if hparams.TEACHER_KINDS[self.args.algorithm] == "AFT" else ("teacher_",)
        if idle := sorted(name for name in self.job.user_hparams if name.startswith(made_by)):
            self.log.warn(
                f"{', '.join(idle)} have no effect: the teacher was named, not made; its own are in its records"
            )

    def _make_streams(self) -> None:
        """Make the loaders in upstream's order, since each draws from the global generator as it is made."""
        data, workers = self.data, self.data.dataset.N_WORKERS
        balanced = self.hparams["class_balanced"]
        weigh = self.host.misc.make_weights_for_balanced_classes

        # Upstream weighs every split, in this order; doing so reads images through their random augmentation.
        weights: dict[int, Any] = {}
        if balanced:
            for i, splits in enumerate(data.list_splits()):
                for split in (*splits, *([data.uda_splits[i]] if i in data.uda_splits else [])):
                    weights[id(split)] = weigh(split)

        def make(split: Any) -> streams.Stream:
            return make_stream(split, self.hparams["batch_size"], workers, weights.get(id(split)))

        self.train_streams = [make(in_) for i, in_ in enumerate(data.in_splits) if i not in self.args.test_envs]
        uda_splits = list(data.uda_splits.values())
        self.uda_streams = [make(uda) for uda in uda_splits]
        self.eval_streams = {
            f"env{i}_{part}": make_eval_stream(split, workers)
            for part, splits in (("in", data.in_splits), ("out", data.out_splits), ("uda", uda_splits))
            for i, split in enumerate(splits)
        }

    def _check_data(self, saved: Mapping[str, Any]) -> None:
        differences = provenance.compare(saved["provenance"], self.facts.provenance)
        if differences:
            raise UsageError(
                f"the data have changed since {self.folder} was begun ({'; '.join(differences)}): bring them back, or "
                f"choose another --output_dir"
            )

    def _start(self, saved: dict[str, Any] | None) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)
        self.printed_keys: list[str] | None = None
        self.best = -math.inf
        self.step = 0
        self.seconds = 0.0
        self.n_records = 0
        if unsaved := resume.list_unsaved(self.algorithm):
            self.log.warn(
                f"{self.folder}: should this run be interrupted, it may not go on exactly where it was, because "
                f"{', '.join(unsaved)} of {self.args.algorithm} cannot be saved"
            )
        if saved is None:
            self._print_header()
            (self.folder / "err.txt").touch()
            # A folder is claimed by its arguments before the first step, however long that takes.
            self._save_resume(pending=None)
            return
        if saved["teacher"] != (teacher := self._get_teacher_facts()).get("sha256"):
            raise UsageError(
                f"another teacher ({teacher['path']}) answers now than when {self.folder} was begun: bring that one "
                f"back, or choose another --output_dir"
            )
        keep_records(self.folder, saved)
        resume.restore(self.algorithm, saved["algorithm"])
        self.precision.load_state_dict(saved["precision"])
        for stream, state in zip(self._list_streams(), saved["streams"], strict=True):
            stream.load_state_dict(state)
        randomness.restore_states(saved["random"])
        self.values = defaultdict(list, {name: list(values) for name, values in saved["values"].items()})
        self.best, self.step, self.seconds = saved["best"], saved["step"], saved["seconds"]
        self.n_records = saved["n_records"]
        self.saved_at = time.monotonic()
        if self.step:
            self.log.warn(f"{self.folder}: going on at step {self.step} of {self.job.n_steps}")

    def _list_streams(self) -> list[streams.Stream]:
        return [*self.train_streams, *self.uda_streams, *self.eval_streams.values()]

    def _loop(self) -> None:
        self.saved_at = time.monotonic()
        steps_per_epoch = min(len(split) / self.hparams["batch_size"] for split in self.data.in_splits)
        while self.step < self.job.n_steps:
            step, started = self.step, time.perf_counter()
            minibatches = [self._to_device(next(stream)) for stream in self.train_streams]
            unlabelled = None
            if self.args.task == "domain_adaptation":
                unlabelled = [self._to_device(next(stream))[0] for stream in self.uda_streams]
            with self.precision.active():
                values = self.algorithm.update(minibatches, unlabelled)
            elapsed = time.perf_counter() - started
            self.values["step_time"].append(elapsed)
            self.seconds += elapsed
            for name, value in values.items():
                if not math.isfinite(float(value)):
                    raise RunError(self._explain_non_finite(name, float(value)))
                self.values[name].append(float(value))
            self.step += 1
            if step % self.job.checkpoint_freq == 0 or self.step == self.job.n_steps:
                self._record(step, step / steps_per_epoch)
            elif time.monotonic() - self.saved_at > SECONDS_BETWEEN_SAVES:
                self._save_resume(pending=None)
            if self.on_step is not None:
                self.on_step(self.step, self.job.n_steps)
            if stopping.is_requested() and self.step < self.job.n_steps:
                self._save_resume(pending=None)
                raise stopping.Stopped(
                    f"stopped at step {self.step} of {self.job.n_steps} in {self.folder}; the same command goes on"
                )

    def _to_device(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = batch
        if self.device.type == "cuda":
            x = x.pin_memory()  # only from there can it be copied while the GPU computes
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _explain_non_finite(self, name: str, value: float) -> str:
        kept = ", ".join(file for file in (RESUME_FILE, "model_best.pkl") if (self.folder / file).is_file())
        return (
            f"step {self.step}: {name} is {value}; the run was stopped and its last good state kept in {self.folder} "
            f"({kept}). Choose another --output_dir with a lower lr than {self.hparams.get('lr')}"
        )

    def _record(self, step: int, epoch: float) -> None:
        """Evaluate, then make the checkpoint's record, its model and its resume point last, in that order."""
        self.claim.check()
        started = time.perf_counter()
        record: dict[str, Any] = {"step": step, "epoch": epoch}
        record |= {name: float(np.mean(values)) for name, values in self.values.items()}
        for name, stream in self.eval_streams.items():
            with self.precision.active():
                record[f"{name}_acc"] = self.host.misc.accuracy(self.algorithm, stream, None, self.device)
        record["mem_gb"] = torch.cuda.max_memory_allocated() / 1024.0**3
        self._print_row(record)
        self.values.clear()
        self.seconds += time.perf_counter() - started

        record |= {"hparams": self.hparams, "args": asdict(self.args)}
        if not self.n_records:
            record["environments"] = list(self.job.dataset_class.ENVIRONMENTS)
            record["started"] = self.began.isoformat(timespec="seconds")
            record["machine"] = describe_machine(self.device, self.args.precision)
            if teacher := self._get_teacher_facts():
                record["teacher"] = teacher
        if self.step == self.job.n_steps:
            record["seconds"] = self.seconds
        self.n_records += 1
        line = json.dumps(record, sort_keys=True)

        self._save_if_best(record)
        if self.args.save_model_every_checkpoint:
            self._save_model(f"model_step{step}.pkl")
        # The resume file holds the record, so that a kill between the two writes loses neither.
        self._save_resume(pending=line)
        with (self.folder / RECORDS_FILE).open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _print_header(self) -> None:
        machine = describe_machine(self.device, self.args.precision)
        sections = {"Environment": machine, "Args": asdict(self.args), "HParams": self.hparams}
        lines = []
        for title, content in sections.items():
            lines += [f"{title}:", *(f"\t{name}: {value}" for name, value in sorted(content.items()))]
        self.log.write("\n".join(lines))

    def _print_row(self, record: Mapping[str, Any]) -> None:
        keys = sorted(record)
        if keys != self.printed_keys:
            self.log.write(format_row(keys))
            self.printed_keys = keys
        self.log.write(format_row([record[key] for key in keys]))

    def _save_if_best(self, record: Mapping[str, Any]) -> None:
        """Keep the checkpoint that training-domain validation chooses; held-out domains have no say."""
        trained = [i for i in range(len(self.data.out_splits)) if i not in self.args.test_envs]
        validation = sum(record[f"env{i}_out_acc"] for i in trained) / len(trained)
        if validation > self.best:
            self.best = validation
            self._save_model("model_best.pkl")

    def _get_teacher(self) -> Teacher | None:
        teacher = getattr(self.algorithm, "teacher", None)
        return teacher if isinstance(teacher, Teacher) else None

    def _get_teacher_facts(self) -> dict[str, Any]:
        teacher = self._get_teacher()
        return teacher.facts if teacher else {}

    def _save_model(self, name: str) -> None:
        if self.args.skip_model_save:
            return
        dataset = self.data.dataset
        content = {
            "args": asdict(self.args),
            "model_input_shape": tuple(dataset.input_shape),
            "model_num_classes": dataset.num_classes,
            "model_num_domains": len(dataset) - len(self.args.test_envs),
            "model_hparams": self.hparams,
            "model_dict": self.algorithm.state_dict(),
            "provenance": self.facts.provenance,
            "step": self.step - 1,
        }
        checkpoints.save(content, self.folder / name)

    def _save_resume(self, pending: str | None) -> None:
        self.claim.check()
        content = {
            "args": asdict(self.args),
            "provenance": self.facts.provenance,
            "teacher": self._get_teacher_facts().get("sha256"),
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "values": dict(self.values),
            "n_records": self.n_records,
            "pending": pending,
            "algorithm": resume.capture(self.algorithm),
            "precision": self.precision.state_dict(),
            "streams": [stream.state_dict() for stream in self._list_streams()],
            "random": randomness.capture_states(),
        }
        checkpoints.save(content, self.folder / RESUME_FILE)
        self.saved_at = time.monotonic()

    def _finish(self) -> None:
        self._save_model("model.pkl")
        checkpoints.write_text(self.folder / DONE_FILE, "done")
        (self.folder / RESUME_FILE).unlink(missing_ok=True)


def _gather_facts(
    args: TrainArgs,
    host: plugin.Host,
    request: Request,
    data: Data,
    hparams_: Mapping[str, Any],
    folder: Path,
    warn: Callable[[str], None],
) -> RunFacts:
    """Return what a run's algorithm has to know to find, make and check its teacher."""
    store = Path(args.teachers_dir) if args.teachers_dir else folder.resolve().parent / "teachers"

    def train_teacher(teacher: Request, user: dict[str, Any], teacher_folder: Path) -> None:
        warn(f"{args.algorithm} needs a teacher: training {teacher.algorithm} in {teacher_folder}")
        train(make_teacher_args(args, teacher, user, teacher_folder), quiet=True, as_teacher=True)

    def rebuild(theirs: Mapping[str, Any]) -> dict[str, Any]:
        names = ("trial_seed", "seed", "holdout_fraction", "task", "uda_holdout_fraction")
        values = {name: theirs[name] for name in names}
        other = replace(request, **values, test_envs=tuple(theirs["test_envs"]), data_seed=None)
        with randomness.preserve_states():
            randomness.seed_everything(other.seed)
            its = build_data(host, other, hparams_, plugin.get_dataset_class(host, other.dataset))
        return provenance.describe(other, its.dataset.num_classes, its.dataset.input_shape, its.list_splits())

    return RunFacts(
        request=request,
        user_hparams=hparams.parse_json(args.hparams),
        num_classes=data.dataset.num_classes,
        input_shape=tuple(data.dataset.input_shape),
        input_spec=plugin.get_input_spec(host, args.dataset),
        splits=data.list_splits(),
        host=host,
        output_dir=folder.resolve(),
        teachers_dir=store,
        train=train_teacher,
        rebuild=rebuild,
        precision=args.precision,
    )


def follow_upstream_run(args: TrainArgs) -> Callable[[Any, Mapping[str, Any]], None]:
    """Return what gathers the facts of a run of upstream's own loop, to be called when its data set has been built.

    From then on its algorithm can find, make and check a teacher; what upstream's checkpoint and records cannot carry
    (provenance, names of the environments, the teacher) lies beside them in `provenance.json`.

    Raises:
        UsageError: From the returned function, where upstream would wait for ever for a batch that does not come.
    """
    host = plugin.find_host("upstream")
    is_built = False

    def built(dataset: Any, hparams_: Mapping[str, Any]) -> None:
        nonlocal is_built
        if is_built:  # a teacher's data set, not the run's own
            return
        is_built = True
        request = make_request(args, args.steps or dataset.N_STEPS)
        data = split_environments(host, request, dataset)
        check_sizes(data, request, hparams_, type(dataset).ENVIRONMENTS)
        folder = Path(args.output_dir)

        def write_beside(**found: Any) -> None:
            names = list(type(dataset).ENVIRONMENTS)
            beside = facts.provenance | {"seed": args.seed, "environments": names} | found
            checkpoints.write_text(folder / PROVENANCE, json.dumps(beside, sort_keys=True) + "\n")

        facts = replace(
            _gather_facts(args, host, request, data, hparams_, folder, lambda text: print(text, file=sys.stderr)),
            announce=lambda teacher: write_beside(teacher=teacher),
        )
        write_beside()
        provenance.set_run_facts(facts)

    return built
