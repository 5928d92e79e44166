"""The train loop: DomainBed's records and checkpoints, resumable at any moment, without worker processes."""

from __future__ import annotations

import errno
import ctypes
import fcntl
import json
import math
import os
import platform
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from daft_domainbed import __version__, checkpoints, hparams, plugin, provenance, randomness, resume, streams
from daft_domainbed.errors import RunError, UsageError
from daft_domainbed.loaders import make_eval_stream, make_stream
from daft_domainbed.precision import Precision, check_precision
from daft_domainbed.provenance import Request, RunFacts
from daft_domainbed.teacher import PROVENANCE, Teacher

RESUME_FILE = "resume.pt"
RECORDS_FILE = "results.jsonl"
LOCK_FILE = ".lock"
SECONDS_BETWEEN_SAVES = 60.0
COLUMN_WIDTH = 12

# Where a run lies, where its data and teachers lie (what they hold is verified) and on what it runs may change between
# two starts.
_MOVABLE = ("output_dir", "data_dir", "teachers_dir", "device")
_LARGEST_SEED = 2**32 - 1  # NumPy's


@dataclass(frozen=True)
class TrainArgs:
    """The arguments of one training run: DomainBed's flags, and ours.

    Attributes:
        data_seed: What the data set is built under where it is not `seed`: a teacher's data are its student's.
        teachers_dir: The store of teachers; None is `teachers/` beside the output folder.
    """

    dataset: str = "RotatedMNIST"
    algorithm: str = "ERM"
    task: str = "domain_generalization"
    hparams: str | None = None
    hparams_seed: int = 0
    trial_seed: int = 0
    seed: int = 0
    steps: int | None = None
    checkpoint_freq: int | None = None
    test_envs: list[int] = field(default_factory=lambda: [0])
    output_dir: str = "train_output"
    data_dir: str | None = None
    holdout_fraction: float = 0.2
    uda_holdout_fraction: float = 0.0
    skip_model_save: bool = False
    save_model_every_checkpoint: bool = False
    host: str = "embedded"
    device: str = "auto"
    precision: str = "fp32"
    teachers_dir: str | None = None
    data_seed: int | None = None


def train(
    args: TrainArgs, *, quiet: bool = False, wait: bool = False, on_step: Callable[[int, int], None] | None = None
) -> Path:
    """Train one model, or go on with the run that was interrupted in the same folder.

    Args:
        args: What to train.
        quiet: Write the rows of numbers to the run's files only.
        wait: Wait for another process that is at work in the same folder, instead of refusing.
        on_step: Told after each step how many are done, and of how many.

    Returns:
        The run's folder.

    Raises:
        UsageError: An argument, the data, a teacher or the folder is not usable; nothing in the folder was lost.
        RunError: The loss became non-finite.
        OSError: The disk is full; the same call goes on once there is room.
    """
    job = _prepare(args)
    folder = Path(args.output_dir)
    is_new = not os.path.exists(folder)  # False, too, where it may not be asked
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--output_dir {folder} is a file, not a folder: choose another") from error
    except OSError as error:
        raise _explain_unwritable(folder, error) from error
    try:
        with _locked(folder, wait=wait):
            saved = _read_unfinished(job, folder)
            if saved is None and (folder / "done").is_file():
                return folder
            for leftover in folder.glob(".*.tmp"):  # what a killed owner left half written
                leftover.unlink()
            _Run(job, folder, _Log(folder, quiet=quiet), on_step).execute(saved)
    finally:
        if is_new:
            with suppress(OSError):  # it stays, unless nothing came of it
                folder.rmdir()
    return folder


# --- arguments ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """Arguments that were checked, with what follows from them."""

    args: TrainArgs
    host: plugin.Host
    dataset_class: Any
    user_hparams: dict[str, Any]
    hparams: dict[str, Any]
    device: torch.device
    n_steps: int
    checkpoint_freq: int


