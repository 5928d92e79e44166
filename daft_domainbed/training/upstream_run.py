"""A run of upstream's own loop: its algorithm gets the teachers that only somebody who knows the run can find."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.data.splits import check_sizes, count_images, split_environments
from daft_domainbed.embedded.image_folder import list_notes
from daft_domainbed.host.contract import describe_dataset, find_host
from daft_domainbed.hparams import parse_json
from daft_domainbed.runtime.files import write_text
from daft_domainbed.runtime.layout import PROVENANCE_FILE, pack_teachers
from daft_domainbed.teachers.facts import set_run_facts
from daft_domainbed.teachers.find import find_teachers
from daft_domainbed.training.engine import train_teacher
from daft_domainbed.training.prepare import gather_facts


def follow_upstream_run(args: TrainArgs) -> Callable[[Any, Mapping[str, Any]], None]:
    """Return what finds the teachers of a run of upstream's own loop, to be called when its data set has been built.

    What upstream's checkpoint and records cannot carry (provenance, names of the environments, the teachers) lies
    beside them in `provenance.json`.

    Raises:
        UsageError: From the returned function, where a teacher is not the right one, or where upstream would wait for
            ever for a batch that does not come.
    """
    host, user = find_host("upstream"), parse_json(args.hparams)
    described = describe_dataset(host, args.dataset, user)
    is_built = False

    def built(dataset: Any, hparams: Mapping[str, Any]) -> None:
        nonlocal is_built
        if is_built:  # a teacher's data set, not the run's own
            return
        is_built = True
        complete = replace(args, steps=args.steps or dataset.N_STEPS)
        data = split_environments(host, complete, dataset)
        check_sizes(count_images(data.lengths, complete, type(dataset).ENVIRONMENTS), complete, hparams)
        for note in list_notes(args.dataset, dataset):
            print(note, file=sys.stderr)
        folder = Path(args.output_dir)

        def write_beside(found: dict[str, Any]) -> None:
            names = list(type(dataset).ENVIRONMENTS)
            beside = facts.provenance | {"seed": args.seed, "environments": names} | found
            write_text(folder / PROVENANCE_FILE, json.dumps(beside, sort_keys=True) + "\n")

        facts = gather_facts(complete, host, described, data, user, hparams, folder)
        write_beside({})
        warn = lambda text: print(text, file=sys.stderr)  # noqa: E731
        teachers = find_teachers(facts, lambda teacher: train_teacher(teacher, args.algorithm, warn))
        taught = facts.with_teachers(teachers)
        if teachers or taught.origins:
            found = pack_teachers({prefix: teacher.facts for prefix, teacher in teachers.items()})
            write_beside(found | ({"origins": taught.origins} if taught.origins else {}))
        set_run_facts(taught)

    return built
