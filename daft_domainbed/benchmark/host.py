"""Upstream at work, as it stands, in a process of its own."""

from __future__ import annotations

import runpy
import sys
import time
from contextlib import redirect_stdout
from itertools import islice
from os import devnull
from pathlib import Path


def read_folder(root: str, steps: int, batch: int) -> float:
    """Return the training images a second that upstream's loaders give, with their worker processes."""
    from domainbed import datasets
    from domainbed.lib.fast_data_loader import InfiniteDataLoader

    dataset = datasets.PACS(root, [0], {"data_augmentation": True})
    workers = dataset.N_WORKERS
    loaders = [InfiniteDataLoader(domain, None, batch, workers) for domain in dataset.datasets[1:]]
    batches = zip(*loaders, strict=True)
    # Each worker reads two batches before it is asked for one, and all of them end at about the same time.
    for _ in islice(batches, 2 * workers):
        pass
    began = time.perf_counter()
    for _ in islice(batches, steps):
        pass
    return len(loaders) * batch * steps / (time.perf_counter() - began)


def read_records(root: str) -> float:
    """Return records a second of upstream's reader and its tables, without its imports."""
    from domainbed import algorithms, datasets, model_selection  # noqa: F401
    from domainbed.lib import misc, reporting  # noqa: F401

    n_records = sum(path.read_bytes().count(b"\n") for path in Path(root).glob("*/results.jsonl"))
    sys.argv = ["collect_results", "--input_dir", root]
    with open(devnull, "w") as nowhere, redirect_stdout(nowhere):
        began = time.perf_counter()
        runpy.run_module("domainbed.scripts.collect_results", run_name="__main__")
        return n_records / (time.perf_counter() - began)
