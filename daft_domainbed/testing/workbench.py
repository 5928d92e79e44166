"""One algorithm on one host: trained as the engine trains it, and built by hand with the same teachers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.data.loaders import make_stream
from daft_domainbed.data.splits import Data, build_data
from daft_domainbed.host.contract import find_host, get_algorithm_class
from daft_domainbed.models.weights import hash_state
from daft_domainbed.plugin.defaults import get_default_hparams
from daft_domainbed.plugin.registration import register
from daft_domainbed.runtime import stopping
from daft_domainbed.runtime.layout import CHECKPOINT_FILE, RECORDS_FILE
from daft_domainbed.runtime.randomness import capture_states, preserve_states, seed_everything
from daft_domainbed.teachers.facts import RunFacts, run_in_progress
from daft_domainbed.teachers.find import find_teachers
from daft_domainbed.teachers.rebuild import rebuild_model
from daft_domainbed.teachers.teacher import Teacher
from daft_domainbed.training.engine import train, train_teacher
from daft_domainbed.training.prepare import gather_facts, prepare

_CLOCKS = {"step_time", "seconds", "started", "mem_gb", "machine"}
_PLACES = {"output_dir", "path"}


class Workbench:
    """A small run of an algorithm, with its data and its teachers.

    Args:
        folder: For runs and teachers.
        host: "embedded" or "upstream".
        algorithm: Its name.
        dataset: Its data set, of which environment 0 is held out.
        hparams: What is smaller than usual, as far as the algorithm has it.
        steps: Updates of a run.

    Attributes:
        error: What kept a whole run from ending, or None.
        teachers: Of the algorithm that was built last, by slot; each has teachers of its own.
    """

    def __init__(
        self, folder: Path, host: str, algorithm: str, dataset: str, hparams: Mapping[str, Any], steps: int
    ) -> None:
        self.folder = folder
        args = TrainArgs(dataset, algorithm, host=host, steps=steps, checkpoint_freq=max(2, steps - 1), device="cpu")
        register(find_host(host))
        known = prepare(args).hparams
        for name in list(known):  # slots of any name get small networks, too
            if name.endswith("_backbone"):
                hparams = {name: hparams.get("backbone", "default"), **hparams}
        small = {name: value for name, value in hparams.items() if name in known}
        self.args = replace(args, hparams=json.dumps(small))
        self.run = prepare(self.args)
        self.teachers: dict[str, Teacher] = {}
        self.error: Exception | None = None
        try:
            self.train("whole")
        except Exception as error:  # whatever a method does: one check tells, the others are skipped
            self.error = error

    def require_training(self) -> None:
        """Skip a check that needs an algorithm that trains, with one that does not."""
        if self.error is not None:
            pytest.skip("the algorithm does not train: see test_trains_and_records")

    @contextmanager
    def attempting(self) -> Iterator[None]:
        """Skip a check that fails in this block, with an algorithm that does not train."""
        try:
            yield
        except Exception:
            self.require_training()
            raise

    @property
    def whole(self) -> Path:
        """The folder of a run that was not interrupted."""
        self.require_training()
        return self.folder / "whole"

    def train(self, name: str, on_step: Callable[[int, int], None] | None = None) -> Path:
        """Train, or go on, in a folder of that name; a run that is stopped stays where it is."""
        folder = self.folder / name
        with preserve_states(), suppress(stopping.Stopped), stopping.listening():
            train(replace(self.args, output_dir=str(folder)), quiet=True, on_step=on_step)
        return folder

    @cached_property
    def data(self) -> Data:
        """The run's data, split."""
        seed_everything(self.args.seed)  # which some data sets depend on
        return build_data(self.run.host, self.args, self.run.hparams, self.run.dataset.dataset_class)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.data.dataset.num_classes)

    @cached_property
    def facts(self) -> RunFacts:
        """What the run's algorithm is told, with its teachers."""
        run, folder = self.run, self.folder / "whole"
        facts = gather_facts(
            run.complete_args, run.host, run.dataset, self.data, run.user_hparams, dict(run.hparams), folder
        )
        teachers = find_teachers(facts, lambda args: train_teacher(args, self.args.algorithm, print))
        return replace(facts, teachers=teachers)

    def build(self, *, anyway: bool = False) -> Any:
        """Return the algorithm as it is before its first update, with copies of the run's teachers.

        Args:
            anyway: Of an algorithm that does not train, too.
        """
        if not anyway:
            self.require_training()
        self.teachers = copy.deepcopy(dict(self.facts.teachers))
        hparams = dict(self.run.hparams)
        kind = get_algorithm_class(self.run.host, self.args.algorithm)
        seed_everything(self.args.seed)
        with run_in_progress(replace(self.facts, hparams=hparams, teachers=self.teachers)):
            return kind(self.facts.input_shape, self.num_classes, len(self.data.dataset) - 1, hparams)

    def build_erm(self, hparams: Mapping[str, Any]) -> Any:
        """Return the host's ERM with an algorithm's hyperparameters, from the same random state."""
        seed_everything(self.args.seed)
        own = get_default_hparams(self.run.host, "ERM", self.run.dataset) | dict(hparams)
        erm = self.run.host.algorithms.ERM
        return erm(self.facts.input_shape, self.num_classes, len(self.data.dataset) - 1, own)

    def rebuild(self, content: Mapping[str, Any]) -> Any:
        """Return the model of the run's checkpoint, as an evaluation would have it."""
        return rebuild_model(content, self.whole / CHECKPOINT_FILE, self.run.host)

    def draw_minibatches(self, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return a minibatch of every training domain, the same for a seed."""
        with preserve_states():
            seed_everything(seed)
            splits = [split for i, split in enumerate(self.data.in_splits) if i not in self.args.test_envs]
            return [next(make_stream(split, self.run.hparams["batch_size"], 0)) for split in splits]

    def list_changed_teachers(self) -> list[str]:
        """Return the slots whose teacher has other weights or statistics than the one that was found."""
        return [
            prefix
            for prefix, teacher in self.teachers.items()
            if hash_state(teacher.model.state_dict()) != teacher.facts["sha256"]
        ]

    def list_teacher_entries(self, algorithm: Any) -> list[str]:
        """Return the names of an algorithm's state dict behind which a teacher's own tensors are."""
        teachers = self.teachers.values()
        theirs = {tensor.data_ptr() for teacher in teachers for tensor in teacher.model.state_dict().values()}
        state = algorithm.state_dict()
        return [name for name, tensor in state.items() if tensor.numel() and tensor.data_ptr() in theirs]

    def predict(self, algorithm: Any, *, alone: bool) -> torch.Tensor:
        """Return logits of a minibatch in evaluation mode, the same each time; the teachers are silent if `alone`."""
        (x, _), *_ = self.draw_minibatches(0)
        algorithm.eval()
        with torch.no_grad(), preserve_states(), self._silenced_teachers() if alone else nullcontext():
            logits: torch.Tensor = algorithm.predict(x)
        algorithm.train()
        return logits

    @contextmanager
    def _silenced_teachers(self) -> Iterator[None]:
        """Have the teachers, and every part of them, answer with nothing but zeros inside the block."""
        with ExitStack() as stack, torch.no_grad():
            for teacher in self.teachers.values():
                state = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
                stack.callback(teacher.model.load_state_dict, state)
                for parameter in teacher.model.parameters():
                    parameter.zero_()
                for module in teacher.model.modules():  # which may remember what it answered before
                    stack.enter_context(module.register_forward_hook(lambda module, inputs, output: output * 0))
            yield

    def read_records(self, folder: Path) -> list[dict[str, Any]]:
        """Return the records of a run."""
        return [json.loads(line) for line in (folder / RECORDS_FILE).read_text().splitlines()]

    def strip_times(self, value: Any) -> Any:
        """Return records without what depends on when and where they were made."""
        if isinstance(value, dict):
            return {key: self.strip_times(item) for key, item in value.items() if key not in _CLOCKS | _PLACES}
        return [self.strip_times(item) for item in value] if isinstance(value, list) else value


def list_random_states() -> dict[str, Any]:
    """Return the global random states of the CPU, by library, in a form that can be compared."""
    states = capture_states(cuda=False)
    name, keys, *rest = states["numpy"]
    return {
        "Python": states["python"],
        "NumPy": (name, keys.tolist(), *rest),
        "torch": states["torch"].tolist(),
    }


def stop_after(steps: int) -> Callable[[int, int], None]:
    """Return what asks a run to stop once so many updates are done, as a signal would."""

    def stop(step: int, n_steps: int) -> None:
        if step == steps:
            stopping.request()

    return stop
