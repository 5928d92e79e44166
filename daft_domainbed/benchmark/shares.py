"""Where the time of a run goes: each second to the innermost phase that it was spent in."""

from __future__ import annotations

import functools
import json
import runpy
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from daft_domainbed.benchmark import inputs
from daft_domainbed.benchmark.measure import Bench, list_flags

PHASES = ("imports", "data", "forward", "backward", "optimizer", "evaluation", "resume file", "models", "rest")


class Stopwatch:
    """Adds up the seconds of phases, none twice; other threads than the one that made it are not looked at.

    Attributes:
        seconds: By phase.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0
        self._thread = threading.get_ident()

    def enter(self, phase: str) -> None:
        """Begin a phase; the one that it is part of stands still."""
        self._pass()
        self._open.append(phase)

    def leave(self) -> None:
        """End the phase that began last."""
        self._pass()
        self._open.pop()

    def _pass(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def attribute(self, owner: Any, name: str, phase: str) -> None:
        """Count the time of a function, or of drawing from the iterator that `__iter__` makes, as a phase's."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def measured(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            self.enter(phase)
            try:
                result = original(*args, **kwargs)
            finally:
                self.leave()
            return self._draw(result, phase) if name == "__iter__" else result

        setattr(owner, name, measured)

    def _draw(self, iterator: Iterator[Any], phase: str) -> Iterator[Any]:
        while True:
            self.enter(phase)
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.leave()
            yield item

    def divide(self, total: float) -> dict[str, float]:
        """Return each phase's share of a total, in percent; what was in none is the rest."""
        shares = {phase: 100 * self.seconds[phase] / total for phase in PHASES[:-1]}
        return {"seconds": total, **shares, "rest": 100 - sum(shares.values())}


def profile_ours(began: float, folder: str, **args: Any) -> Mapping[str, float]:
    """Return the shares of a run of the engine; `began` is when its process was started."""
    import torch

    from daft_domainbed import plugin, streams
    from daft_domainbed.benchmark.ours import run
    from daft_domainbed.engine import _Run

    watch, host = Stopwatch(), plugin.find_host()
    watch.seconds["imports"] = time.time() - began
    for stream in (streams.Stream, *streams.Stream.__subclasses__()):
        if "__next__" in vars(stream):
            watch.attribute(stream, "__next__", "data")
    watch.attribute(host.misc, "accuracy", "evaluation")
    watch.attribute(host.algorithms.ERM, "update", "forward")
    watch.attribute(torch.Tensor, "backward", "backward")
    watch.attribute(torch.optim.Adam, "step", "optimizer")
    watch.attribute(_Run, "_save_resume", "resume file")
    watch.attribute(_Run, "_save_model", "models")
    run(folder, **args)
    return watch.divide(time.time() - began)


def profile_host(began: float, argv: list[str]) -> Mapping[str, float]:
    """Return the shares of a run of upstream's own loop."""
    import torch
    import torchvision
    from domainbed import algorithms, datasets, hparams_registry  # noqa: F401
    from domainbed.lib import fast_data_loader, misc

    watch = Stopwatch()
    watch.seconds["imports"] = time.time() - began
    for loader in (fast_data_loader.InfiniteDataLoader, fast_data_loader.FastDataLoader):
        watch.attribute(loader, "__init__", "data")
        watch.attribute(loader, "__iter__", "data")
    watch.attribute(misc, "accuracy", "evaluation")
    watch.attribute(algorithms.ERM, "update", "forward")
    watch.attribute(torch.Tensor, "backward", "backward")
    watch.attribute(torch.optim.Adam, "step", "optimizer")
    watch.attribute(torch, "save", "models")
    build = torchvision.models.resnet18
    torchvision.models.resnet18 = lambda **_: build()  # nothing is downloaded
    sys.argv = ["train", *argv]
    runpy.run_module("domainbed.scripts.train", run_name="__main__")
    return watch.divide(time.time() - began)


def profile_jobs(bench: Bench, repeat: int) -> list[dict[str, Any]]:
    """Return a table of where the time of three jobs goes, ours and (where there is a clone) upstream's, in percent."""
    size = bench.size
    digits = inputs.write_digits(bench.make_folder("digits"), size.digits)
    pictures = inputs.write_folder(bench.make_folder("folder"), size.images)
    batch = max(1, size.batch // 4)
    resnet18 = {"batch_size": batch, "resnet18": True, "resnet50_augmix": False}
    jobs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "small": ({"dataset": "Debug28", "steps": 20, "checkpoint_freq": 10}, {"batch_size": 8}),
        "digits": (
            {
                "dataset": "RotatedMNIST",
                "data_dir": str(digits),
                "steps": size.digits_steps,
                "checkpoint_freq": size.digits_checkpoint,
            },
            {},
        ),
        f"folder, ResNet-18, batch 3 x {batch}": (
            {
                "dataset": "PACS",
                "data_dir": str(pictures),
                "steps": size.profile_steps,
                "checkpoint_freq": size.profile_steps,
            },
            resnet18,
        ),
    }
    rows = []
    for name, (args, hparams) in jobs.items():
        shares: dict[str, list[Mapping[str, float]]] = {"ours": [], "host": []}
        for _ in range(repeat):
            own = json.dumps(hparams | ({"weights": "none"} if "resnet18" in hparams else {}))
            folder = str(bench.make_folder("run"))
            shares["ours"].append(bench.call("shares:profile_ours", folder=folder, hparams=own, **args))
            if bench.clone:
                argv = list_flags(**args, hparams=hparams, output_dir=bench.make_folder("run"))
                shares["host"].append(bench.call("shares:profile_host", with_host=True, argv=argv))
        for column, profiles in shares.items():
            if profiles:
                medians = {key: statistics.median(profile[key] for profile in profiles) for key in profiles[0]}
                rows.append({"job": name, "of": column, **medians})
    return [{"title": "where the time goes: seconds, then percent of them", "rows": rows}]
