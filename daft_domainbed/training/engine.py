"""The train loop: DomainBed's records and checkpoints, resumable at any moment, without worker processes."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.data.image_cache import cache_images
from daft_domainbed.data.loaders import make_eval_stream, make_stream
from daft_domainbed.data.splits import build_data, cap_batch_size
from daft_domainbed.data.streams import Stream
from daft_domainbed.data.views import Views, make_views
from daft_domainbed.embedded.image_folder import list_notes
from daft_domainbed.errors import RunError, UsageError
from daft_domainbed.host.contract import get_algorithm_class
from daft_domainbed.methods import list_slots
from daft_domainbed.models.backbones import freeze_for_probe
from daft_domainbed.models.frozen import share_features
from daft_domainbed.runtime import randomness, stopping
from daft_domainbed.runtime.layout import BEST_CHECKPOINT_FILE, CHECKPOINT_FILE, DONE_FILE, RESUME_FILE
from daft_domainbed.runtime.locks import Claim, acquire, explain_unwritable
from daft_domainbed.runtime.machine import keep_freed_memory
from daft_domainbed.runtime.origins import list_doubts
from daft_domainbed.teachers import provenance
from daft_domainbed.teachers.facts import RunFacts, run_in_progress
from daft_domainbed.teachers.find import find_teachers
from daft_domainbed.training import resume
from daft_domainbed.training.averaging import WeightAverage
from daft_domainbed.training.faults import check_update, explain_missing_hparams
from daft_domainbed.training.first_network import go_on_as_begun
from daft_domainbed.training.lists import ListMeasures
from daft_domainbed.training.precision import Precision, find_drawback
from daft_domainbed.training.prepare import Prepared, check_data, gather_facts, prepare
from daft_domainbed.training.recorder import Progress, Recorder
from daft_domainbed.training.run_folder import Log, read_unfinished, remove_finished_run
from daft_domainbed.training.schedule import Schedule
from daft_domainbed.training.sizes import measure_networks

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
    run = prepare(args)
    folder = Path(args.output_dir)
    is_new = not os.path.exists(folder)  # False, too, where it may not be asked
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--output_dir {folder} is a file, not a folder: choose another") from error
    except OSError as error:
        raise explain_unwritable(folder, error) from error
    try:
        with acquire(folder, wait=as_teacher) as claim:
            if as_teacher and not (folder / CHECKPOINT_FILE).is_file():
                remove_finished_run(folder)
            saved = read_unfinished(args, folder)
            if saved is None and (folder / DONE_FILE).is_file():
                if not quiet:
                    print(f"{folder} is done already, with the same data and arguments", file=sys.stderr)
                return folder
            for leftover in folder.glob(".*.tmp"):  # what a killed owner left half written
                leftover.unlink(missing_ok=True)
            run = go_on_as_begun(run, folder, saved) if saved else run
            _Run(run, folder, claim, Log(folder, quiet=quiet), on_step).execute(saved)
    finally:
        if is_new:
            with suppress(OSError):  # it stays, unless nothing came of it
                folder.rmdir()
    return folder


def train_teacher(args: TrainArgs, algorithm: str, warn: Callable[[str], None]) -> None:
    """Train a teacher that a run lacks, in its own folder.

    Args:
        args: Of the teacher's job.
        algorithm: Of the run that needs it.
        warn: Told that this may take a while.
    """
    warn(f"{algorithm} needs a teacher: training {args.algorithm} in {args.output_dir}")
    train(args, quiet=True, as_teacher=True)


class _Run:
    """One run in its folder, from the first step or from where it was."""

    def __init__(
        self, run: Prepared, folder: Path, claim: Claim, log: Log, on_step: Callable[[int, int], None] | None
    ) -> None:
        self.run, self.folder, self.claim, self.log, self.on_step = run, folder, claim, log, on_step
        self.args, self.host, self.device = run.complete_args, run.host, run.device
        self.hparams = dict(run.hparams)  # the algorithm replaces each "auto" by its value

    def execute(self, saved: dict[str, Any] | None) -> None:
        self._seed()
        self.data = build_data(self.host, self.args, self.hparams, self.run.dataset.dataset_class)
        if self.args.data_seed is not None:
            randomness.seed_everything(self.args.seed)
        sizes = check_data(self.data, self.run)
        self.hparams["batch_size"] = cap_batch_size(sizes, self.args, self.hparams)
        for note in () if self.log.quiet else list_notes(self.args.dataset, self.data.dataset):
            self.log.warn(note)
        if self.args.image_cache:
            cache_images(self.data.dataset, Path(self.args.image_cache), self.log.warn)
        self._make_streams()
        facts = gather_facts(
            self.args, self.host, self.run.dataset, self.data, self.run.user_hparams, self.hparams, self.folder
        )
        saved = self._check_saved(saved, facts)
        teachers = find_teachers(facts, lambda args: train_teacher(args, self.args.algorithm, self.log.warn))
        self.facts = facts.with_teachers(teachers)
        self._build_algorithm()
        self._say_which_teachers()
        self._start(saved)
        try:
            self._loop()
            self.recorder.finish(self.algorithm, self.progress, self.average)
        finally:
            self.recorder.mirror.close()

    def _seed(self) -> None:
        randomness.seed_everything(self.args.seed if self.args.data_seed is None else self.args.data_seed)
        keep_freed_memory()
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False

    def _make_streams(self) -> None:
        """Make the loaders in upstream's order, since each draws from the global generator as it is made."""
        data, workers = self.data, self.data.dataset.N_WORKERS
        weigh = self.host.misc.make_weights_for_balanced_classes

        # Upstream weighs every split, in this order; doing so reads images through their random augmentation.
        weights: dict[int, Any] = {}
        if self.hparams["class_balanced"]:
            for i, splits in enumerate(data.list_splits()):
                for split in (*splits, *([data.uda_splits[i]] if i in data.uda_splits else [])):
                    weights[id(split)] = weigh(split)

        held_out, n = self.args.test_envs, len(data.in_splits)  # images of what is held out are not augmented
        views = [None if env in held_out else make_views(self.hparams, self.args.seed, env) for env in range(n)]

        def make(split: Any, views: Views | None = None) -> Stream:
            return make_stream(split, self.hparams["batch_size"], workers, weights.get(id(split)), views)

        self.train_streams = [make(data.in_splits[env], views[env]) for env in range(n) if env not in held_out]
        self.uda_streams = [make(uda) for uda in data.uda_splits.values()]
        self.eval_streams = {
            f"env{i}_{part}": make_eval_stream(split, workers, None if part == "uda" else views[i])
            for part, splits in (("in", data.in_splits), ("out", data.out_splits), ("uda", data.uda_splits.values()))
            for i, split in enumerate(splits)
        }

    def _check_saved(self, saved: dict[str, Any] | None, facts: RunFacts) -> dict[str, Any] | None:
        """Return what the run goes on from, if it is the same run still."""
        if saved is None:
            return None
        if "parts" not in saved:
            raise UsageError(
                f"{self.folder} was begun by an earlier version, which this one cannot go on with: finish it there, "
                f"choose another --output_dir, or delete it"
            )
        if saved["step"] == 0:  # nothing was trained yet, so that an image may have been mended meanwhile
            (self.folder / "out.txt").unlink(missing_ok=True)
            return None
        if differences := provenance.compare(saved["provenance"], facts.provenance):
            raise UsageError(
                f"the data have changed since {self.folder} was begun ({'; '.join(differences)}): bring them back, or "
                f"choose another --output_dir"
            )
        return saved

    def _say_which_teachers(self) -> None:
        """Name the teachers that files or folders gave, and the hyperparameters that would have made other ones."""
        for line in list_doubts(self.facts.origins):
            self.log.warn(line)
        for slot in list_slots(self.args.algorithm, self.hparams):
            teacher = self.facts.teachers[slot.prefix]
            if self.hparams.get(slot.prefix, "auto") == "auto":
                continue
            self.log.warn(f"the {slot.prefix} is {teacher.facts['path']} ({teacher.facts['algorithm']})")
            made_by = (f"{slot.prefix}_", *(prefix for prefix in slot.passes if prefix != slot.prefix))
            if idle := sorted(name for name in self.run.user_hparams if name.startswith(made_by)):
                self.log.warn(
                    f"{', '.join(idle)} have no effect: the {slot.prefix} was named, not made; its own are in its "
                    f"records"
                )

    def _build_algorithm(self) -> None:
        dataset, args = self.data.dataset, self.args
        if drawback := find_drawback(args.precision, self.device):
            self.log.warn(drawback)
        self.precision = Precision(args.precision, self.device)
        for teacher in self.facts.teachers.values():  # before a method asks them anything
            self._prepare_model(teacher.model, teacher.hparams)
        with run_in_progress(self.facts):
            kind = get_algorithm_class(self.host, args.algorithm)
            num_domains = len(dataset) - len(args.test_envs)
            with explain_missing_hparams(args.algorithm, self.hparams):
                self.algorithm = kind(dataset.input_shape, dataset.num_classes, num_domains, self.hparams)
        self.algorithm.to(self.device)
        self._prepare_model(self.algorithm, self.hparams)
        self.schedule = Schedule(self.hparams.get("lr_schedule", "constant"), self.run.n_steps, self.algorithm)
        start = self.hparams.get("average_start", "never")
        self.average = None if start == "never" else WeightAverage(start, self.device)
        has_lists = self.run.dataset.has_texts and bool(args.test_envs)
        self.lists = ListMeasures(self.data, args.test_envs, self.device) if has_lists else None

    def _prepare_model(self, model: Any, hparams: Mapping[str, Any]) -> None:
        self.precision.prepare(model, self.data.dataset.input_shape)
        # What backbones encode that no training changed is kept for all jobs; of others every run has its own.
        if self.args.feature_cache and any(value for name, value in hparams.items() if name.endswith("_frozen")):
            share_features(model, Path(self.args.feature_cache), self.log.warn)

    def _start(self, saved: dict[str, Any] | None) -> None:
        streams = [*self.train_streams, *self.uda_streams, *self.eval_streams.values()]
        parts: dict[str, Any] = {f"stream{i}": stream for i, stream in enumerate(streams)}
        parts |= {"precision": self.precision} | ({} if self.average is None else {"average": self.average})
        sizes = measure_networks(self.facts, self.log.note)
        self.recorder = Recorder(
            self.run, self.folder, self.claim, self.log, self.facts, self.data.dataset, parts, sizes
        )
        if unsaved := resume.list_unsaved(self.algorithm):
            self.log.warn(
                f"{self.folder}: should this run be interrupted, it may not go on exactly where it was, because "
                f"{', '.join(unsaved)} of {self.args.algorithm} cannot be saved"
            )
        if saved is None:
            self.progress = Progress()
            self.recorder.begin(self.algorithm, self.progress)
            return
        for prefix, teacher in self.facts.teachers.items():
            if saved["teachers"].get(prefix) != teacher.facts["sha256"]:
                raise UsageError(
                    f"another {prefix} ({teacher.facts['path']}) answers now than when {self.folder} was begun: bring "
                    f"that one back, or choose another --output_dir"
                )
        self.progress = self.recorder.go_on(self.algorithm, saved)
        self.log.warn(f"{self.folder}: going on at step {self.progress.step} of {self.run.n_steps}")

    def _loop(self) -> None:
        progress, n_steps = self.progress, self.run.n_steps
        probe_steps = self.hparams.get("probe_steps", 0)
        probe = freeze_for_probe(self.algorithm) if progress.step < probe_steps else None
        steps_per_epoch = min(len(split) / self.hparams["batch_size"] for split in self.data.in_splits)
        while progress.step < n_steps:
            step = progress.step
            if probe is not None and step == probe_steps:
                probe.thaw()
            self.schedule.apply(self.algorithm, step)
            self._take_step()
            if step % self.run.checkpoint_freq == 0 or progress.step == n_steps:
                self._record(step, step / steps_per_epoch)
            elif time.monotonic() - self.recorder.saved_at > SECONDS_BETWEEN_SAVES:
                self.recorder.save_resume(self.algorithm, progress)
            if self.on_step is not None:
                self.on_step(progress.step, n_steps)
            if stopping.is_requested() and progress.step < n_steps:
                self.recorder.save_resume(self.algorithm, progress)
                raise stopping.Stopped(
                    f"stopped at step {progress.step} of {n_steps} in {self.folder}; the same command goes on"
                )

    def _take_step(self) -> None:
        progress, started = self.progress, time.perf_counter()
        minibatches = [self._to_device(next(stream)) for stream in self.train_streams]
        unlabelled = None
        if self.args.task == "domain_adaptation":
            unlabelled = [self._to_device(next(stream))[0] for stream in self.uda_streams]
        with self.precision.active(), explain_missing_hparams(self.args.algorithm, self.hparams):
            values = self.algorithm.update(minibatches, unlabelled)
        check_update(self.args.algorithm, values)
        elapsed = time.perf_counter() - started
        progress.values["step_time"].append(elapsed)
        progress.seconds += elapsed
        for name, value in values.items():
            if not math.isfinite(float(value)):
                raise RunError(self._explain_non_finite(name, float(value)))
            progress.values[name].append(float(value))
        progress.step += 1
        if self.average is not None:
            self.average.update(self.algorithm, progress.step)

    def _to_device(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = batch
        if self.device.type == "cuda":
            x = x.pin_memory()  # only from there can it be copied while the GPU computes
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _evaluate(self) -> dict[str, float]:
        accuracies = {}
        for name, stream in self.eval_streams.items():
            with self.precision.active():
                accuracies[f"{name}_acc"] = self.host.misc.accuracy(self.algorithm, stream, None, self.device)
        return accuracies

    def _explain_non_finite(self, name: str, value: float) -> str:
        kept = ", ".join(file for file in (RESUME_FILE, BEST_CHECKPOINT_FILE) if (self.folder / file).is_file())
        return (
            f"step {self.progress.step}: {name} is {value}; the run was stopped and its last good state kept in "
            f"{self.folder} ({kept}). Choose another --output_dir with a lower lr than {self.hparams.get('lr')}"
        )

    def _record(self, step: int, epoch: float) -> None:
        """Evaluate, and have the checkpoint written."""
        self.claim.check()
        started = time.perf_counter()
        record: dict[str, Any] = {"step": step, "epoch": epoch}
        record |= {name: float(np.mean(values)) for name, values in self.progress.values.items()}
        averaged = self.average.read_out(self.algorithm, self.eval_streams, self._evaluate) if self.average else {}
        record |= (plain := self._evaluate())
        if self.lists is not None:
            record |= self.lists.measure(self.algorithm, is_attacked=step > 0)
        if self.average is not None:
            record |= {f"averaged_{name}": value for name, value in (averaged or plain).items()}
        record["mem_gb"] = (
            torch.cuda.max_memory_allocated(self.device) / 1024.0**3 if self.device.type == "cuda" else 0.0
        )
        self.progress.values.clear()
        self.progress.seconds += time.perf_counter() - started
        self.recorder.write(self.algorithm, self.progress, record)
