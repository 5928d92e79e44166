"""Where the time of a run goes: its phases in percent, of the engine's runs and of upstream's."""

from __future__ import annotations

import json
import runpy
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

from daft_domainbed.benchmark import inputs
from daft_domainbed.benchmark.stopwatch import Stopwatch
from daft_domainbed.benchmark.workers import Bench, list_flags


def profile_ours(began: float, folder: str, **args: Any) -> Mapping[str, float]:
    """Return the shares of a run of the engine; `began` is when its process was started."""
    import torch

    from daft_domainbed.benchmark.ours import run
    from daft_domainbed.data import streams
    from daft_domainbed.host import contract
    from daft_domainbed.training.recorder import Recorder

    watch, host = Stopwatch(), contract.find_host()
    watch.seconds["imports"] = time.time() - began
    for stream in (streams.Stream, *streams.Stream.__subclasses__()):
        if "__next__" in vars(stream):
            watch.attribute(stream, "__next__", "data")
    watch.attribute(host.misc, "accuracy", "evaluation")
    watch.attribute(host.algorithms.ERM, "update", "forward")
    watch.attribute(torch.Tensor, "backward", "backward")
    watch.attribute(torch.optim.Adam, "step", "optimizer")
    watch.attribute(Recorder, "save_resume", "resume file")
    watch.attribute(Recorder, "save_model", "models")
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
