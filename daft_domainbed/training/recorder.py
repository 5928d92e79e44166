"""What a run leaves behind at a checkpoint: its record, its models, and the file that it goes on from."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from daft_domainbed.data.left_out import find_class_names
from daft_domainbed.models import weights
from daft_domainbed.runtime import files, randomness
from daft_domainbed.runtime.layout import (
    AVERAGED_CHECKPOINT_FILE,
    BEST_CHECKPOINT_FILE,
    CHECKPOINT_FILE,
    DONE_FILE,
    RECORDS_FILE,
    RESUME_FILE,
    pack_teachers,
    read_records,
)
from daft_domainbed.runtime.locks import Claim
from daft_domainbed.runtime.machine import describe_machine
from daft_domainbed.teachers.facts import RunFacts
from daft_domainbed.training import resume
from daft_domainbed.training.averaging import WeightAverage
from daft_domainbed.training.mirror import Mirror
from daft_domainbed.training.prepare import Prepared
from daft_domainbed.training.run_folder import COLUMN_WIDTH, Log, format_row, keep_records


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: Updates done.
        seconds: What they and the evaluations took.
        best: The best validation accuracy so far.
        n_records: Records written.
        values: What updates returned since the last record, by name.
    """

    step: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    n_records: int = 0
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


class Recorder:
    """Writes a run's files, in an order in which no kill loses anything.

    At a checkpoint: `model_best.pkl` where training-domain validation improved; `resume.pt`, which holds the record as
    well; the record. Records beyond the resume point are dropped when a run goes on, and the one in `resume.pt` is
    appended where it is missing.

    Args:
        run: What was asked for.
        folder: Of the run.
        claim: To the folder; made sure of before anything is written.
        log: For people.
        facts: Provenance and teachers.
        dataset: The data set, for its shapes.
        parts: All that changes with every step beside the algorithm's own: each has `state_dict`.
        sizes: Of the run's own network, "", and of its teachers', by slot.
    """

    def __init__(
        self,
        run: Prepared,
        folder: Path,
        claim: Claim,
        log: Log,
        facts: RunFacts,
        dataset: Any,
        parts: Mapping[str, Any],
        sizes: Mapping[str, Mapping[str, int]],
    ) -> None:
        self.run, self.folder, self.claim, self.log = run, folder, claim, log
        self.facts, self.dataset, self.parts, self.sizes = facts, dataset, parts, sizes
        self.began = datetime.now(timezone.utc)
        self.saved_at = time.monotonic()
        self.printed_keys: list[str] | None = None
        self.teacher_hashes = {prefix: teacher.facts["sha256"] for prefix, teacher in facts.teachers.items()}

    def begin(self, algorithm: Any, progress: Progress) -> None:
        """Claim the folder by the run's arguments, before the first step, however long that takes."""
        machine = describe_machine(self.run.device, self.run.args.precision)
        sections = {"Environment": machine, "Args": asdict(self.run.args), "HParams": self.facts.hparams}
        lines = []
        for title, content in sections.items():
            lines += [f"{title}:", *(f"\t{name}: {value}" for name, value in sorted(content.items()))]
        self.log.write("\n".join(lines))
        (self.folder / "err.txt").touch()
        self.save_resume(algorithm, progress)
        self._start_mirror()

    def go_on(self, algorithm: Any, saved: Mapping[str, Any]) -> Progress:
        """Put everything back where it was when the run was interrupted."""
        keep_records(self.folder, saved)
        self._start_mirror()
        resume.restore(algorithm, saved["algorithm"])
        for name, part in self.parts.items():
            part.load_state_dict(saved["parts"][name])
        randomness.restore_states(saved["random"])
        self.saved_at = time.monotonic()
        values = defaultdict(list, {name: list(values) for name, values in saved["values"].items()})
        return Progress(saved["step"], saved["seconds"], saved["best"], saved["n_records"], values)

    def write(self, algorithm: Any, progress: Progress, record: dict[str, Any]) -> None:
        """Write a checkpoint's record, its models and its resume point.

        Args:
            algorithm: As it was evaluated.
            progress: Counted up here.
            record: The numbers.
        """
        self._print_row(record)
        record = record | {"hparams": self.facts.hparams, "args": asdict(self.run.args)}
        if not progress.n_records:
            record |= {
                "environments": list(self.run.dataset.environments),
                "started": self.began.isoformat(timespec="seconds"),
                "machine": describe_machine(self.run.device, self.run.args.precision),
                **self._name_size(""),
                **pack_teachers(
                    {name: teacher.facts | self._name_size(name) for name, teacher in self.facts.teachers.items()}
                ),
                **({"origins": self.facts.origins} if self.facts.origins else {}),
            }
        if progress.step == self.run.n_steps:
            record["seconds"] = progress.seconds
        progress.n_records += 1
        line = json.dumps(record, sort_keys=True)

        self._save_if_best(algorithm, progress, record)
        if self.run.args.save_model_every_checkpoint:
            self.save_model(algorithm, progress, f"model_step{record['step']}.pkl")
        # The resume file holds the record, so that a kill between the two writes loses neither.
        self.save_resume(algorithm, progress, pending=line)
        with (self.folder / RECORDS_FILE).open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.mirror.write(record)

    def _start_mirror(self) -> None:
        args = self.run.args
        self.mirror = Mirror(
            args.log or (), self.folder, args, self.facts.hparams, read_records(self.folder), self.log.warn
        )

    def _name_size(self, name: str) -> dict[str, Any]:
        return {"size": dict(self.sizes[name])} if self.sizes.get(name) else {}

    def _print_row(self, record: Mapping[str, Any]) -> None:
        # Names are cut to a column's width, as DomainBed's are: those that look alike then stand in the records alone.
        shown = Counter(name[:COLUMN_WIDTH] for name in record)
        keys = sorted(name for name in record if shown[name[:COLUMN_WIDTH]] == 1)
        if keys != self.printed_keys:
            self.log.write(format_row(keys))
            self.printed_keys = keys
        self.log.write(format_row([record[key] for key in keys]))

    def _save_if_best(self, algorithm: Any, progress: Progress, record: Mapping[str, Any]) -> None:
        """Keep the checkpoint that training-domain validation chooses; held-out domains have no say."""
        trained = [i for i in range(len(self.run.dataset.environments)) if i not in self.run.args.test_envs]
        validation = sum(record[f"env{i}_out_acc"] for i in trained) / len(trained)
        if validation > progress.best:
            progress.best = validation
            self.save_model(algorithm, progress, BEST_CHECKPOINT_FILE)

    def save_model(self, algorithm: Any, progress: Progress, name: str, state: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint of DomainBed's form, with the run's provenance.

        Args:
            algorithm: Whose weights they are.
            progress: How far the run is.
            name: Of the file.
            state: Weights in the place of the algorithm's own.
        """
        if self.run.args.skip_model_save:
            return
        content = {
            "args": asdict(self.run.args),
            "model_input_shape": tuple(self.dataset.input_shape),
            "model_num_classes": self.dataset.num_classes,
            "model_num_domains": len(self.dataset) - len(self.run.args.test_envs),
            "model_hparams": dict(self.facts.hparams),
            "model_dict": algorithm.state_dict() if state is None else dict(state),
            "class_names": find_class_names(self.dataset),
            "provenance": self.facts.provenance,
            "step": progress.step - 1,
        }
        if self.facts.origins:
            content["origins"] = self.facts.origins
        weights.save(content, self.folder / name)

    def save_resume(self, algorithm: Any, progress: Progress, pending: str | None = None) -> None:
        """Write the file that the run goes on from.

        Args:
            algorithm: With all that it holds.
            progress: How far the run is.
            pending: The record that is about to be appended.
        """
        self.claim.check()
        content = {
            "args": asdict(self.run.args),
            "provenance": self.facts.provenance,
            "teachers": self.teacher_hashes,
            "step": progress.step,
            "seconds": progress.seconds,
            "best": progress.best,
            "n_records": progress.n_records,
            "values": dict(progress.values),
            "pending": pending,
            "algorithm": resume.capture(algorithm),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "random": randomness.capture_states(),
        }
        weights.save(content, self.folder / RESUME_FILE)
        self.saved_at = time.monotonic()

    def finish(self, algorithm: Any, progress: Progress, average: WeightAverage | None) -> None:
        """Write the last model, the averaged one and `done`; nothing is left to go on from."""
        self.save_model(algorithm, progress, CHECKPOINT_FILE)
        if average is not None:
            self.save_model(algorithm, progress, AVERAGED_CHECKPOINT_FILE, average.tensors)
        files.write_text(self.folder / DONE_FILE, "done")
        (self.folder / RESUME_FILE).unlink(missing_ok=True)