def _prepare(args: TrainArgs) -> _Job:
    host = plugin.find_host(args.host)
    plugin.register(host)
    plugin.get_algorithm_class(host, args.algorithm)
    dataset_class = plugin.get_dataset_class(host, args.dataset)
    check_test_envs(args.test_envs, len(dataset_class.ENVIRONMENTS), args.dataset)
    if not 0 < args.holdout_fraction < 1:
        raise UsageError(f"--holdout_fraction is {args.holdout_fraction}: it must lie between 0 and 1")
    if not 0 <= args.uda_holdout_fraction < 1:
        raise UsageError(f"--uda_holdout_fraction is {args.uda_holdout_fraction}: it must be at least 0 and below 1")
    device = _find_device(args.device)
    check_precision(args.precision, device)
    user = hparams.parse_json(args.hparams)
    resolved = resolve_hparams(host, args, user)
    n_steps = dataset_class.N_STEPS if args.steps is None else args.steps
    checkpoint_freq = dataset_class.CHECKPOINT_FREQ if args.checkpoint_freq is None else args.checkpoint_freq
    for name, value in (("--steps", n_steps), ("--checkpoint_freq", checkpoint_freq)):
        if value < 1:
            raise UsageError(f"{name} is {value}: it must be at least 1")
    for name, seed in (("--seed", args.seed), ("--data_seed", args.data_seed)):
        if seed is not None and not 0 <= seed <= _LARGEST_SEED:
            raise UsageError(f"{name} is {seed}: it must lie between 0 and {_LARGEST_SEED}")
    return _Job(args, host, dataset_class, user, resolved, device, n_steps, checkpoint_freq)


def check_test_envs(test_envs: Sequence[int], n_envs: int, dataset: str) -> None:
    """Refuse test environments that do not exist, repeat, or leave nothing to train on.

    Raises:
        UsageError: Names the value.
    """
    for env in test_envs:
        if not 0 <= env < n_envs:
            raise UsageError(f"--test_envs {env}: {dataset} has {n_envs} environments, numbered 0 to {n_envs - 1}")
    if len(set(test_envs)) < len(test_envs):
        raise UsageError(f"--test_envs {' '.join(map(str, test_envs))}: an environment is named twice")
    if len(test_envs) >= n_envs:
        raise UsageError(
            f"--test_envs {' '.join(map(str, test_envs))}: all {n_envs} environments of {dataset} are held out; "
            f"leave at least one to train on"
        )


