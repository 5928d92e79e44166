"""What was begun when students of small images of one's own had another default network goes on with that one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.hparams import parse_json, split_hparams
from daft_domainbed.methods import find_method
from daft_domainbed.plugin.defaults import had_first_network
from daft_domainbed.runtime.layout import read_first_record
from daft_domainbed.training.prepare import Prepared, prepare


def keep_first_network(args: TrainArgs) -> TrainArgs:
    """Return the arguments of a student of before, with the network that was its default then."""
    given = parse_json(args.hparams)
    shared, own = split_hparams(given, args.algorithm)
    has_network = find_method(args.algorithm).has_own_architecture
    if not has_network or not had_first_network(args.dataset, shared | own):
        return args
    given[args.algorithm] = {"backbone": "default"} | own
    return replace(args, hparams=json.dumps(given, sort_keys=True))


def go_on_as_begun(run: Prepared, folder: Path, saved: Mapping[str, Any]) -> Prepared:
    """Return a run with the network that it was begun with.

    Args:
        run: What is asked for.
        folder: The run's.
        saved: The state that it goes on from.
    """
    first = json.loads(saved["pending"]) if saved.get("pending") else read_first_record(folder)
    is_of_before = first.get("hparams", {}).get("backbone") == "default" != run.hparams.get("backbone")
    return prepare(keep_first_network(run.args)) if is_of_before else run
