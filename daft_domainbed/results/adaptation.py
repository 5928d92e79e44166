"""The tables of a sweep's adaptations: a row a model and method, means over trials of means over held-out domains."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from daft_domainbed.results.grids import Grid, to_csv, to_markdown, to_text
from daft_domainbed.results.records import Note, Run
from daft_domainbed.results.robustness import (
    Place,
    Row,
    average_domains,
    gather_models,
    list_marks,
    list_origins,
    name_kind,
)
from daft_domainbed.results.sweeps import Sweep
from daft_domainbed.results.values import as_dict, as_list, is_number
from daft_domainbed.runtime.layout import ADAPTATION_FILE, ADAPTATION_FOLDER

KINDS = ("acc_s", "acc_n", "acc_h")


class Stream(NamedTuple):
    """What models were met with."""

    dataset: str
    strong_ood: str
    strong_ratio: float
    batch_size: int

    @property
    def title(self) -> str:
        """What a reader calls it."""
        strong = f"{self.strong_ratio:g} of {self.strong_ood} to 1" if self.strong_ratio else "closed set"
        return f"{self.dataset}: {strong}, batches of {self.batch_size}"


@dataclass(frozen=True)
class AdaptedRow(Row):
    """What a way of meeting the stream made of an algorithm's models; by kind of accuracy."""

    method: str


@dataclass(frozen=True)
class AdaptationTable:
    """The rows of one kind of stream."""

    stream: Stream
    rows: list[AdaptedRow]


def build_adaptations(sweep: Sweep) -> tuple[list[AdaptationTable], list[Note]]:
    """Tabulate the adaptations of the checkpoints that training-domain validation chose, and of their teachers.

    Returns:
        A table for each kind of stream, and a note for each chosen checkpoint that was not adapted.
    """
    notes: list[Note] = []
    rows: dict[Stream, list[AdaptedRow]] = defaultdict(list)
    for (dataset, kind), models in gather_models(sweep).items():
        for lot, runs in models.items():
            n_envs = len({held_out for held_out, _ in runs})
            for (stream, method), found in _gather_numbers(name_kind(dataset, kind), runs, notes).items():
                if values := average_domains(found, n_envs):
                    rows[stream].append(AdaptedRow(*lot, values, list_origins(runs.values()), method))
    streams = sorted(rows, key=lambda stream: (stream.dataset, stream.strong_ratio > 0, stream))  # closed sets first
    return [AdaptationTable(stream, rows[stream]) for stream in streams], notes


def _gather_numbers(dataset: str, runs: Mapping[Place, Run], notes: list[Note]) -> dict[tuple[Stream, str], Any]:
    """Return the numbers of an algorithm's models by stream and method, then by kind, trial and domain."""
    found: dict[tuple[Stream, str], Any] = {}
    for (held_out, trial), run in sorted(runs.items(), key=lambda item: item[0]):
        records = list(_read_adaptations(run))
        if not records:
            notes.append(Note(run.folder, "was chosen and is not adapted: 'daft-domainbed sweep adapt' does that"))
        for record in records:
            strong = record["strong_ood"] if record["strong_ratio"] else "none"
            stream = Stream(dataset, strong, record["strong_ratio"], record["batch_size"])
            for row in map(as_dict, as_list(record.get("rows"))):
                kinds = found.setdefault((stream, str(row.get("method"))), {})
                for kind in KINDS:
                    if is_number(row.get(kind)):
                        kinds.setdefault(kind, {}).setdefault(trial, {})[held_out] = row[kind]
    return found


def _read_adaptations(run: Run) -> Iterator[dict[str, Any]]:
    """Yield the json of a run's adaptations to its first held-out domain, those that can be read."""
    for path in sorted((run.path / ADAPTATION_FOLDER).glob(f"*/{ADAPTATION_FILE}")):
        try:
            record = as_dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, RecursionError):
            continue
        numbers = (record.get("strong_ratio"), record.get("batch_size"))
        is_whole = isinstance(record.get("strong_ood"), str) and all(map(is_number, numbers))
        if is_whole and record.get("test_env") == run.key.test_envs[0]:
            yield record


# --- formats -----------------------------------------------------------------------------------------------------

_FOOT = (
    "Checkpoints chosen by training-domain validation. In percent: mean over trials, of means over held-out domains, "
    "with the standard error and, in brackets, the number of trials."
)


def _list_grids(tables: Iterable[AdaptationTable]) -> Iterator[Grid]:
    head = ["model", "method", *(kind.upper() for kind in KINDS)]
    for table in tables:
        rows = [[row.label, row.method, *map(row.format, KINDS)] for row in table.rows]
        yield Grid(table.stream.title, table.stream.title, head, rows)


def _to_text(tables: Sequence[AdaptationTable]) -> str:
    return "\n".join([to_text(_list_grids(tables)), *_list_marks(tables), _FOOT, ""])


def _to_markdown(tables: Sequence[AdaptationTable]) -> str:
    return "\n".join([to_markdown(_list_grids(tables)), *(f"{mark}\n" for mark in _list_marks(tables)), _FOOT, ""])


def _list_marks(tables: Sequence[AdaptationTable]) -> list[str]:
    return list_marks(row for table in tables for row in table.rows)


def _to_csv(tables: Sequence[AdaptationTable]) -> str:
    head = [*Stream._fields, "algorithm", "role", "method", "accuracy", "mean", "stderr", "n", "setting", "origins"]
    rows = [
        [
            *table.stream,
            row.algorithm,
            row.role,
            row.method,
            kind,
            *value.describe().values(),
            row.setting,
            "; ".join(row.origins),
        ]
        for table in tables
        for row in table.rows
        for kind, value in row.values.items()
    ]
    return to_csv(head, rows)


def _to_json(tables: Sequence[AdaptationTable]) -> str:
    """Return the tables as JSON (schema 1)."""
    content = [
        {
            **table.stream._asdict(),
            "rows": [
                row.describe()
                | {"method": row.method, "values": {kind: value.describe() for kind, value in row.values.items()}}
                for row in table.rows
            ],
        }
        for table in tables
    ]
    return json.dumps({"schema": 1, "adaptation": content}, indent=1) + "\n"


FORMATS: dict[str, Callable[[Sequence[AdaptationTable]], str]] = {
    "text": _to_text,
    "markdown": _to_markdown,
    "csv": _to_csv,
    "json": _to_json,
}