def resolve_hparams(host: plugin.Host, args: TrainArgs, user: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a run: defaults or a random draw, then the user's own.

    Raises:
        UsageError: A name that neither the algorithm nor its teachers know, or a value that cannot be.
    """
    algorithms = list_stages(args.algorithm)
    defaults = {name: plugin.get_default_hparams(host, name, args.dataset, user) for name in algorithms}
    hparams.check_names(user, {key for known in defaults.values() for key in known}, algorithms)
    for known in defaults.values():
        hparams.check_values(user, known)
    resolved = defaults[args.algorithm]
    if args.hparams_seed:
        seed = host.misc.seed_hash(args.hparams_seed, args.trial_seed)
        resolved = plugin.get_random_hparams(host, args.algorithm, args.dataset, user, seed)
    return resolved | {name: value for name, value in user.items() if name in resolved}


def list_stages(algorithm: str) -> list[str]:
    """Return an algorithm and those that make its teachers.

    Example:
        >>> list_stages("DAFT")
        ['DAFT', 'AFT', 'ERM']
    """
    stages = [algorithm]
    while stages[-1] in hparams.TEACHER_KINDS:
        stages.append(hparams.TEACHER_KINDS[stages[-1]])
    return stages


def _find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device {name!r} is no device: use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"--device {name}: {torch.cuda.device_count()} CUDA devices are visible here; use cpu or auto")
    return device


# --- the folder --------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Own a run's folder; the operating system lets go of a dead owner's lock by itself."""
    path = folder / LOCK_FILE
    told = False
    while True:
        try:
            file = path.open("a+")
        except OSError as error:
            raise _explain_unwritable(folder, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            if not wait:
                raise UsageError(
                    f"process {owner} is at work in {folder}: wait for it, or choose another --output_dir"
                ) from None
            if not told:
                print(f"waiting for process {owner}, which is at work in {folder}", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.2)
            continue
        # The last owner may have removed the file between our opening and our locking it.
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()
    try:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        file.close()


def _explain_unwritable(folder: Path, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):  # no fault of the folder's
        return error
    return UsageError(f"--output_dir {folder} cannot be written ({error.strerror}): choose another")


def _read_unfinished(job: _Job, folder: Path) -> dict[str, Any] | None:
    """Return the state of the unfinished run in a folder, or None where there is none.

    Raises:
        UsageError: The folder holds a run with other arguments, or one that cannot be gone on with.
    """
    records, saved = folder / RECORDS_FILE, folder / RESUME_FILE
    if (folder / "done").is_file():
        saved.unlink(missing_ok=True)
        first = _read_first_line(records)
        if first is not None:
            _check_same(first["args"], job, folder, "a finished run")
        return None
    if saved.is_file():
        state = checkpoints.load(saved)
        _check_same(state["args"], job, folder, "an unfinished run")
        return state
    if records.is_file():
        raise UsageError(
            f"{folder} holds records of a run that cannot be gone on with (it has no {RESUME_FILE}): choose another "
            f"--output_dir, or delete it"
        )
    return None


def _read_first_line(path: Path) -> dict[str, Any] | None:
    try:
        with path.open() as file:
            record = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "args" in record else None


def _check_same(theirs: Mapping[str, Any], job: _Job, folder: Path, what: str) -> None:
    ours = asdict(job.args)
    names = [name for name in ours if name not in _MOVABLE]
    different = [
        f"{name} is {theirs.get(name)} there and {ours[name]} here"
        for name in names
        if _normalise(name, theirs.get(name)) != _normalise(name, ours[name])
    ]
    if different:
        raise UsageError(
            f"{folder} holds {what} with other arguments ({'; '.join(different)}): choose another --output_dir, or "
            f"delete it"
        )


def _normalise(name: str, value: Any) -> Any:
    if name == "dataset" and isinstance(value, str):
        return provenance.name_dataset(value)
    return hparams.parse_json(value) if name == "hparams" else value


class _Log:
    """Rows of numbers to standard output and out.txt, everything else to standard error and err.txt."""

    def __init__(self, folder: Path, *, quiet: bool) -> None:
        self.folder, self.quiet = folder, quiet

    def write(self, text: str) -> None:
        """Write a result."""
        if not self.quiet:
            print(text, flush=True)
        self._append("out.txt", text)

    def warn(self, text: str) -> None:
        """Write what is no result."""
        print(text, file=sys.stderr, flush=True)
        self._append("err.txt", text)

    def _append(self, name: str, text: str) -> None:
        with (self.folder / name).open("a") as file:
            file.write(text + "\n")


# --- the data ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    dataset: Any
    in_splits: list[Any]
    out_splits: list[Any]
    uda_splits: dict[int, Any]  # by environment; only those that are not empty

    def list_splits(self) -> list[tuple[Any, Any]]:
        """Return the in- and the out-split of every environment."""
        return list(zip(self.in_splits, self.out_splits, strict=True))


def _build_data(host: plugin.Host, request: Request, hparams_: Mapping[str, Any], dataset_class: Any) -> _Data:
    """Build a data set and split every environment."""
    return _split(host, request, dataset_class(request.data_dir, list(request.test_envs), hparams_))


def _split(host: plugin.Host, request: Request, dataset: Any) -> _Data:
    """Split every environment of a data set as DomainBed does; draws nothing from the global generators."""
    in_splits, out_splits, uda_splits = [], [], {}
    for i, env in enumerate(dataset):
        seed = host.misc.seed_hash(request.trial_seed, i)
        out, in_ = host.misc.split_dataset(env, int(len(env) * request.holdout_fraction), seed)
        if i in request.test_envs:
            uda, in_ = host.misc.split_dataset(in_, int(len(in_) * request.uda_holdout_fraction), seed)
            if len(uda):
                uda_splits[i] = _flatten(uda)
            in_ = _flatten(in_)
        in_splits.append(in_)
        out_splits.append(out)
    return _Data(dataset, in_splits, out_splits, uda_splits)


def _flatten(split: Any) -> Any:
    """Turn a split of a split into one split, whose data lie where fetching and fingerprints look for them."""
    inner = split.underlying_dataset
    split.keys = [inner.keys[key] for key in split.keys]
    split.underlying_dataset = inner.underlying_dataset
    return split


def _check_sizes(data: _Data, args: TrainArgs, hparams_: Mapping[str, Any], environments: Sequence[str]) -> None:
    held_out = set(args.test_envs)
    for i, (in_, out) in enumerate(zip(data.in_splits, data.out_splits, strict=True)):
        if not len(in_) or not len(out):
            raise UsageError(
                f"env {environments[i]!r} has {len(in_) + len(out)} images, of which --holdout_fraction "
                f"{args.holdout_fraction} leaves {len(in_)} in and {len(out)} out: change the fraction or add images"
            )
    if hparams_["class_balanced"]:
        return  # that loader draws each batch afresh, whatever the size of the split
    batch_size = hparams_["batch_size"]
    trained = [(environments[i], split) for i, split in enumerate(data.in_splits) if i not in held_out]
    unlabelled = [("the unlabelled part of the held-out domains", split) for split in data.uda_splits.values()]
    largest = min(len(split) for _, split in trained + unlabelled)
    for name, split in trained + unlabelled:
        if len(split) < batch_size:
            raise UsageError(
                f"env {name!r} has {len(split)} training images but batch_size is {batch_size}, and DomainBed's loader "
                f"would wait for ever: lower it with --hparams '{{\"batch_size\": {largest}}}'"
            )


# --- the run -----------------------------------------------------------------------------------------------------


class _Run:
    """One run in its folder, from the first step or from where it was."""

    def __init__(self, job: _Job, folder: Path, log: _Log, on_step: Callable[[int, int], None] | None = None) -> None:
        self.job, self.folder, self.log, self.on_step = job, folder, log, on_step
        self.args, self.host, self.device = job.args, job.host, job.device
        self.hparams = dict(job.hparams)  # the algorithm replaces each "auto" by its value

    def execute(self, saved: dict[str, Any] | None) -> None:
        args = self.args
        randomness.seed_everything(args.seed if args.data_seed is None else args.data_seed)
        _keep_freed_memory()
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        self.request = make_request(args, self.job.n_steps)
        self.data = _build_data(self.host, self.request, self.hparams, self.job.dataset_class)
        if args.data_seed is not None:
            randomness.seed_everything(args.seed)
        _check_sizes(self.data, args, self.hparams, self.job.dataset_class.ENVIRONMENTS)
        if args.task == "domain_adaptation" and not self.data.uda_splits:
            raise UsageError("--task domain_adaptation needs unlabelled images: give --uda_holdout_fraction above 0")
        self._make_streams()
        self.facts = _gather_facts(args, self.host, self.request, self.data, self.hparams, self.folder, self.log.warn)
        if saved is not None:
            self._check_data(saved)
        dataset = self.data.dataset
        n_domains = len(dataset) - len(args.test_envs)
        with provenance.run_in_progress(self.facts):
            algorithm_class = plugin.get_algorithm_class(self.host, args.algorithm)
            self.algorithm = algorithm_class(dataset.input_shape, dataset.num_classes, n_domains, self.hparams)
        self.algorithm.to(self.device)
        self.precision = Precision(args.precision, self.device, self.algorithm)
        self._start(saved)
        self._loop()
        self._finish()

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
        self._keep_records(saved)
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

    def _keep_records(self, saved: Mapping[str, Any]) -> None:
        """Drop half-written records and those beyond the resume point; append the one that was about to be written."""
        path = self.folder / RECORDS_FILE
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        kept = lines[: saved["n_records"]]
        if saved["pending"] is not None:  # the last of them, which a kill may have kept from the file
            kept[saved["n_records"] - 1 :] = [saved["pending"].encode()]
        if len(kept) != saved["n_records"] or not all(map(_is_whole, kept)):
            raise UsageError(
                f"{path} has lost records that the run in {self.folder} had written: choose another --output_dir"
            )
        with checkpoints.writing_atomically(path) as file:
            file.write(b"".join(line + b"\n" for line in kept))

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

    def _to_device(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = batch
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _explain_non_finite(self, name: str, value: float) -> str:
        kept = ", ".join(file for file in (RESUME_FILE, "model_best.pkl") if (self.folder / file).is_file())
        return (
            f"step {self.step}: {name} is {value}; the run was stopped and its last good state kept in {self.folder} "
            f"({kept}). Choose another --output_dir with a lower lr than {self.hparams.get('lr')}"
        )

    def _record(self, step: int, epoch: float) -> None:
        """Evaluate, then make the checkpoint's record, its model and its resume point last, in that order."""
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
            self.log.write(_format_row(keys))
            self.printed_keys = keys
        self.log.write(_format_row([record[key] for key in keys]))

    def _save_if_best(self, record: Mapping[str, Any]) -> None:
        """Keep the checkpoint that training-domain validation chooses; held-out domains have no say."""
        trained = [i for i in range(len(self.data.out_splits)) if i not in self.args.test_envs]
        validation = sum(record[f"env{i}_out_acc"] for i in trained) / len(trained)
        if validation > self.best:
            self.best = validation
            self._save_model("model_best.pkl")

    def _get_teacher_facts(self) -> dict[str, Any]:
        teacher = getattr(self.algorithm, "teacher", None)
        return teacher.facts if isinstance(teacher, Teacher) else {}

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
        checkpoints.write_text(self.folder / "done", "done")
        (self.folder / RESUME_FILE).unlink(missing_ok=True)


def _gather_facts(
    args: TrainArgs,
    host: plugin.Host,
    request: Request,
    data: _Data,
    hparams_: Mapping[str, Any],
    folder: Path,
    warn: Callable[[str], None],
) -> RunFacts:
    """Return what a run's algorithm has to know to find, make and check its teacher."""
    store = Path(args.teachers_dir) if args.teachers_dir else folder.resolve().parent / "teachers"

    def train_teacher(teacher: Request, user: dict[str, Any], teacher_folder: Path) -> None:
        warn(f"{args.algorithm} needs a teacher: training {teacher.algorithm} in {teacher_folder}")
        train(make_teacher_args(args, teacher, user, teacher_folder), quiet=True, wait=True)

    def rebuild(theirs: Mapping[str, Any]) -> dict[str, Any]:
        names = ("trial_seed", "seed", "holdout_fraction", "task", "uda_holdout_fraction")
        values = {name: theirs[name] for name in names}
        other = replace(request, **values, test_envs=tuple(theirs["test_envs"]), data_seed=None)
        with randomness.preserve_states():
            randomness.seed_everything(other.seed)
            its = _build_data(host, other, hparams_, plugin.get_dataset_class(host, other.dataset))
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

    def built(dataset: Any, hparams_: Mapping[str, Any]) -> None:
        request = make_request(args, args.steps or dataset.N_STEPS)
        data = _split(host, request, dataset)
        _check_sizes(data, args, hparams_, type(dataset).ENVIRONMENTS)
        folder = Path(args.output_dir)

        def write_beside(**found: Any) -> None:
            beside = facts.provenance | {"environments": list(type(dataset).ENVIRONMENTS)} | found
            checkpoints.write_text(folder / PROVENANCE, json.dumps(beside, sort_keys=True) + "\n")

        facts = replace(
            _gather_facts(args, host, request, data, hparams_, folder, lambda text: print(text, file=sys.stderr)),
            announce=lambda teacher: write_beside(teacher=teacher),
        )
        write_beside()
        provenance.set_run_facts(facts)

    return built


def make_request(args: TrainArgs, n_steps: int) -> Request:
    """Return a run's arguments as its provenance and its teachers need them."""
    return Request(
        dataset=args.dataset,
        algorithm=args.algorithm,
        test_envs=tuple(args.test_envs),
        trial_seed=args.trial_seed,
        seed=args.seed,
        holdout_fraction=args.holdout_fraction,
        task=args.task,
        uda_holdout_fraction=args.uda_holdout_fraction,
        steps=n_steps,
        data_dir=args.data_dir,
        data_seed=args.data_seed,
    )


def make_teacher_args(args: TrainArgs, request: Request, user: Mapping[str, Any], folder: Path) -> TrainArgs:
    """Return the arguments of the job that trains a teacher for a run."""
    return TrainArgs(
        dataset=request.dataset,
        algorithm=request.algorithm,
        task=request.task,
        hparams=json.dumps(dict(user), sort_keys=True),
        trial_seed=request.trial_seed,
        seed=request.seed,
        steps=request.steps,
        test_envs=list(request.test_envs),
        output_dir=str(folder),
        data_dir=request.data_dir,
        holdout_fraction=request.holdout_fraction,
        uda_holdout_fraction=request.uda_holdout_fraction,
        host=args.host,
        device=args.device,
        precision=args.precision,
        teachers_dir=str(folder.parent),
        data_seed=request.data_seed,
    )


def _keep_freed_memory() -> None:
    """Tell the C library not to hand every step's activations back to the system, only to fault them in again."""
    trim_threshold, mmap_threshold = -1, -3  # M_* of glibc's malloc.h; other libraries have no mallopt
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(mmap_threshold, 2**30)


def describe_machine(device: torch.device, precision: str) -> dict[str, Any]:
    """Return versions and hardware, for the first record of a run."""
    import torchvision

    return {
        "daft_domainbed": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": _name_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
    }


def _name_processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _format_row(row: Sequence[Any]) -> str:
    cells = [f"{value:.10f}" if isinstance(value, float) else str(value) for value in row]
    return "  ".join(cell.ljust(COLUMN_WIDTH)[:COLUMN_WIDTH] for cell in cells)
