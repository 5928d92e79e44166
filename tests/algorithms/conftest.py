"""A run in progress without a train loop: real images, real splits, and teachers made on the spot."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from daft_domainbed import plugin
from daft_domainbed.arguments import TrainArgs
from daft_domainbed.host import contract
from daft_domainbed.models import weights
from daft_domainbed.plugin.defaults import get_known_hparams, resolve_auto
from daft_domainbed.teachers.facts import RunFacts, run_in_progress
from daft_domainbed.teachers.find import find_teachers
from tests.conftest import get_defaults

Minibatches = list[tuple[Tensor, Tensor]]
TEST_ENV = 0
SEED = 5


class Workbench:
    """Builds algorithms on one data set as the engine would, and teachers for them, all tiny."""

    def __init__(self, folder: Path, dataset: str) -> None:
        self.folder, self.dataset = folder, dataset
        self.host = contract.find_host()
        kind = contract.get_dataset_class(self.host, dataset)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            data = kind(None, [TEST_ENV], {"data_augmentation": False})
        self.input_shape, self.num_classes, self.num_domains = data.input_shape, data.num_classes, len(data) - 1
        self.splits = [self.host.misc.split_dataset(env, int(0.8 * len(env)), i) for i, env in enumerate(data)]
        self.facts = contract.describe_dataset(self.host, dataset, {})
        self.spec = self.facts.input_spec
        self.teachers: dict[str, Path] = {}
        self._numbers = itertools.count()
        self.shown: list[Any] | None = None  # in the place of the splits, once the teachers are there

    def get_facts(self, algorithm: str = "DAFT", hparams: dict[str, Any] | None = None) -> RunFacts:
        args = TrainArgs(self.dataset, algorithm, seed=SEED, test_envs=[TEST_ENV], steps=10)
        return RunFacts(
            args=args,
            user_hparams={},
            hparams=hparams or {},
            dataset=self.facts,
            num_classes=self.num_classes,
            input_shape=tuple(self.input_shape),
            splits=self.splits,
            host=self.host,
            output_dir=self.folder / "run",
            teachers_dir=self.folder / "teachers",
        )

    def make(self, algorithm: str, seed: int = 0, **hparams: Any) -> Any:
        """Build an algorithm inside a run, from the same random state each time."""

        def refuse(args: object) -> Any:
            raise AssertionError("a test's teacher is never trained by itself")

        small = {"backbone": "resnet8_w2"} if algorithm != "AFT" else {}
        if algorithm in ("AFT", "KD", "DAFT"):
            small["teacher"] = str(self.teachers["AFT" if algorithm == "DAFT" else "ERM"])
        defaults = get_defaults(self.host, algorithm, self.dataset)
        assert hparams.keys() <= get_known_hparams(self.host, algorithm, self.facts, hparams).keys()
        chosen = defaults | small | hparams
        resolve_auto(algorithm, chosen)  # as the engine does before it looks for a teacher
        facts = self.get_facts(algorithm, chosen)
        facts = replace(facts, teachers=find_teachers(facts, refuse), splits=self.shown or facts.splits)
        with torch.random.fork_rng(devices=[]), run_in_progress(facts):
            torch.manual_seed(seed)
            kind = contract.get_algorithm_class(self.host, algorithm)
            return kind(self.input_shape, self.num_classes, self.num_domains, facts.hparams)

    def save(self, model: Any, algorithm: str) -> Path:
        """Write a checkpoint as the engine would."""
        path = self.folder / f"{algorithm}-{next(self._numbers)}" / "model.pkl"
        path.parent.mkdir(parents=True)
        content = {
            "args": {"algorithm": algorithm},
            "model_input_shape": tuple(self.input_shape),
            "model_num_classes": self.num_classes,
            "model_num_domains": self.num_domains,
            "model_hparams": weights.to_plain(dict(model.hparams)),
            "model_dict": model.state_dict(),
            "provenance": self.get_facts().provenance,
        }
        weights.save(content, path)
        return path

    def draw_minibatches(self, seed: int, size: int = 8) -> Minibatches:
        """Return a minibatch of every training domain, the same each time."""
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for i, (split, _) in enumerate(self.splits):
            if i != TEST_ENV:
                picked = torch.randint(len(split), (size,), generator=generator)
                batches.append(split.underlying_dataset.fetch(torch.tensor(split.keys)[picked]))
        return batches

    def train(self, algorithm: Any, n_steps: int, first: int = 0) -> list[dict[str, float]]:
        """Take steps on minibatches that depend on the step alone."""
        return [algorithm.update(self.draw_minibatches(step)) for step in range(first, first + n_steps)]


def make_workbench(folder: Path, dataset: str) -> Workbench:
    """Return a workbench with an ERM and an AFT teacher, trained for a few steps so that nothing is at its start."""
    bench = Workbench(folder, dataset)
    erm = bench.make("ERM", seed=1, backbone="resnet8_w4", lr=1e-2)
    bench.train(erm, 15)
    bench.teachers["ERM"] = bench.save(erm, "ERM")
    aft = bench.make("AFT", lr=1e-2)
    bench.train(aft, 3)
    bench.teachers["AFT"] = bench.save(aft, "AFT")
    return bench


@pytest.fixture(scope="session")
def make_shared_workbench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workbench]:
    """Makes the workbench of a data set, once."""
    made: dict[str, Workbench] = {}

    def make(dataset: str) -> Workbench:
        if dataset not in made:
            made[dataset] = make_workbench(tmp_path_factory.mktemp(dataset), dataset)
        return made[dataset]

    return make


@pytest.fixture(autouse=True)
def registered() -> None:
    plugin.register(contract.find_host())


@pytest.fixture
def bench(make_shared_workbench: Callable[[str], Workbench], registered: None) -> Workbench:
    """Eight classes of drawings, pixels in the unit box."""
    return make_shared_workbench("EmojiStyles")


@pytest.fixture
def noise_bench(make_shared_workbench: Callable[[str], Workbench], registered: None) -> Workbench:
    """Two classes of noise without a box."""
    return make_shared_workbench("Debug28")
