"""A copy of a run's records for TensorBoard or W&B: written after results.jsonl, never in its place."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.errors import UsageError
from daft_domainbed.runtime.layout import TEACHERS_FOLDER, list_numbers
from daft_domainbed.runtime.randomness import preserve_states

TENSORBOARD_FOLDER = "tensorboard"


class Writer(Protocol):
    """One of the programs that follow a run."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Copy a record's numbers."""

    def close(self) -> None:
        """Write what is still to be written."""


class TensorBoardWriter:
    """Event files in the run's folder, made anew when a run goes on: records beyond its resume point are dropped."""

    def __init__(self, folder: Path, args: TrainArgs, hparams: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / TENSORBOARD_FOLDER, ignore_errors=True)
        self.writer: Any = SummaryWriter(str(folder / TENSORBOARD_FOLDER))

    def write(self, record: Mapping[str, Any]) -> None:
        """Copy a record's numbers."""
        for name, value in list_numbers(record).items():
            self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()

    def close(self) -> None:
        """Write what is still to be written."""
        self.writer.close()


class WandbWriter:
    """A run of W&B for each job, in the group of its sweep; offline unless WANDB_MODE or a login says otherwise."""

    def __init__(self, folder: Path, args: TrainArgs, hparams: Mapping[str, Any]) -> None:
        import wandb

        group = name_group(folder)
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "daft-domainbed"),
            group=group,
            name=f"{args.algorithm}, {args.dataset}, {args.test_envs} held out, trial {args.trial_seed}, "
            f"draw {args.hparams_seed}",
            id=hashlib.md5(f"{group}/{folder.resolve().name}".encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline"),
            config={"args": vars(args), "hparams": dict(hparams)},
            settings=wandb.Settings(silent=True),
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Copy a record's numbers."""
        self.run.log(list_numbers(record), step=record["step"])

    def close(self) -> None:
        """Write what is still to be written."""
        self.run.finish()


WRITERS: dict[str, Callable[[Path, TrainArgs, Mapping[str, Any]], Writer]] = {
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
}


def check_logs(names: Iterable[str]) -> None:
    """Refuse a log whose package is missing, before anything is trained.

    Raises:
        UsageError: Names it, and what brings it.
    """
    for name in names:
        if find_spec(name) is None:
            raise UsageError(f"--log {name} needs {name}: pip install 'daft-domainbed[log]'")


def name_group(folder: Path) -> str:
    """Return the name of the sweep that a run's folder lies in.

    Example:
        >>> name_group(Path("/runs/birds/0a1b")), name_group(Path("/runs/birds/teachers/ERM-0a1b"))
        ('birds', 'birds')
    """
    parents = [parent.name for parent in folder.resolve().parents]
    return next((name for name in parents if name not in (TEACHERS_FOLDER, "")), "runs")


class Mirror:
    """Copies records to each log that was asked for; one that fails is warned of once and left, the run goes on.

    Args:
        names: Of the logs.
        folder: Of the run.
        args: Of the run.
        hparams: Of the run.
        records: That are there already.
        warn: Told of failures.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        args: TrainArgs,
        hparams: Mapping[str, Any],
        records: Iterable[Mapping[str, Any]],
        warn: Callable[[str], None],
    ) -> None:
        self.warn, self.writers = warn, dict[str, Writer]()
        for name in names:
            with self._leaving(name):
                self.writers[name] = WRITERS[name](folder, args, hparams)
        for record in records:
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Copy a record's numbers."""
        for name, writer in list(self.writers.items()):
            with self._leaving(name):
                writer.write(record)

    def close(self) -> None:
        """End all logs."""
        for name, writer in list(self.writers.items()):
            with self._leaving(name):
                writer.close()
        self.writers.clear()

    @contextmanager
    def _leaving(self, name: str) -> Iterator[None]:
        """Leave a log that fails: of a network, a disk, a program of others; the records are what counts."""
        try:
            with preserve_states():  # such programs draw names, and no run is to depend on who watches it
                yield
        except Exception as error:
            self.writers.pop(name, None)
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.warn(f"--log {name} ends here, the run goes on: {why}")
