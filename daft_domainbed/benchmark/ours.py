"""The engine at work, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from daft_domainbed import plugin
from daft_domainbed.arguments import TrainArgs
from daft_domainbed.benchmark.bare import OnStep
from daft_domainbed.runtime.machine import describe_machine
from daft_domainbed.training.engine import train

ENDLESS = 10**9


class Idle:
    """An algorithm that learns nothing, so that a run of it takes what every run takes beside learning."""

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take no step."""
        return {"loss": 0.0}


class Blind(Idle):
    """An algorithm that neither learns nor looks at what it is asked about."""

    hparams: dict[str, Any]

    def predict(self, x: Tensor) -> Tensor:
        """Answer with the first class."""
        return torch.eye(2, 7)[:1].expand(len(x), -1)


def describe() -> dict[str, Any]:
    """Return versions and hardware."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        orjson = version("orjson")
    except PackageNotFoundError:
        orjson = None
    return describe_machine(torch.device("cpu"), "fp32") | {"orjson": orjson}


def run(folder: str, on_step: OnStep | None = None, **args: Any) -> None:
    """Run the engine, without end where its steps are not said."""
    given: dict[str, Any] = {"steps": ENDLESS, "checkpoint_freq": ENDLESS, "device": "cpu", "output_dir": folder}

    def tell(step: int, n_steps: int) -> None:
        if on_step is not None:
            on_step()

    train(TrainArgs(**given | args), quiet=True, on_step=tell)


def run_idle(folder: str, on_step: OnStep, **args: Any) -> None:
    """Run the engine with an algorithm that learns nothing."""
    plugin.add_algorithm("Idle", Idle)
    run(folder, on_step, algorithm="Idle", **args)


def read_folder(folder: str, steps: int, batch: int, cache: str | None = None, **args: Any) -> float:
    """Return the training images a second that the engine's data path gives, with a cache of decoded images or not."""
    plugin.add_algorithm("Blind", Blind)
    moments: list[float] = []
    warm_up = 4  # it may read ahead
    run(
        folder,
        lambda: moments.append(time.perf_counter()),
        algorithm="Blind",
        image_cache=cache,
        steps=warm_up + steps,
        skip_model_save=True,
        **args,
    )
    return 3 * batch * steps / (moments[-2] - moments[warm_up - 2])  # the last step's moment is after its evaluation


def measure_saving(folder: str, **args: Any) -> float:
    """Return the percentage of a run's time that goes into its resume file."""
    from daft_domainbed.benchmark.stopwatch import Stopwatch
    from daft_domainbed.training.recorder import Recorder

    watch = Stopwatch()
    watch.attribute(Recorder, "save_resume", "resume file")
    began = time.perf_counter()
    run(folder, **args)
    return 100 * watch.seconds["resume file"] / (time.perf_counter() - began)
